"""The configuration of a model, with its optional parts, as an object of transformers' classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, HiggsAudioV2Config, WhisperConfig

from higgs_ds.common.errors import InputError
from higgs_ds.model.layouts import TOWER_GEOMETRY, read_native_config
from higgs_ds.model.parts import Parts
from higgs_ds.options.train import ModelOptions


@strict
class ExtendedConfig(HiggsAudioV2Config):
    """A native configuration with optional parts.

    audio_self_attention: whether the layers have attention among audio positions.
    audio_tower: geometry of Whisper's encoder.
    audio_in_token_id: the text token whose embeddings are replaced by the tower's outputs.
    """

    model_type = "higgs_audio_v2_extended"

    audio_self_attention: bool = False
    audio_tower: dict[str, Any] | None = None
    audio_in_token_id: int | None = None


AutoConfig.register(ExtendedConfig.model_type, ExtendedConfig)  # AutoTokenizer looks it up


def read_config(folder: Path, asked_by: str = "--base_ckpt") -> HiggsAudioV2Config:
    """Read the configuration of a base in either layout. Raises InputError, prefixed `asked_by`, for other folders."""
    return config_of(read_native_config(folder, asked_by))


def config_of(values: dict[str, Any]) -> HiggsAudioV2Config:
    """Return the configuration, of the class it needs, from the values of a native config.json."""
    is_extended = values.get("model_type") == ExtendedConfig.model_type
    return (ExtendedConfig if is_extended else HiggsAudioV2Config).from_dict(values)


def parts_of(config: HiggsAudioV2Config) -> Parts:
    """Return the optional parts of a model."""
    if not isinstance(config, ExtendedConfig):
        return Parts()
    return Parts(config.audio_self_attention, config.audio_tower)


def with_parts(config: HiggsAudioV2Config, added: Parts) -> HiggsAudioV2Config:
    """Return a configuration with `added` parts, or the same object if there are none."""
    return _extended(config, added) if added else config


def ready_for_parts(config: HiggsAudioV2Config, added: Parts) -> HiggsAudioV2Config:
    """Return a configuration with its present parts, of a class that the `added` parts can be added to later."""
    return _extended(config, Parts()) if added else config


def _extended(config: HiggsAudioV2Config, added: Parts) -> HiggsAudioV2Config:
    values = config.to_dict() | {"model_type": ExtendedConfig.model_type}
    values["audio_self_attention"] = added.audio_self_attention or values.get("audio_self_attention", False)
    values["audio_tower"] = added.audio_tower or values.get("audio_tower")
    # In all models of the family, it is the id before that of the token for generated audio.
    values["audio_in_token_id"] = values.get("audio_in_token_id") or config.audio_token_id - 1
    return config_of(values)


def tower_geometry(whisper_folder: Path) -> dict[str, Any]:
    """Read the geometry of a Whisper model's encoder. Raises InputError, naming --whisper_ckpt, for other folders."""
    path = whisper_folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("model_type") != "whisper":
        raise InputError(
            f"--whisper_ckpt {whisper_folder}: model_type is {config.get('model_type')!r}; the tower is made from the "
            "encoder of a Whisper model"
        )
    whisper = WhisperConfig(**config)
    return {name: getattr(whisper, name) for name in TOWER_GEOMETRY}


def parts_to_add(
    options: ModelOptions, has: Parts, find_whisper: Callable[[str, str], Path]
) -> tuple[Parts, Path | None]:
    """Return the parts that are requested but missing in a base, and the folder of the Whisper model for a tower.

    Args:
        has: the parts of the base.
        find_whisper: returns the folder of a model name; its second argument is the option named in errors.
    """
    folder, tower = None, None
    if options.whisper_conditioning and has.audio_tower is None:
        folder = find_whisper(options.whisper_ckpt, "--whisper_ckpt")
        tower = tower_geometry(folder)
    return Parts(options.audio_self_attention, tower).without(has), folder


def fully_trained_parts(options: ModelOptions, config: HiggsAudioV2Config) -> Parts:
    """Return the optional parts of a model that are fully trained."""
    return Parts(options.audio_self_attention, parts_of(config).audio_tower if options.whisper_conditioning else None)
