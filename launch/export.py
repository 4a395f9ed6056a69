"""Make a complete model of a checkpoint of full fine-tuning; see --help."""

import sys

from higgs_ds.command_line import parse_export_options

if __name__ == "__main__":
    options = parse_export_options()
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds.complete import main
    from higgs_ds.errors import exit_code_of

    sys.exit(exit_code_of(lambda: main(options)))
