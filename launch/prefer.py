"""Make preference pairs: python launch/prefer.py --manifest PATH [options]; see --help."""

from higgs_ds.cli import prefer
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(prefer)
