"""Check manifests and encode their audio: python launch/prepare.py --train_manifest PATH [options]; see --help."""

from higgs_ds.command_line import parse_prepare_options

if __name__ == "__main__":
    options, model, how = parse_prepare_options()
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds import distributed
    from higgs_ds.prepare import main

    distributed.leave(distributed.run_ranks(lambda: main(options, model, how)))
