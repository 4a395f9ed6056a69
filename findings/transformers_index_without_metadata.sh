#!/usr/bin/env bash
# transformers 5.23.0: weights in several files do not load if their index has no "metadata", which nothing else needs.
#
# Guess before the run: the index's "weight_map" says everything that is read; "metadata" holds a total size, which other
# readers of such an index ignore, so that it loads as before.
# Seen: KeyError: 'metadata', without the name of the file. With an empty "metadata" it loads, and all tensors are equal.
# safetensors' own reader of the same files does not look at the index at all.
#
# Output: with its total size: loads, all equal
#         with an empty metadata: loads, all equal
#         without metadata: KeyError: 'metadata'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.11.0 numpy==2.4.6 safetensors==0.8.0
cat > "$folder/load.py" <<'P'
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1]) / "model"
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
model.save_pretrained(folder, max_shard_size="20KB")
path = folder / "model.safetensors.index.json"
index = json.loads(path.read_text())
without = {"weight_map": index["weight_map"]}
kinds = {"with its total size": index, "with an empty metadata": without | {"metadata": {}}, "without metadata": without}
for kind, written in kinds.items():
    path.write_text(json.dumps(written))
    try:
        loaded = LlamaForCausalLM.from_pretrained(folder).state_dict()
    except KeyError as error:
        print(f"{kind}: KeyError: {error}")
    else:
        equal = all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
        print(f"{kind}: loads, {'all equal' if equal else 'not equal'}")
P
"$folder/venv/bin/python" "$folder/load.py" "$folder" 2> "$folder/log" | tee "$folder/output"
diff "$folder/output" - << 'OUT'
with its total size: loads, all equal
with an empty metadata: loads, all equal
without metadata: KeyError: 'metadata'
OUT
