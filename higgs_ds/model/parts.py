"""Optional parts of the model: audio self-attention and a Whisper tower.

Both come from the original model (boson_multimodal); the released base has neither. Audio self-attention: in each
layer, audio positions first attend only to earlier audio positions. Whisper tower: Whisper's encoder encodes the clips
of system and user turns, and its outputs take text positions before the codes of these clips.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXTENDED_TYPE = "higgs_audio_v2_extended"  # model_type of a model with native names and optional parts
# Last components of the module names of each part.
ATTENTION_MODULES = ("audio_attn", "audio_post_audio_attn_layer_norm")
TOWER_MODULES = ("audio_tower", "audio_encoder_proj")
# Fields that determine the shapes and the computation of the tower.
TOWER_GEOMETRY = (
    "num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "max_source_positions",
    "activation_function", "dropout", "attention_dropout", "activation_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The optional parts that a model has, or those of them that are fully trained."""

    audio_self_attention: bool = False
    audio_tower: dict[str, Any] | None = None

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __bool__(self) -> bool:
        return self.audio_self_attention or self.audio_tower is not None

    @property
    def modules(self) -> list[str]:
        """Last components of the names of the parts' modules."""
        attention = ATTENTION_MODULES if self.audio_self_attention else ()
        return sorted([*attention, *(TOWER_MODULES if self.audio_tower is not None else ())])

    def has(self, name: str) -> bool:
        """Return whether a parameter belongs to one of the parts."""
        return not set(self.modules).isdisjoint(name.split("."))

    def without(self, others: Parts) -> Parts:
        """Return the parts that are not in `others`."""
        tower = self.audio_tower if others.audio_tower is None else None
        return Parts(self.audio_self_attention and not others.audio_self_attention, tower)

    def __str__(self) -> str:
        names = {"audio self-attention": self.audio_self_attention, "Whisper tower": self.audio_tower is not None}
        return ", ".join(name for name, is_present in names.items() if is_present) or "none"

    def to_json(self) -> str:
        return json.dumps(self.__dict__, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Parts:
        """Read `to_json`. Raises ValueError or TypeError if another version wrote it."""
        return cls(**json.loads(text))


NO_PARTS = Parts()


def parts_in(values: Mapping[str, Any]) -> Parts:
    """Return the optional parts of a model, from the values of a native config.json."""
    if values.get("model_type") != EXTENDED_TYPE:
        return NO_PARTS
    return Parts(values.get("audio_self_attention", False), values.get("audio_tower"))


def parts_of(config: Any) -> Parts:
    """Return the optional parts of a model, from its configuration object."""
    if config.model_type != EXTENDED_TYPE:
        return NO_PARTS
    return Parts(config.audio_self_attention, config.audio_tower)
