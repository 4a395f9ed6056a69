#!/usr/bin/env bash
# deepspeed 0.19.8, bitsandbytes 0.50.2: at ZeRO-3, the wrapped optimizer has parameter groups without parameters.
#
# Guess before the run: after deepspeed.initialize, the groups of the given optimizer hold the float32 partitions that it
# updates, as at stages 1 and 2, so that its state can be made ready (a resume does so) before the first step.
# Seen: at stage 3 a group holds a partition only inside step(), and is empty before and after. bitsandbytes' init_state
# looks a parameter up in its group, by an index, and ends in an IndexError; torch's AdamW makes its state inside step().
#
# Output: stage 1: 1 parameter in the group, init_state: done
#         stage 3: 0 parameters in the group, init_state: IndexError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 deepspeed==0.19.8 setuptools==80.9.0 bitsandbytes==0.50.2
cat > "$folder/train.py" <<'P'
import deepspeed
import torch
from bitsandbytes.optim import AdamW8bit

deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # nothing is compiled
for stage in (1, 3):
    module = torch.nn.Linear(64, 128, bias=False)
    optimizer = AdamW8bit(module.parameters(), lr=0.1)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_batch_size": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    (group,) = optimizer.param_groups
    count = len(group["params"])
    master = group["params"][0] if count else engine.optimizer.fp32_partitioned_groups_flat[0]
    try:
        optimizer.init_state(group, master, 0, 0)
        result = "done"
    except IndexError:
        result = "IndexError"
    print(f"stage {stage}: {count} parameter{'s' * (count != 1)} in the group, init_state: {result}")
P
cd "$folder"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29733 DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1
venv/bin/python train.py 2> log | grep "^stage" | tee output
sed -n 's/^# \(Output:\|       \) \(stage.*\)$/\2/p' "$OLDPWD/$0" | diff - output
