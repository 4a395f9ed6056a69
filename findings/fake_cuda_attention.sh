#!/usr/bin/env bash
# torch 2.11.0: attention in bfloat16 on a fake CUDA device is recorded as two products in float32.
#
# Guess before the run: FakeTensorMode computes shapes only, so a pass on device="cuda" shows the operations of a GPU,
# one fused attention, and its backward pass runs, as for a fake CPU.
# Seen, without a visible GPU: torch chooses the kernel before the fake device is considered, takes the step-by-step
# one, which computes in float32, and shows two batched products. The backward pass raises a RuntimeError of the autograd
# engine, which looks for the device. A fake CPU gives one fused operation in bfloat16, and runs backward. A count of
# kernels or of memory taken in this way is that of another algorithm than the one that a GPU runs.
#
# Output: cuda forward: aten.bmm.default torch.float32, aten.bmm.default torch.float32
#         cuda backward: hasPrimaryContext expects a valid device index, but got device_index=0
#         cpu forward: aten._scaled_dot_product_flash_attention_for_cpu.default torch.bfloat16
#         cpu backward: runs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6
cat > "$folder/attend.py" <<'P'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode


class Record(TorchDispatchMode):
    seen = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "bmm" in str(func) or "scaled_dot" in str(func):
            self.seen += (f"{func} {args[0].dtype}",)
        return func(*args, **(kwargs or {}))


for device in ("cuda", "cpu"):
    with FakeTensorMode():
        options = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
        query, key, value = (torch.empty(1, 4, 64, 32, **options) for _ in range(3))
        with Record() as record:
            attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        print(f"{device} forward:", ", ".join(record.seen))
        try:
            attended.sum().backward()
            print(f"{device} backward: runs")
        except RuntimeError as error:
            print(f"{device} backward:", str(error).splitlines()[0])
P
CUDA_VISIBLE_DEVICES='' "$folder/venv/bin/python" "$folder/attend.py" 2> "$folder/log" | tee "$folder/output"
sed -n 's/^# \(Output:\|       \) \(c[a-z]* [fb].*\)$/\2/p' "$0" | diff - "$folder/output"
