#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0: an adapter with modules_to_save=["embed_audio_tokens"] of Higgs Audio v2 cannot be loaded.
#
# Guess before the run: PEFT trains a copy of the code embeddings beside LoRA, saves it, and loads it again.
# Seen: the embeddings of the codes are a module embed_audio_tokens with a child of the same name. PEFT compares
# modules_to_save with the ends of names and wraps both, one in the other. It trains and saves without a remark. Loading
# what it saved raises KeyError, for the name of the inner weight. With the child's full name it loads.
#
# Output: embed_audio_tokens: KeyError
#         embed_audio_tokens.embed_audio_tokens: loaded
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
cat > "$folder/save.py" <<'P'
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

small = HiggsAudioV2Config(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, head_dim=16, codebook_size=8, num_codebooks=2, pad_token_id=0, audio_token_id=60,
    audio_delay_token_id=61,
)
for module in ("embed_audio_tokens", "embed_audio_tokens.embed_audio_tokens"):
    config = LoraConfig(target_modules=["self_attn.q_proj"], modules_to_save=[module])
    get_peft_model(HiggsAudioV2ForConditionalGeneration(small), config).save_pretrained("adapter")
    try:
        PeftModel.from_pretrained(HiggsAudioV2ForConditionalGeneration(small), "adapter")
        print(f"{module}: loaded")
    except KeyError:
        print(f"{module}: KeyError")
P
cd "$folder"
venv/bin/python save.py 2> log | tee output
sed -n 's/^# \(Output:\|       \) \(embed.*\)$/\2/p' "$OLDPWD/$0" | diff - output
