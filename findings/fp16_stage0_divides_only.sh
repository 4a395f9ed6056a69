#!/usr/bin/env bash
# deepspeed 0.19.8: in fp16 at ZeRO stage 0, gradients are divided by the loss scale, but the loss is not multiplied by it.
#
# Guess before the run: engine.backward multiplies the loss by the scale and the step divides the gradients by it, at every
# stage, so that a scale changes nothing but rounding: SGD with lr 1 and a gradient of 1 changes a weight by 1.
# Seen: at stages 1 and 3 it does. At stage 0 the weight changes by 1 / scale: with an initial scale of 2**8, by 0.0039. Nothing
# is printed. With Adam, which divides by the gradient's size, losses hardly show it; clipping and small gradients do.
#
# DeepSpeed refuses fp16 on CPUs; its accelerator is told otherwise here, so that this runs without a GPU.
#
# Output: stage 0: 0.0039
#         stage 1: 1.0000
#         stage 3: 1.0000
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
for stage in (0, 1, 3):
    module = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    config = {
        "train_batch_size": 1, "fp16": {"enabled": True, "initial_scale_power": 8}, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    engine.backward(engine(torch.ones(1, 4, dtype=torch.half)).sum())
    engine.step()
    weight = module.weight if stage == 0 else safe_get_full_fp32_param(module.weight)
    print(f"stage {stage}: {-weight.flatten()[0].item():.4f}")
P
cd "$folder"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29735 DS_ACCELERATOR=cpu
venv/bin/python train.py 2> log | grep "^stage" | tee output
sed -n 's/^# \(Output:\|       \) \(stage.*\)$/\2/p' "$OLDPWD/$0" | diff - output
