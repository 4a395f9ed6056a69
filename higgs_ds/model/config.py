"""The configuration of a model of any family, with its optional parts, as an object of transformers' classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import WhisperConfig

from higgs_ds.common.errors import InputError
from higgs_ds.model.families import family_of, read_native_config
from higgs_ds.model.parts import TOWER_GEOMETRY, Parts, parts_of
from higgs_ds.options.train import ModelOptions


def read_config(folder: Path, asked_by: str = "--base_ckpt") -> Any:
    """Read the configuration of a base in any layout. Raises InputError, prefixed `asked_by`, for other folders."""
    return config_of(read_native_config(folder, asked_by))


def config_of(values: Mapping[str, Any]) -> Any:
    """Return the configuration, of the class it needs, from the values of a native config.json."""
    return family_of(values["model_type"]).config_of(values)


def with_parts(config: Any, added: Parts) -> Any:
    """Return a configuration with `added` parts, or the same object if there are none. Raises InputError."""
    return family_of(config.model_type).with_parts(config, added)


def ready_for_parts(config: Any, added: Parts) -> Any:
    """Return a configuration with its present parts, of a class that the `added` parts can be added to later."""
    return family_of(config.model_type).ready_for_parts(config, added)


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


def fully_trained_parts(options: ModelOptions, config: Any) -> Parts:
    """Return the optional parts of a model that are fully trained."""
    return Parts(options.audio_self_attention, parts_of(config).audio_tower if options.whisper_conditioning else None)
