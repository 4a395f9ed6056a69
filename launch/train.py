"""Train LoRA adapters: deepspeed launch/train.py --deepspeed ds_configs/zero2.json [options]; see --help."""

from higgs_ds.command_line import parse_train_options

if __name__ == "__main__":
    options, given = parse_train_options()
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds import distributed

    if options.run.dry_run:
        from higgs_ds import dry_run, errors

        distributed.leave(errors.exit_code_of(lambda: dry_run.main(options, given)))
    from higgs_ds.train import main

    distributed.leave(distributed.run_ranks(lambda: main(options, given)))
