"""Low-memory LoRA trainer for Higgs Audio v2 on DeepSpeed."""

__version__ = "0.1.0"
