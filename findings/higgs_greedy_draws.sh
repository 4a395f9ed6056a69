#!/usr/bin/env bash
# transformers 5.23.0: greedy generation of Higgs Audio v2 depends on the random seed where ras_win_len is set.
#
# Guess before the run: do_sample=False is the argmax, whatever the settings of sampling are; repetition-aware sampling
# is one of them, and has no effect.
# Seen: it acts on the chosen codes, however they were chosen. A code that was said ras_win_max_num_repeat times in the
# last ras_win_len rows is drawn again from torch's global generator. The released model's own settings have it, so that
# "greedy" results differ from seed to seed, and an evaluation with do_sample=False has to set the seed, too.
#
# Output: without ras_win_len: 1 result of 5 seeds
#         with ras_win_len: 5 results of 5 seeds
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 transformers==5.23.0
cat > "$folder/speak.py" <<'P'
import torch
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, logging

logging.set_verbosity_error()
torch.manual_seed(0)
config = HiggsAudioV2Config(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, vocab_size=200, pad_token_id=0, eos_token_id=1, audio_token_id=2, audio_bos_token_id=3,
    audio_delay_token_id=4,
)
model = HiggsAudioV2ForConditionalGeneration(config).eval()
ids = torch.tensor([[7, 8, 9, 3]])


def results():
    found = set()
    for seed in range(5):
        torch.manual_seed(seed)
        rows = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60
        )
        found.add(tuple(rows.flatten().tolist()))
    return len(found)


print(f"without ras_win_len: {results()} result of 5 seeds")
model.generation_config.ras_win_len, model.generation_config.ras_win_max_num_repeat = 7, 2
print(f"with ras_win_len: {results()} results of 5 seeds")
P
"$folder/venv/bin/python" "$folder/speak.py" | tee "$folder/output"
diff "$folder/output" - << 'OUT'
without ras_win_len: 1 result of 5 seeds
with ras_win_len: 5 results of 5 seeds
OUT
