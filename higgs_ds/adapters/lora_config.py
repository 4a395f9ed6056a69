"""Read an adapter's adapter_config.json, and refuse what cannot be merged. Does not import PEFT, which takes seconds.

Tests compare the tables and defaults with PEFT 0.21.2, which wrote or will read the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PEFT_VERSION = "0.21.2"
# Keys that change what an adapter computes, with the only value that can be merged. Empty values are equivalent to it.
PLAIN = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "layer_replication": None,
    "trainable_token_indices": None, "target_parameters": None, "use_qalora": False, "velora_config": None,
    "alora_invocation_tokens": None, "monteclora_config": None, "use_bdlora": None, "arrow_config": None,
    "kasa_config": None,
}  # fmt: skip
# Keys that do not change what the tensors of a saved adapter compute.
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Initializations by name. The first kind leaves the base's weights unchanged, as True and False do.
_KEEPS_BASE = re.compile(r"gaussian|eva|orthogonal|mica", re.IGNORECASE)
_CHANGES_BASE = re.compile(r"pissa(_niter_\d+)?|corda.*|olora|lora_ga|loftq", re.IGNORECASE)


@dataclass(frozen=True)
class LoraValues:
    """The values that decide how an adapter's tensors are used. The defaults are PEFT's."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> LoraValues:
        """Take the values from the content of adapter_config.json, unchecked."""
        return cls(**{f.name: written[f.name] for f in fields(cls) if f.name in written})

    def rank(self, layer: str) -> int:
        """Return the rank of a layer, given by its name in the model."""
        return _value_for(layer, self.rank_pattern, self.r)

    def alpha(self, layer: str) -> float:
        """Return the numerator of the factor of B A in a layer."""
        return _value_for(layer, self.alpha_pattern, self.lora_alpha)

    def scaling(self, layer: str) -> float:
        """Return the factor of B A in a layer."""
        rank = self.rank(layer)
        return self.alpha(layer) / (math.sqrt(rank) if self.use_rslora else rank)


def _value_for(layer: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """Return the value of the first expression that matches a layer's name or its end."""
    return next((value for key, value in pattern.items() if re.match(_expression(key), layer)), default)


def _expression(key: str) -> str:
    """Return the regular expression that PEFT's `get_pattern_key` makes of a key of a pattern."""
    return rf"(.*\.)?({key})$"


def find_problems(written: Mapping[str, Any], full_modules: list[str]) -> list[str]:
    """Return why an adapter with this adapter_config.json cannot be merged. Each problem begins with a key.

    Args:
        full_modules: modules that this trainer has stored with the adapter, which `modules_to_save` then lists.
    """
    plain = PLAIN | {"modules_to_save": full_modules or None}
    problems = [
        f"{key} is {written[key]!r}, which cannot be merged here; plain LoRA, rsLoRA and DoRA can"
        for key, value in plain.items()
        if key in written and written[key] != value and (written[key] or value)
    ]
    known = plain.keys() | WITHOUT_EFFECT | {f.name for f in fields(LoraValues)}
    problems += [
        f"{key} is {value!r}, a setting that PEFT {PEFT_VERSION} does not have, so that its effect is unknown"
        for key, value in written.items()
        if value and key not in known
    ]
    values = LoraValues.of(written)
    problems += _wrong_numbers("r", values.r, "rank_pattern", values.rank_pattern, _is_rank, "a whole number above 0")
    problems += _wrong_numbers(
        "lora_alpha", values.lora_alpha, "alpha_pattern", values.alpha_pattern, _is_number, "a number"
    )
    switches = {"use_rslora": values.use_rslora, "use_dora": values.use_dora, "lora_bias": values.lora_bias}
    problems += [
        f"{key} is {value!r}; it must be true or false" for key, value in switches.items() if not _is_bool(value)
    ]
    return problems + _wrong_initialization(values.init_lora_weights)


def _wrong_numbers(
    key: str, value: Any, pattern_key: str, pattern: Any, is_valid: Callable[[Any], bool], kind: str
) -> list[str]:
    problems = [] if is_valid(value) else [f"{key} is {value!r}; it must be {kind}"]
    if not isinstance(pattern, dict):
        return [*problems, f"{pattern_key} is {pattern!r}; it must be a JSON object"]
    problems += [f"{pattern_key}: {k!r} is {v!r}; it must be {kind}" for k, v in pattern.items() if not is_valid(v)]
    return problems + [f"{pattern_key}: {k!r} is not a regular expression" for k in pattern if not _is_expression(k)]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not _is_bool(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not _is_bool(value) and math.isfinite(value)


def _is_expression(text: str) -> bool:
    try:
        re.compile(_expression(text))
    except re.error:
        return False
    return True


def _wrong_initialization(value: Any) -> list[str]:
    """Return why the adapter does not belong to the base as it was before the initialization, if it does not."""
    if value is None or _is_bool(value) or (isinstance(value, str) and _KEEPS_BASE.fullmatch(value)):
        return []
    if not isinstance(value, str) or not _CHANGES_BASE.fullmatch(value):
        return [
            f"init_lora_weights is {value!r}, an initialization that PEFT {PEFT_VERSION} does not have, so that it is "
            "unknown whether it changed the base's weights"
        ]
    return [
        f"init_lora_weights is {value!r}: it changed the base's weights before training, and the adapter belongs to "
        f"the changed weights; {_remedy(value.lower())}"
    ]


def _remedy(initialization: str) -> str:
    """Return how to make something that can be used of an adapter that belongs to changed weights.

    PEFT changes the weights again when it loads an adapter, but in the same way only with pissa, olora and loftq.
    """
    convert = (
        "convert it to plain LoRA with PEFT: save_pretrained(NEW_FOLDER, path_initial_model_for_weight_conversion="
        "INITIAL_FOLDER), where INITIAL_FOLDER is the adapter saved before its first training step"
    )
    merge = "merge it with PEFT: PeftModel.from_pretrained, merge_and_unload() and save_pretrained"
    if initialization == "loftq":
        return f"PEFT cannot convert it to plain LoRA; {merge}"
    return f"{convert}. Without INITIAL_FOLDER, {merge}" if initialization in ("pissa", "olora") else convert
