#!/usr/bin/env bash
# peft 0.21.2: converting a PiSSA adapter with DoRA to plain LoRA drops DoRA's magnitudes.
#
# Guess before the run: `path_initial_model_for_weight_conversion` either keeps the magnitude vectors, or refuses an
# adapter with DoRA.
# Seen: without DoRA, the converted adapter equals the trained model on the original base. With DoRA, the conversion
# writes only the two factors, gives no warning, and leaves `use_dora` true in the configuration: the file loads, with a
# warning about a missing key, and the outputs are off by about half of the adapter's whole effect.
#
# Output: LoRA: tensors lost: none; off by 0.00 of the effect
#         DoRA: tensors lost: lora_magnitude_vector; off by 0.45 of the effect
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.11.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/convert.py" <<'P'
import copy
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def names(folder):
    return {name.split("first.")[1] for name in load_file(f"{folder}/adapter_model.safetensors")}


torch.manual_seed(0)
base, x = Net(), torch.randn(8, 16)
for kind in ("LoRA", "DoRA"):
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["first"], init_lora_weights="pissa", use_dora=kind == "DoRA"
    )
    model = get_peft_model(copy.deepcopy(base), config)
    folder = f"{sys.argv[1]}/{kind}"
    # As PEFT's documentation does it: the initial adapter is saved before training, to be subtracted afterwards.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(f"{folder}/initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        trained = model(x)
    model.save_pretrained(f"{folder}/trained")
    model.save_pretrained(f"{folder}/converted", path_initial_model_for_weight_conversion=f"{folder}/initial")
    lost = sorted(names(f"{folder}/trained") - names(f"{folder}/converted"))
    with torch.no_grad():
        converted = PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/converted")(x)
        off = (converted - trained).abs().max() / (trained - base(x)).abs().max()
    print(f"{kind}: tensors lost: {', '.join(lost) or 'none'}; off by {float(off):.2f} of the effect")
P
"$folder/venv/bin/python" "$folder/convert.py" "$folder" 2> "$folder/log" | tee "$folder/output"
grep -qx 'LoRA: tensors lost: none; off by 0.00 of the effect' "$folder/output"
grep -qE '^DoRA: tensors lost: lora_magnitude_vector; off by 0\.[1-9][0-9]* of the effect$' "$folder/output"
