#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter(combination_type="linear") is not the weighted sum of the adapters' changes.
#
# Guess before the run: the combined adapter changes a layer by 0.5 times the one change plus 0.5 times the other, or close
# to that. Seen: the A and B factors are averaged each by itself, and the product of averages is another matrix. For two
# random adapters of rank 8, the error is as large as the sum itself. "svd" at the default rank, that of one adapter,
# loses nearly half; "cat" is exact, at twice the rank.
#
# Output: linear 1.00
#         svd 0.47
#         cat 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cat > "$folder/combine.py" <<'P'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)), config, "a")
model.add_adapter("b", config)
for name, parameter in model.named_parameters():
    if "lora" in name:
        torch.nn.init.normal_(parameter)
layer = model.base_model.model[0]
wanted = 0.5 * layer.get_delta_weight("a") + 0.5 * layer.get_delta_weight("b")
for kind in ("linear", "svd", "cat"):
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], kind, combination_type=kind)
    error = (layer.get_delta_weight(kind) - wanted).norm() / wanted.norm()
    print(f"{kind} {error:.2f}")
P
cd "$folder"
venv/bin/python combine.py 2> log | tee output
sed -n 's/^# \(Output:\|       \) \([a-z]* [0-9].*\)$/\2/p' "$OLDPWD/$0" | diff - output
