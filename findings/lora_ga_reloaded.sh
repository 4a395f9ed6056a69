#!/usr/bin/env bash
# peft 0.21.2: an adapter initialized with LoRA-GA and saved the usual way is another adapter when it is loaded again.
#
# Guess before the run: the initializations that change the base's weights are all treated as `pissa` is, which PEFT
# repeats when it loads the adapter, so that the reloaded model equals the trained one.
# Seen: for `gaussian` and `pissa` the reloaded model equals the trained one. For `lora_ga` nothing is repeated, as the
# gradients are not saved: on the original base, the outputs are off by about three times the adapter's whole effect.
# Saving and loading give no warning. `path_initial_model_for_weight_conversion` avoids it, at the time of saving only.
#
# Output: gaussian: off by 0.00 of the effect, 0 warnings
#         pissa: off by 0.00 of the effect, 0 warnings
#         lora_ga: off by 2.98 of the effect, 0 warnings
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 torch==2.11.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/reload.py" <<'P'
import copy
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


torch.manual_seed(0)
base, x = Net(), torch.randn(8, 16)
for name in ("gaussian", "pissa", "lora_ga"):
    model = copy.deepcopy(base)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["first"], init_lora_weights=name)
    if name == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(model, config, lambda model=model: model(x).square().sum().backward())
    trained = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        trained(x).square().sum().backward()
        optimizer.step()
    folder = f"{sys.argv[1]}/{name}"
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        trained.save_pretrained(folder)
        reloaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    with torch.no_grad():
        off = (reloaded(x) - trained(x)).abs().max() / (trained(x) - base(x)).abs().max()
    print(f"{name}: off by {float(off):.2f} of the effect, {len(caught)} warnings")
P
"$folder/venv/bin/python" "$folder/reload.py" "$folder" 2> "$folder/log" | tee "$folder/output"
grep -qx 'pissa: off by 0.00 of the effect, 0 warnings' "$folder/output"
grep -qE '^lora_ga: off by [1-9]\.[0-9]+ of the effect, 0 warnings$' "$folder/output"
