"""Check a checkpoint-N folder: python launch/validate_checkpoint_dir.py PATH [--json]; see --help."""

from higgs_ds.cli import validate_checkpoint_dir
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(validate_checkpoint_dir)
