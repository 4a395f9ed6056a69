"""Merge a LoRA adapter into its base model; see --help."""

from higgs_ds.cli import merge
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(merge)
