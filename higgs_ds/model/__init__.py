"""The Higgs Audio v2 model, its adapters, and the wrapper that computes the loss."""
