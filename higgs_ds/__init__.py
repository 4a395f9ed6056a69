"""Low-memory trainer for Higgs Audio on DeepSpeed."""

__version__ = "0.1.0"
