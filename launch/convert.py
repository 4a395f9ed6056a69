"""Write a base, a merged model or an adapter in the other layout; see --help."""

import sys

from higgs_ds.command_line import parse_convert_options

if __name__ == "__main__":
    options = parse_convert_options()
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds.convert import main
    from higgs_ds.errors import exit_code_of

    sys.exit(exit_code_of(lambda: main(options)))
