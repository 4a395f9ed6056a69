"""Speak a text with a base, an adapter or a merged model: python launch/generate.py --text "..."; see --help."""

import sys

from higgs_ds.command_line import parse_generate_options

if __name__ == "__main__":
    options = parse_generate_options()
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds.errors import exit_code_of
    from higgs_ds.generate import main

    sys.exit(exit_code_of(lambda: main(options)))
