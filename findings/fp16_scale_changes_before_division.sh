#!/usr/bin/env bash
# deepspeed 0.19.8: in the step that doubles the loss scale of fp16, gradients are half as large as they should be.
#
# Guess before the run: the scale that a loss was multiplied by is the one that its gradients are divided by, and a new scale
# holds from the next step on: with SGD, lr 1 and a gradient of 1, each step changes a weight by 1.
# Seen: the optimizer of stage 1 first updates the scale, and then divides by the new one. With a window of 2 steps, every
# second step is half as large. At the default window of 1000, one step in a thousand is.
#
# DeepSpeed refuses fp16 on CPUs; its accelerator is told otherwise here, so that this runs without a GPU.
#
# Output: steps: 1.0 1.0 0.5 1.0 0.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 deepspeed==0.19.8 setuptools==80.9.0
cat > "$folder/train.py" <<'P'
import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import safe_get_full_fp32_param

deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # nothing is compiled
CPU_Accelerator.is_fp16_supported = lambda self: True
module = torch.nn.Linear(4, 1, bias=False)
torch.nn.init.zeros_(module.weight)
config = {
    "train_batch_size": 1, "fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2},
    "gradient_clipping": 0.0, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True,
}
optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
weights = [0.0]
for _ in range(5):
    engine.backward(engine(torch.ones(1, 4, dtype=torch.half)).sum())
    engine.step()
    weights.append(-safe_get_full_fp32_param(module.weight).flatten()[0].item())
print("steps:", *(f"{after - before:.1f}" for before, after in zip(weights, weights[1:])))
P
cd "$folder"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29737 DS_ACCELERATOR=cpu
venv/bin/python train.py 2> log | grep "^steps" | tee output
sed -n 's/^# Output: //p' "$OLDPWD/$0" | diff - output
