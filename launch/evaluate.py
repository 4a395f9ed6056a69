"""Measure what a model says: python launch/evaluate.py --test_manifest PATH [options]; see --help."""

from higgs_ds.command_line import parse_evaluate_options

if __name__ == "__main__":
    options = parse_evaluate_options()
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds import distributed
    from higgs_ds.evaluate import main

    distributed.leave(distributed.run_ranks(lambda: main(options)))
