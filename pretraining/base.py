"""Make the untrained base: tokenizer, configuration, and weights, some of which come from the codec's vectors.

python pretraining/base.py outputs/corpus outputs/codec/speaking-codec outputs/untrained-base
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerFast

from higgs_ds.bases.tiny_random import CODEBOOK_SIZE, save_model
from higgs_ds.common.console import quiet_libraries
from higgs_ds.model.v2.tiny import base_config, build_processor, greedy_generation, with_special_tokens

WIDTH = 192
VOCABULARY = 371  # text tokens, without special tokens
# Heads are not trained: rows of codes that no voice in the corpus has would be unlearned, beyond the reach of
# adapters. So all rows are long enough for confident predictions, and equally long: each can have the highest logit.
ROW_LENGTH = 4.0
TEXT_STD, AUDIO_STD = 0.1, 0.05  # of embeddings; an audio position has eight of them


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("codec", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    quiet_libraries()
    torch.manual_seed(options.seed)
    tokenizer = trained_tokenizer(options.corpus / "base_train.jsonl")
    model = untrained(tokenizer, load_file(options.codec / "model.safetensors"))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    save_model(model, options.output_dir)
    model.generation_config.save_pretrained(options.output_dir)
    build_processor(tokenizer, options.codec.resolve()).save_pretrained(options.output_dir)
    print(f"base: {options.output_dir}, {sum(p.numel() for p in model.parameters()):,} parameters")


def trained_tokenizer(manifest: Path) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the texts of a manifest, and add the model's special tokens."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    texts = [turn["content"] for line in lines for turn in json.loads(line)["messages"][:-1]]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return with_special_tokens(backend)


def untrained(
    tokenizer: PreTrainedTokenizerFast, codec: dict[str, torch.Tensor]
) -> HiggsAudioV2ForConditionalGeneration:
    """Return four dual-FFN layers with random weights, except for the rows that represent codes."""
    config = base_config(
        tokenizer,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
    )
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    model.generation_config = greedy_generation(config)
    embeddings = model.model.embed_audio_tokens.embed_audio_tokens.weight.view(config.num_codebooks, -1, WIDTH)
    heads = model.audio_lm_head.weight.view(config.num_codebooks, -1, WIDTH)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, TEXT_STD)
        embeddings.normal_(0, AUDIO_STD)
        for weight in (heads, model.text_lm_head.weight):
            weight.normal_()
        for book in range(config.num_codebooks):
            vectors = codec[f"quantizer.quantizers.{book}.codebook.embed"]
            if vectors.any():
                projection = torch.nn.init.orthogonal_(torch.empty(WIDTH, vectors.shape[1]))
                wide = (vectors - vectors.mean(dim=0)) @ projection.T
                wide /= wide.std()
                # Codes that sound alike have similar rows from the start.
                embeddings[book, :CODEBOOK_SIZE] = wide * AUDIO_STD
                heads[book, :CODEBOOK_SIZE] += wide
        for weight in (heads, model.text_lm_head.weight):
            weight.copy_(ROW_LENGTH * torch.nn.functional.normalize(weight, dim=-1))
    return model


if __name__ == "__main__":
    main()
