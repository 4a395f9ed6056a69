"""The files of Higgs Audio v3: one layout, `native` here. Its names are those of the modules of `modeling`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as TextEncoder

MODEL_TYPE = "higgs_multimodal_qwen3"
ROPE_THETA = 1_000_000  # meant by null in config.json; transformers' default, 10,000, gives other logits
BOC_ID, EOC_ID = 1024, 1025  # codes of every codebook that begin and end a clip
CODEC_PREFIX = "tied.embedding.modality_embeddings.0.model."  # of the tensors of a codec in the same files
TEXT_EMBEDDING = "tied.embedding.text_embedding"
AUDIO_TABLE = "tied.embedding.modality_embeddings.0.embedding"
TEXT_HEAD, AUDIO_HEAD = "tied.head.text_head", "tied.head.modality_heads.0"
# What the model computes with, of the values of text_config and audio_encoder_config.
_WHOLE_NUMBERS = {
    "text_config": (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    ),
    "audio_encoder_config": ("num_codebooks", "vocab_size"),
}  # fmt: skip


def with_rope_theta(trunk: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a text_config with the base of its rotary embedding, if it has none."""
    values = dict(trunk)
    parameters = values.get("rope_parameters")
    if parameters and parameters.get("rope_theta") is not None:
        return values
    if parameters:
        values["rope_parameters"] = dict(parameters) | {"rope_theta": ROPE_THETA}
    elif values.get("rope_theta") is None:
        values["rope_theta"] = ROPE_THETA
    return values


def config_problems(folder: Path, values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a config.json; empty if the model can be built from it."""
    where = folder / "config.json"
    problems = []
    for section, names in _WHOLE_NUMBERS.items():
        found = values.get(section)
        if not isinstance(found, Mapping):
            problems.append(f"{where}: {section} is {found!r}; it must be an object")
            continue
        problems += [
            f"{where}: {section}.{name} is {found.get(name)!r}; it must be a whole number above 0"
            for name in names
            if type(found.get(name)) is not int or found[name] < 1
        ]
    if problems:
        return problems
    trunk, audio = values["text_config"], values["audio_encoder_config"]
    if trunk.get("model_type", "qwen3") != "qwen3":
        problems.append(f"{where}: text_config.model_type is {trunk['model_type']!r}; the trunk must be a 'qwen3'")
    if audio.get("encoder_type", "discrete") != "discrete":
        problems.append(
            f"{where}: audio_encoder_config.encoder_type is {audio['encoder_type']!r}; this trainer supports models "
            "that speak, which have 'discrete'"
        )
    if audio.get("out_dim") not in (None, trunk["hidden_size"]):
        problems.append(
            f"{where}: audio_encoder_config.out_dim is {audio['out_dim']}; it must be the trunk's hidden_size, "
            f"{trunk['hidden_size']}"
        )
    return problems


def tokenizer_problems(folder: Path, tokenizer: TextEncoder, required: tuple[str, ...], vocab_size: int) -> list[str]:
    """Return why a tokenizer does not fit: special tokens are missing, or have ids that the model does not have."""
    ids = {token: tokenizer.token_to_id(token) for token in required}
    missing = [token for token, number in ids.items() if number is None]
    if missing:
        return [f"{folder}: its tokenizer has no {', '.join(missing)}"]
    return [
        f"{folder}: {token} is {number} in the tokenizer, but the model has only {vocab_size} text tokens"
        for token, number in ids.items()
        if number is not None and number >= vocab_size
    ]
