"""The families of models, their adapters, and the wrappers that compute their loss."""
