"""Check a checkpoint-N folder: python launch/validate_checkpoint_dir.py PATH [--json]; see --help."""

import sys

from higgs_ds.command_line import parse_inspect_options

if __name__ == "__main__":
    options = parse_inspect_options("validate_checkpoint_dir")
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds.errors import exit_code_of
    from higgs_ds.inspection import validate_checkpoint

    sys.exit(exit_code_of(lambda: validate_checkpoint(options)))
