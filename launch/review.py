"""Check the clips of a list by ear, on a page on this machine; see --help."""

from higgs_ds.cli import review
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(review)
