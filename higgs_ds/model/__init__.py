"""The Higgs Audio v2 model, its adapters, and their loss-bearing wrapper."""
