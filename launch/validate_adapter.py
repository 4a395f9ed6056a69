"""Check an adapter: python launch/validate_adapter.py PATH [--json]; see --help."""

from higgs_ds.cli import validate_adapter
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(validate_adapter)
