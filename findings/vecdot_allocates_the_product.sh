#!/usr/bin/env bash
# torch 2.11.0: torch.linalg.vecdot allocates the product of its inputs, as (x * y).sum(-1) does.
#
# Guess before the run: vecdot over the last dimension is a batch of dot products (its documentation says "the dot product
# of two batches of vectors"), and needs only memory for its result. Seen on a CPU: it multiplies element by element into a
# tensor of the inputs' size, and sums that. einsum("nd,nd->n") does not.
#
# Output: largest allocation, in elements of 64 x 1024 inputs
#         (x * y).sum(-1): 65536
#         vecdot: 65536
#         einsum: 64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6
cat > "$folder/measure.py" <<'P'
import torch
from torch.profiler import ProfilerActivity, profile

x, y = torch.randn(64, 1024), torch.randn(64, 1024)
ways = {
    "(x * y).sum(-1)": lambda: (x * y).sum(-1),
    "vecdot": lambda: torch.linalg.vecdot(x, y),
    "einsum": lambda: torch.einsum("nd,nd->n", x, y),
}
print("largest allocation, in elements of 64 x 1024 inputs")
for name, way in ways.items():
    way()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        way()
    events = measured.profiler.kineto_results.events()
    print(f"{name}: {max(event.nbytes() for event in events if event.name() == '[memory]') // 4}")
P
cd "$folder"
venv/bin/python measure.py 2> log | tee output
sed -n '/^# Output: /,/^set/s/^# \(Output:\|       \) \(.*\)$/\2/p' "$OLDPWD/$0" | diff - output
