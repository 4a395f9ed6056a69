"""List the adapters below a folder: python launch/find_lora_adapters.py PATH [--json]; see --help."""

import sys

from higgs_ds.command_line import parse_inspect_options

if __name__ == "__main__":
    options = parse_inspect_options("find_lora_adapters")
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds.errors import exit_code_of
    from higgs_ds.inspection import find_adapters

    sys.exit(exit_code_of(lambda: find_adapters(options)))
