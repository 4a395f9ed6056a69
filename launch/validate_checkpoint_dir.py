"""Check a checkpoint-N folder: python launch/validate_checkpoint_dir.py PATH [--json]; see --help."""

from higgs_ds.cli import validate_checkpoint_dir

if __name__ == "__main__":
    validate_checkpoint_dir()
