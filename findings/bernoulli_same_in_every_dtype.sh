#!/usr/bin/env bash
# torch 2.11.0 on a CPU: with one seed, bernoulli_ draws the same mask into every dtype, and rand does not.
#
# Guess before the run: as with rand, a 16-bit tensor gets other numbers than a 32-bit one, so that a dropout mask made
# in another dtype is another mask.
# Seen: bernoulli_ decides in double precision whatever the tensor holds, so the masks of float64, float32, bfloat16,
# float16 and uint8 are equal, and leave the generator in the same state. rand draws 24 bits for float32 and only 8 or 11
# for bfloat16 and float16: its numbers are coarser, and `rand(...) < p` is another mask in each dtype.
# torch.nn.functional.dropout is made with bernoulli_: what it drops in bfloat16 is what it drops in float32.
#
# Output: bernoulli_: 1 mask in 5 dtypes, 1 state of the generator after it
#         rand < 0.5: 3 masks in 3 dtypes
#         dropout: 1 mask in 3 dtypes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6
cat > "$folder/draw.py" <<'P'
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def different(draw, dtypes):
    found = set()
    for dtype in dtypes:
        torch.manual_seed(3)
        found.add(bytes(draw(dtype).to(torch.uint8).tolist()))
    return len(found)


def state_after(dtype):
    torch.manual_seed(3)
    torch.empty(100_000, dtype=dtype).bernoulli_(0.5)
    return bytes(torch.get_rng_state().tolist())


dtypes = (torch.float64, *FLOATS, torch.uint8)
masks = different(lambda dtype: torch.empty(100_000, dtype=dtype).bernoulli_(0.5), dtypes)
states = len({state_after(dtype) for dtype in dtypes})
print(f"bernoulli_: {masks} mask in {len(dtypes)} dtypes, {states} state of the generator after it")
print(f"rand < 0.5: {different(lambda dtype: torch.rand(100_000, dtype=dtype) < 0.5, FLOATS)} masks in 3 dtypes")
dropped = different(lambda dtype: torch.nn.functional.dropout(torch.ones(100_000, dtype=dtype), 0.5) > 0, FLOATS)
print(f"dropout: {dropped} mask in 3 dtypes")
P
"$folder/venv/bin/python" "$folder/draw.py" | tee "$folder/output"
diff "$folder/output" - << 'OUT'
bernoulli_: 1 mask in 5 dtypes, 1 state of the generator after it
rand < 0.5: 3 masks in 3 dtypes
dropout: 1 mask in 3 dtypes
OUT
