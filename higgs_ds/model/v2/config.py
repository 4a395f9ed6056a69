"""The configuration of Higgs Audio v2 with its optional parts, as an object of transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, HiggsAudioV2Config

from higgs_ds.model.parts import EXTENDED_TYPE, Parts


@strict
class ExtendedConfig(HiggsAudioV2Config):
    """A native configuration with optional parts.

    audio_self_attention: whether the layers have attention among audio positions.
    audio_tower: geometry of Whisper's encoder.
    audio_in_token_id: the text token whose embeddings are replaced by the tower's outputs.
    """

    model_type = EXTENDED_TYPE

    audio_self_attention: bool = False
    audio_tower: dict[str, Any] | None = None
    audio_in_token_id: int | None = None


AutoConfig.register(ExtendedConfig.model_type, ExtendedConfig)  # AutoTokenizer looks it up


def config_of(values: Mapping[str, Any]) -> HiggsAudioV2Config:
    """Return the configuration, of the class it needs, from the values of a native config.json."""
    is_extended = values.get("model_type") == ExtendedConfig.model_type
    return (ExtendedConfig if is_extended else HiggsAudioV2Config).from_dict(dict(values))


def extended(config: HiggsAudioV2Config, added: Parts) -> HiggsAudioV2Config:
    """Return a configuration of the extended class with `added` parts."""
    values = config.to_dict() | {"model_type": ExtendedConfig.model_type}
    values["audio_self_attention"] = added.audio_self_attention or values.get("audio_self_attention", False)
    values["audio_tower"] = added.audio_tower or values.get("audio_tower")
    # In all models of the family, it is the id before that of the token for generated audio.
    values["audio_in_token_id"] = values.get("audio_in_token_id") or config.audio_token_id - 1
    return config_of(values)
