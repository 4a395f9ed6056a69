"""The families of models that this project knows, and which of them a base, a weight or a configuration is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.model.family import Family
from higgs_ds.model.v2.family import HiggsAudioV2
from higgs_ds.model.v3.family import HiggsAudioV3
from higgs_ds.options.fields import NATIVE

FAMILIES: tuple[Family, ...] = (HiggsAudioV2(), HiggsAudioV3())
MODEL_TYPES = {model_type: layout for family in FAMILIES for model_type, layout in family.model_types.items()}
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
CODEC_TYPE = "higgs_audio_v2_tokenizer"


def family_of(model_type: str) -> Family:
    """Return the family of a `model_type` in a config.json that `read_json_config` has accepted."""
    return _BY_TYPE[model_type]


def family_of_weight(name: str) -> Family:
    """Return the family that a native model with a weight of this name belongs to.

    Raises:
        KeyError: no family has such a weight.
    """
    for family in FAMILIES:
        if name.startswith(family.name_prefixes):
            return family
    raise KeyError(name)


def native_name(name: str) -> str | None:
    """Return a weight's native name, given its name in any layout of any family.

    None if the native layout does not need it.

    Raises:
        KeyError: no layout has such a weight.
    """
    for family in FAMILIES:
        try:
            return family.native_name(name)
        except KeyError:
            continue
    raise KeyError(name)


def read_json_config(folder: Path, asked_by: str) -> dict[str, Any]:
    """Read a model's config.json in any layout. Raises InputError, prefixed `asked_by`, for any other folder."""
    path, where = folder / "config.json", f"{asked_by} {folder}"
    expected = "; ".join(
        f"a {family.title} model has "
        + " or ".join(f"'{model_type}' ({layout})" for model_type, layout in family.model_types.items())
        for family in FAMILIES
    )
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{where}: is an adapter; give the base that it was trained on")
    if not path.is_file():
        run = "; it holds checkpoints of a run" if any(folder.glob("checkpoint-*")) else ""
        raise InputError(f"{where}: is not a model folder: it has no config.json{run}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: its config.json is not a JSON object: {error}") from error
    if model_type == CODEC_TYPE:
        raise InputError(f"{where}: is an audio codec, which --codec_ckpt takes; {expected}")
    if model_type not in MODEL_TYPES:
        raise InputError(f"{where}: model_type is {model_type!r}; {expected}")
    if "quantization_config" in config:
        raise InputError(f"{where}: its weights are quantized; give the unquantized base (and --load_in_4bit)")
    return config


def read_native_config(folder: Path, asked_by: str) -> dict[str, Any]:
    """Return the values of a model's config.json in the native layout. Raises as `read_json_config`."""
    config = read_json_config(folder, asked_by)
    if MODEL_TYPES[config["model_type"]] == NATIVE:
        return config
    family = family_of(config["model_type"])
    return family.native_config(config, special_tokens(folder), str(folder / "config.json"))


def special_tokens(folder: Path) -> dict[str, int]:
    """Return the ids of the tokenizer's special tokens by token; empty if there is no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    tokens = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    return {token["content"]: token["id"] for token in tokens}
