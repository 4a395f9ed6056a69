"""Write a checkpoint of full fine-tuning as a complete model; see --help."""

from higgs_ds.cli import export
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(export)
