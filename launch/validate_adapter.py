"""Check an adapter: python launch/validate_adapter.py PATH [--json]; see --help."""

import sys

from higgs_ds.command_line import parse_inspect_options

if __name__ == "__main__":
    options = parse_inspect_options("validate_adapter")
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds.errors import exit_code_of
    from higgs_ds.inspection import validate_adapter

    sys.exit(exit_code_of(lambda: validate_adapter(options)))
