"""Merge a LoRA adapter into its base; see --help."""

import sys

from higgs_ds.command_line import parse_merge_options

if __name__ == "__main__":
    options = parse_merge_options()
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds.errors import exit_code_of
    from higgs_ds.merge import main

    sys.exit(exit_code_of(lambda: main(options)))
