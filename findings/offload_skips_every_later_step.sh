#!/usr/bin/env bash
# deepspeed 0.19.8: with an offloaded optimizer and float32 accumulation, all steps after a skipped one are skipped, too.
#
# Guess before the run: a step whose gradient is not finite is left out, and the next one is an ordinary step: of five steps,
# the second of which has NaN in its loss, one is skipped.
# Seen: at stage 2 with offload_optimizer and "grad_accum_dtype": "fp32", the gradients of the skipped step are not cleared,
# and the next ones are added to them: that step and all after it are skipped. Without offload only one is.
#
# Output: not offloaded: 1 of 5 steps skipped
#         offloaded: 4 of 5 steps skipped
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 deepspeed==0.19.8 setuptools==80.9.0
cat > "$folder/train.py" <<'P'
import deepspeed
import torch

deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # nothing is compiled
for name, offload in (("not offloaded", {}), ("offloaded", {"offload_optimizer": {"device": "cpu"}})):
    module = torch.nn.Linear(4, 1, bias=False)
    config = {
        "train_batch_size": 1, "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 2, **offload},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    for step in range(5):
        loss = engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum()
        engine.backward(loss * (float("nan") if step == 1 else 1.0))
        engine.step()
    print(f"{name}: {engine.skipped_steps} of 5 steps skipped")
P
cd "$folder"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29739 DS_ACCELERATOR=cpu
venv/bin/python train.py 2> log | grep "skipped$" | tee output
sed -n 's/^# \(Output:\|       \) \(.*skipped\)$/\2/p' "$OLDPWD/$0" | diff - output
