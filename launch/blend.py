"""Blend LoRA adapters into one, the weighted sum of their changes; see --help."""

from higgs_ds.cli import blend
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(blend)
