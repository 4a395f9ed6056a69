"""Check an adapter: python launch/validate_adapter.py PATH [--json]; see --help."""

from higgs_ds.cli import validate_adapter

if __name__ == "__main__":
    validate_adapter()
