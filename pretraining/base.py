"""Make the untrained base of a family: tokenizer, configuration, and weights, some of them from the codec's vectors.

    python pretraining/base.py outputs/corpus outputs/codec/speaking-codec outputs/untrained-base

A family without scenes names the second voice by an inline tag; its manifests are written beside the base.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerFast

from higgs_ds.bases.tiny_random import CODEBOOK_SIZE, save_model
from higgs_ds.common.console import quiet_libraries
from higgs_ds.model.v2.family import HiggsAudioV2
from higgs_ds.model.v2.tiny import base_config, greedy_generation
from higgs_ds.model.v3 import tiny as v3
from higgs_ds.model.v3.family import HiggsAudioV3

FAMILIES = {"v2": HiggsAudioV2(), "v3": HiggsAudioV3()}
FEMININE = "<|style:feminine|>"
WIDTH = 192
VOCABULARY = 371  # text tokens, without special tokens
# Heads are not trained: rows of codes that no voice in the corpus has would be unlearned, beyond the reach of
# adapters. So all rows are long enough for confident predictions, and equally long: each can have the highest logit.
ROW_LENGTH = 4.0
TEXT_STD, AUDIO_STD = 0.1, 0.05  # of embeddings; an audio position has eight of them
TIED_LENGTH = 2.0  # of rows that are embeddings, too: eight of them are not to drown what the layers add


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("codec", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--family", choices=list(FAMILIES), default="v2")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    quiet_libraries()
    torch.manual_seed(options.seed)
    tiny = FAMILIES[options.family].tiny()
    backend = trained_tokenizer(options.corpus / "base_train.jsonl")
    codec = load_file(options.codec / "model.safetensors")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if options.family == "v2":
        tokenizer = tiny.with_special_tokens(backend)
        model = untrained_v2(tokenizer, codec)
    else:
        tokenizer = tiny.with_special_tokens(backend, (FEMININE,))
        model = untrained_v3(tokenizer, codec)
        for name in ("base_train", "base_held_out"):
            write_with_tags(options.corpus / f"{name}.jsonl", options.output_dir / f"{name}.jsonl")
    save_model(model, options.output_dir)
    model.generation_config.save_pretrained(options.output_dir)
    tiny.write_companions(options.output_dir, tokenizer, options.codec.resolve())
    print(f"base: {options.output_dir}, {sum(p.numel() for p in model.parameters()):,} parameters")


def write_with_tags(source: Path, target: Path) -> None:
    """Write a manifest without system turns: the voice that a scene describes is named by a tag before the text."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        system, *messages = entry["messages"]
        for message in messages:
            if isinstance(message["content"], dict):
                message["content"]["audio_url"] = str((source.parent / message["content"]["audio_url"]).resolve())
        if "feminine" in system["content"]:
            messages[-2]["content"] = FEMININE + messages[-2]["content"]
        lines.append(json.dumps(entry | {"messages": messages, "start_index": len(messages) - 1}))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def trained_tokenizer(manifest: Path) -> Tokenizer:
    """Train byte-level BPE on the texts of a manifest."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    texts = [turn["content"] for line in lines for turn in json.loads(line)["messages"][:-1]]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def untrained_v2(
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
            wide = widened(codec[f"quantizer.quantizers.{book}.codebook.embed"])
            if wide is not None:
                # Codes that sound alike have similar rows from the start.
                embeddings[book, :CODEBOOK_SIZE] = wide * AUDIO_STD
                heads[book, :CODEBOOK_SIZE] += wide
        for weight in (heads, model.text_lm_head.weight):
            weight.copy_(ROW_LENGTH * torch.nn.functional.normalize(weight, dim=-1))
    return model


def untrained_v3(tokenizer: PreTrainedTokenizerFast, codec: dict[str, torch.Tensor]) -> Any:
    """Return four layers with random weights, except for the rows of the table of codes, which is not trained."""
    config = v3.base_config(
        tokenizer,
        hidden_size=WIDTH,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
    )
    model = HiggsAudioV3().build(config)
    model.generation_config = v3.greedy_generation(config)
    table = model.audio_table.weight.view(config.num_codebooks, -1, WIDTH)
    with torch.no_grad():
        model.text_embedding.weight.normal_(0, TEXT_STD)
        table.normal_()
        for book in range(config.num_codebooks):
            wide = widened(codec[f"quantizer.quantizers.{book}.codebook.embed"])
            if wide is not None:
                table[book, :CODEBOOK_SIZE] += wide
        table.copy_(TIED_LENGTH * torch.nn.functional.normalize(table, dim=-1))
    return model


def widened(vectors: torch.Tensor) -> torch.Tensor | None:
    """Return the codec's vectors of a codebook in the model's width, with a standard deviation of 1; None for zeros."""
    if not vectors.any():
        return None
    projection = torch.nn.init.orthogonal_(torch.empty(WIDTH, vectors.shape[1]))
    wide = (vectors - vectors.mean(dim=0)) @ projection.T
    return wide / wide.std()


if __name__ == "__main__":
    main()
