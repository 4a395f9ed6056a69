#!/usr/bin/env bash
# deepspeed 0.19.8: after torch's destroy_process_group, no second training starts in the same process.
#
# Guess before the run: DeepSpeed works on torch's default process group, so that a process which has destroyed that
# group and made a new one trains again, as plain torch does (think of notebooks, and of test suites).
# Seen: deepspeed.utils.groups keeps the group of the first training, which torch no longer knows: the second
# deepspeed.initialize raises a ValueError at every ZeRO stage. deepspeed.comm.destroy_process_group, which calls the
# same function of torch, also forgets that group, and the second training runs.
#
# Output: torch.distributed, stage 0: trained, ValueError
#         torch.distributed, stage 2: trained, ValueError
#         deepspeed.comm, stage 0: trained, trained
#         deepspeed.comm, stage 2: trained, trained
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 deepspeed==0.19.8 setuptools==80.9.0
cat > "$folder/train.py" <<'P'
import sys

import deepspeed
import torch
import torch.distributed

deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # nothing is compiled
module, stage = sys.argv[1], int(sys.argv[2])
CONFIG = {
    "train_batch_size": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def train():
    deepspeed.init_distributed("gloo")
    model = torch.nn.Linear(4, 4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=CONFIG)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()


results = []
for _ in range(2):
    try:
        train()
        results.append("trained")
    except ValueError as error:
        results.append(type(error).__name__)
    {"torch.distributed": torch.distributed, "deepspeed.comm": deepspeed.comm}[module].destroy_process_group()
print(f"{module}, stage {stage}: {', '.join(results)}")
P
cd "$folder"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29731 DS_ACCELERATOR=cpu
for module in torch.distributed deepspeed.comm; do
  for stage in 0 2; do
    venv/bin/python train.py $module $stage 2> log | grep "stage" | tee -a output
  done
done
sed -n 's/^# \(Output:\|       \) \(.*stage.*\)$/\2/p' "$OLDPWD/$0" | diff - output
