"""Train adapters or full weights: deepspeed launch/train.py --deepspeed ds_configs/zero2.json [options]; see --help."""

from higgs_ds.cli import train

if __name__ == "__main__":
    train()
