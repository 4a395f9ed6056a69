#!/usr/bin/env bash
# deepspeed 0.19.8: a ZeRO-3 leaf module cannot be trained where its input requires no gradient.
#
# Guess before the run: set_z3_leaf_module only makes DeepSpeed gather the weights of all submodules at once, so that a
# module that uses them in its own forward trains at stage 3 wherever it stands in the model.
# Seen: a leaf module's gradients are reduced in a full backward hook. torch calls such a hook when the gradients of the
# module's inputs are there, and if no input requires one, already when those of its outputs are. DeepSpeed then sets
# missing gradients to zero, releases the weights, and the gradients that arrive next do not fit: a RuntimeError. The
# first layer after frozen embeddings is such a module in every LoRA training. With an input that requires a gradient,
# the same module trains.
#
# Output: input without gradient: RuntimeError
#         input with gradient: trained
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 deepspeed==0.19.8 setuptools==80.9.0
cat > "$folder/train.py" <<'P'
import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module

deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # nothing is compiled
CONFIG = {
    "train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


class Product(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 8, bias=False)

    def forward(self, x):
        return x @ self.first.weight.t() @ self.second.weight.t()


for name, needs_gradient in (("without", False), ("with", True)):
    module = torch.nn.Sequential(Product())
    set_z3_leaf_module(module[0], True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=CONFIG)
    try:
        engine.backward(engine(torch.ones(2, 8, requires_grad=needs_gradient)).sum())
        engine.step()
        print(f"input {name} gradient: trained")
    except RuntimeError as error:
        print(f"input {name} gradient: {type(error).__name__}")
P
cd "$folder"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29731 DS_ACCELERATOR=cpu
venv/bin/python train.py 2> log | grep "^input" | tee output
sed -n 's/^# \(Output:\|       \) \(input.*\)$/\2/p' "$OLDPWD/$0" | diff - output
