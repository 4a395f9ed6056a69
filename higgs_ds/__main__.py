"""Entry point of `python -m higgs_ds COMMAND`, which `deepspeed --module` and `torchrun --module` start per rank."""

from higgs_ds.cli import main

if __name__ == "__main__":
    main()
