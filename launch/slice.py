"""Cut long recordings into clips: python launch/slice.py RECORDING --output_dir DIR [options]; see --help."""

from higgs_ds.cli import slice
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(slice)
