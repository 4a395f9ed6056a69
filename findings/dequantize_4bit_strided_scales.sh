#!/usr/bin/env bash
# bitsandbytes 0.50.2: dequantize_4bit reads the scales of a view as if they were contiguous, and returns other weights.
#
# Guess before the run: the scales of one column of blocks, cut out of those of a weight and flattened, are what a QuantState
# needs; and if a kernel needs contiguous scales, it copies them, as torch's operations do, or raises an error. Seen on a CPU:
# flatten() of a (40, 1) view of (40, 3) returns a view with stride 3, and the kernel ignores the stride. The first row is
# right, the other ones have scales of other blocks. After contiguous(), all are right. With two columns of blocks,
# flatten() copies.
#
# Output: one column of blocks, flattened: stride 3, rows that are right: 1 of 40
#         one column of blocks, contiguous: stride 1, rows that are right: 40 of 40
#         two columns of blocks, flattened: stride 1, rows that are right: 40 of 40
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 bitsandbytes==0.50.2
cat > "$folder/measure.py" <<'P'
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

BLOCK = 64
torch.manual_seed(0)
packed, state = quantize_4bit(torch.randn(40, 3 * BLOCK), blocksize=BLOCK, quant_type="nf4")
weight = dequantize_4bit(packed, state)


def compare(name: str, columns: int, scales: torch.Tensor) -> None:
    part = packed.view(40, 3 * BLOCK // 2)[:, : columns * BLOCK // 2].contiguous().view(-1, 1)
    shape = torch.Size((40, columns * BLOCK))
    found = dequantize_4bit(part, QuantState(scales, shape, state.code, BLOCK, "nf4", state.dtype))
    right = (found == weight[:, : columns * BLOCK]).all(dim=1).sum()
    print(f"{name}: stride {scales.stride(0)}, rows that are right: {right} of 40")


scales = state.absmax.view(40, 3)
compare("one column of blocks, flattened", 1, scales[:, :1].flatten())
compare("one column of blocks, contiguous", 1, scales[:, :1].contiguous().flatten())
compare("two columns of blocks, flattened", 2, scales[:, :2].flatten())
P
cd "$folder"
venv/bin/python measure.py 2> log | tee output
sed -n '/^# Output: /,/^set/s/^# \(Output:\|       \) \(.*\)$/\2/p' "$OLDPWD/$0" | diff - output
