"""Convert tensor names and configurations between the two layouts of Higgs Audio v2.

transformers reads the layout `native` (`model_type` higgs_audio_v2), boson_multimodal reads `original` (higgs_audio).
The tensors are identical in both. Tests compare the native model with numbers from the original runtime.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.model.parts import EXTENDED_TYPE, TOWER_GEOMETRY
from higgs_ds.options.fields import NATIVE, ORIGINAL

MODEL_TYPES = {"higgs_audio_v2": NATIVE, EXTENDED_TYPE: NATIVE, "higgs_audio": ORIGINAL}
# Name prefixes in the original layout, and the corresponding prefixes in the native layout.
_PREFIXES = {
    "embed_tokens.": "model.embed_tokens.",
    "layers.": "model.layers.",
    "norm.": "model.norm.",
    "audio_tower.": "model.audio_tower.",
    "audio_encoder_proj.": "model.audio_encoder_proj.",
    "audio_codebook_embeddings.": "model.embed_audio_tokens.embed_audio_tokens.",
    "audio_decoder_proj.audio_lm_head.": "audio_lm_head.",
    "audio_decoder_proj.text_lm_head.": "text_lm_head.",
}
# Tensors that the original recomputes, or that only its training used.
_DROPPED = re.compile(r"^audio_codebook_weights$|rotary_emb\.(original_)?inv_freq$")
# The original may split a tensor's rows into two tensors: frozen rows, followed by trainable rows.
_SPLIT_ROWS = re.compile(r"^(?P<whole>.+)\.(embedding|linear)_(?P<part>frozen|trainable)\.(?P<leaf>weight|bias)$")
# A native checkpoint may still contain these copies of the heads in addition to the heads themselves.
DUPLICATE_PREFIX = "audio_decoder_proj."
DUPLICATE_HEADS = (f"{DUPLICATE_PREFIX}audio_lm_head.weight", f"{DUPLICATE_PREFIX}text_lm_head.weight")


def native_name(name: str) -> str | None:
    """Return the native name of an original tensor; None for a dropped one. Raises KeyError for an unknown one."""
    if _DROPPED.search(name):
        return None
    part = _SPLIT_ROWS.match(name)
    if part:
        name = f"{part['whole']}.{part['leaf']}"
    for original, native in _PREFIXES.items():
        if name.startswith(original):
            return native + name.removeprefix(original)
    raise KeyError(name)


def part_of_rows(name: str) -> int:
    """Return the order of a tensor among those with the same native name: 0 for its first rows, 1 for the last."""
    part = _SPLIT_ROWS.match(name)
    return int(part is not None and part["part"] == "trainable")


def original_name(name: str) -> str | None:
    """Return the original name of a native tensor; None for a copy of a head. Raises KeyError for an unknown one."""
    if name in DUPLICATE_HEADS:
        return None
    for original, native in _PREFIXES.items():
        if name.startswith(native):
            return original + name.removeprefix(native)
    raise KeyError(name)


# Flags of the original configuration that change the model, with the supported values.
_SUPPORTED_FLAGS = {
    "use_delay_pattern": (True,),
    "audio_embed_avg": (False,),
    "use_rq_transformer": (False, None),
    "use_audio_out_embed_projector": (False, None),
    "audio_decoder_proj_num_layers": (0, None),
    "encode_audio_in_tokens": (True,),
}
# Fields of the decoder, with the same names in both layouts.
_DECODER_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "max_position_embeddings", "attention_bias",
    "attention_dropout", "mlp_bias", "initializer_range",
)  # fmt: skip


def native_config(original: Mapping[str, Any], token_ids: Mapping[str, int], where: str) -> dict[str, Any]:
    """Convert an original config.json to a native one.

    Args:
        token_ids: ids of the tokenizer's special tokens; missing ids are taken from the configuration.
        where: name of the configuration in error messages.

    Raises:
        InputError: a model of the family that is not supported; each unsupported flag is reported.
    """
    text = original.get("text_config") or {}
    layers = text.get("num_hidden_layers")
    problems = [
        f"{where}: {flag} is {original.get(flag)!r}; this trainer supports only {' or '.join(map(repr, values))}"
        for flag, values in _SUPPORTED_FLAGS.items()
        if original.get(flag, values[-1]) not in values
    ]
    adapter_type = original.get("audio_adapter_type")
    if not str(adapter_type).startswith("dual_ffn"):
        problems.append(f"{where}: audio_adapter_type is {adapter_type!r}, not dual_ffn or dual_ffn_fast_forward")
    elif sorted(original.get("audio_dual_ffn_layers") or ()) != list(range(layers or 0)):
        problems.append(f"{where}: audio_dual_ffn_layers must list all {layers} layers")
    has_tower = not original.get("skip_audio_tower", False)
    if has_tower and not original.get("encode_whisper_embed", True):
        problems.append(
            f"{where}: encode_whisper_embed is False, but the model has a tower; set skip_audio_tower to true"
        )
    encoder = (original.get("audio_encoder_config") or {}) if has_tower else {}
    missing = [name for name in _DECODER_FIELDS[:6] if name not in text]
    missing += [f"audio_encoder_config.{name}" for name in TOWER_GEOMETRY[:6] if has_tower and name not in encoder]
    missing += [name for name in ("audio_num_codebooks", "audio_codebook_size") if name not in original]
    problems += [f"{where}: {name} is missing" for name in missing]
    if problems:
        raise InputError(problems)
    audio_bos = original.get("audio_out_bos_token_id", token_ids.get("<|audio_out_bos|>"))
    ids = {
        "audio_token_id": original.get("audio_out_token_idx"),
        "audio_bos_token_id": audio_bos,
        "audio_delay_token_id": token_ids.get("<|reserved_special_token_6|>", (audio_bos or 0) + 1),
        "bos_token_id": token_ids.get("<|begin_of_text|>", text.get("bos_token_id")),
        "eos_token_id": token_ids.get("<|eot_id|>", text.get("eos_token_id")),
        "pad_token_id": original.get("pad_token_id"),
        "audio_stream_bos_id": original.get("audio_stream_bos_id"),
        "audio_stream_eos_id": original.get("audio_stream_eos_id"),
    }
    has_attention = bool(original.get("use_audio_out_self_attention"))
    extended = {
        "architectures": ["ExtendedModel"],
        "model_type": EXTENDED_TYPE,
        "audio_self_attention": has_attention,
        "audio_tower": {name: encoder[name] for name in TOWER_GEOMETRY if name in encoder} if has_tower else None,
        "audio_in_token_id": original.get("audio_in_token_idx", token_ids.get("<|AUDIO|>")),
    }
    return {
        "architectures": ["HiggsAudioV2ForConditionalGeneration"],
        "model_type": "higgs_audio_v2",
        "dtype": original.get("torch_dtype") or text.get("torch_dtype") or "bfloat16",
        "num_codebooks": original["audio_num_codebooks"],
        # The stream's BOS and EOS are codes, too.
        "codebook_size": original["audio_codebook_size"] + 2,
        "rope_parameters": {**(text.get("rope_scaling") or {"rope_type": "default"}),
                            "rope_theta": text.get("rope_theta", 500000.0)},
        "tie_word_embeddings": False,
        **{name: text[name] for name in _DECODER_FIELDS if name in text},
        **{name: value for name, value in ids.items() if value is not None},
        **(extended if has_attention or has_tower else {}),
    }  # fmt: skip


def original_config(native: Mapping[str, Any], token_ids: Mapping[str, int]) -> dict[str, Any]:
    """Convert a native config.json to an original one, with the flags of the released model and its optional parts."""
    rope = dict(native.get("rope_parameters") or {})
    tower = native.get("audio_tower")
    theta = rope.pop("rope_theta", 500000.0)
    audio_bos = native["audio_bos_token_id"]
    return {
        "architectures": ["HiggsAudioModel"],
        "model_type": "higgs_audio",
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": list(range(native["num_hidden_layers"])),
        "audio_decoder_proj_num_layers": 0,
        "audio_embed_avg": False,
        "audio_ffn_hidden_size": native["hidden_size"],
        "audio_ffn_intermediate_size": native["intermediate_size"],
        "audio_num_codebooks": native["num_codebooks"],
        "audio_codebook_size": native["codebook_size"] - 2,
        "audio_stream_bos_id": native["audio_stream_bos_id"],
        "audio_stream_eos_id": native["audio_stream_eos_id"],
        "audio_in_token_idx": token_ids.get("<|AUDIO|>", native["audio_token_id"] - 1),
        "audio_out_token_idx": native["audio_token_id"],
        "audio_out_bos_token_id": audio_bos,
        "audio_eos_token_id": token_ids.get("<|audio_eos|>", audio_bos - 1),
        "encode_audio_in_tokens": True,
        "encode_whisper_embed": tower is not None,
        "skip_audio_tower": tower is None,
        **({} if tower is None else {"audio_encoder_config": {"model_type": "higgs_audio_encoder", **tower}}),
        "use_audio_out_embed_projector": False,
        "use_audio_out_self_attention": native.get("audio_self_attention", False),
        "use_delay_pattern": True,
        "use_rq_transformer": False,
        "pad_token_id": native["pad_token_id"],
        "torch_dtype": native.get("dtype", "bfloat16"),
        "text_config": {
            "model_type": "llama",
            **{name: native[name] for name in _DECODER_FIELDS if name in native},
            "rope_scaling": rope,
            "rope_theta": theta,
            "torch_dtype": native.get("dtype", "bfloat16"),
            **{name: native[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in native},
        },
    }
