"""Train adapters or full weights: deepspeed launch/train.py --deepspeed ds_configs/zero2.json [options]; see --help."""

from higgs_ds.cli import train
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(train)
