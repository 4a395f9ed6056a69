#!/usr/bin/env bash
# torch 2.11.0: a convolution with kernel 1 is computed by another library on one thread than on two.
#
# Guess before the run: the number of threads divides the work, and does not choose the kernel. Seen on a CPU: conv1d with
# kernel 1 over (1, 64, 16384) in float32 goes to oneDNN with two threads, and to torch's own im2col and matrix product
# (slow_conv2d) with one; kernel 7 goes to oneDNN with both.
#
# Output: kernel 1, 1 thread: aten::_slow_conv2d_forward
#         kernel 1, 2 threads: aten::mkldnn_convolution
#         kernel 7, 1 thread: aten::mkldnn_convolution
#         kernel 7, 2 threads: aten::mkldnn_convolution
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6
cat > "$folder/measure.py" <<'P'
import torch
from torch.profiler import ProfilerActivity, profile

x = torch.randn(1, 64, 16384)
for kernel in (1, 7):
    conv = torch.nn.Conv1d(64, 64, kernel)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as measured:
            conv(x)
        names = {event.key for event in measured.key_averages()}
        used = names & {"aten::_slow_conv2d_forward", "aten::mkldnn_convolution"}
        print(f"kernel {kernel}, {threads} thread{'s' * (threads > 1)}: {', '.join(sorted(used))}")
P
cd "$folder"
venv/bin/python measure.py 2> log | tee output
sed -n '/^# Output: /,/^set/s/^# \(Output:\|       \) \(.*\)$/\2/p' "$OLDPWD/$0" | diff - output
