"""The keys of DeepSpeed JSON files that this trainer knows, and the values that each may have. Imports no DeepSpeed.

DeepSpeed 0.19.8 has pydantic models for `zero_optimization`, `bf16` and `fp16`. It does not check other values, and
fails where it uses them: `"steps_per_print": "inf"` in the first step. Values of the models are converted here as
pydantic does ("true", "5000000", 5e8), and the tests compare the result with the models. The differences:

- true and false are not numbers; pydantic reads them as 1 and 0.
- Whole floats of any size are integers; pydantic converts them only below 2**63.
- Values that DeepSpeed accepts and fails on later are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from higgs_ds.common.precision import AUTO

LARGEST_SIZE = 2**63 - 1  # elements of a tensor
_INTEGER = re.compile(r"\s*([+-]?[0-9]+(?:_[0-9]+)*)(?:\.0+)?\s*")
_SWITCHES = dict.fromkeys(("false", "f", "no", "n", "off", "0"), False) | dict.fromkeys(
    ("true", "t", "yes", "y", "on", "1"), True
)


@dataclass(frozen=True)
class Kind:
    """What a value may be."""

    allowed: str  # after "must be"
    convert: Callable[[Any], Any]  # returns the value for DeepSpeed, None for its default; raises ValueError
    auto: bool = False  # whether "auto" is allowed
    null: bool = False  # whether null is allowed, which is the same as no key
    advice: str = ""

    def problem(self, value: Any) -> str:
        """Return what is wrong with a value that is not allowed."""
        if value == AUTO:
            return f'"auto" has no meaning here; must be {self.allowed}'
        if value is None:
            advice = "leave the key out for the default"
        elif isinstance(value, str) and self._is_right_without_quotes(value):
            advice = "write it without quotes"
        else:
            advice = self.advice
        return f"must be {self.allowed}; is {shown(value)}" + (f"; {advice}" if advice else "")

    def _is_right_without_quotes(self, text: str) -> bool:
        try:
            self.convert(json.loads(text.lower()))
        except (ValueError, OverflowError, RecursionError):
            return False
        return True


def shown(value: Any) -> str:
    """Return a value for a message, in JSON's spelling."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _switch(value: Any) -> bool:
    """Convert a switch as pydantic does."""
    if isinstance(value, str) and value.lower() in _SWITCHES:
        return _SWITCHES[value.lower()]
    return _flag(value)


def _flag(value: Any) -> bool:
    """Convert a switch that no model of DeepSpeed checks: text would be used as true, or fail."""
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    raise ValueError


def _off(value: Any) -> bool:
    if _switch(value):
        raise ValueError
    return False


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError
    if isinstance(value, float) and not value.is_integer():  # NaN and infinity are not integers either
        raise ValueError
    return int(value)


def _model_integer(value: Any) -> int:
    """Convert an integer of DeepSpeed's models as pydantic does."""
    if isinstance(value, str):
        match = _INTEGER.fullmatch(value)
        if match is None:
            raise ValueError
        return int(match.group(1))
    return _integer(value)


def _loss_scale_integer(value: Any) -> int:
    return _model_integer(int(value) if isinstance(value, str) else value)  # the model refuses "5.0" for these


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _loss_scale(value: Any) -> float:
    return _number(float(value) if isinstance(value, str) else value)


def _print_interval(value: Any) -> int | None:
    """Convert a number of steps. accelerate writes Infinity, which Python's JSON module reads and writes, for never."""
    return None if isinstance(value, float) and value == math.inf else _integer(value)


def _within(convert: Callable[[Any], Any], least: float, most: float = math.inf) -> Callable[[Any], Any]:
    def convert_and_compare(value: Any) -> Any:
        converted = convert(value)
        if converted is not None and not least <= converted <= most:
            raise ValueError
        return converted

    return convert_and_compare


def _positive(value: Any) -> float:
    number = _number(value)
    if number <= 0:
        raise ValueError
    return number


def _size(least: int, most: float = math.inf) -> Kind:
    """Return a size of DeepSpeed's ZeRO model, in elements."""
    limit = "" if most == math.inf else f", below {most + 1:.1e}"
    return Kind(f"a whole number, {least} or more{limit}", _within(_model_integer, least, most))


def _choice(names: Mapping[str, str], any_case: bool = False) -> Kind:
    """Return a choice of names, each given with the name that DeepSpeed or this trainer is passed."""

    def convert(value: Any) -> str:
        name = value.lower() if any_case and isinstance(value, str) else value
        if not isinstance(name, str) or name not in names:
            raise ValueError
        return names[name]

    distinct = [shown(name) for name in dict.fromkeys(names.values())]
    return Kind(f"{', '.join(distinct[:-1])} or {distinct[-1]}", convert)


def _stage(value: Any) -> int:
    return int(_within(_model_integer, 0, 3)(value))


SWITCH = Kind("true or false", _switch)
AUTO_SWITCH = replace(SWITCH, allowed='true, false or "auto"', auto=True)
FLAG = Kind("true or false", _flag, null=True)
COUNT = Kind('a whole number, 1 or more, or "auto"', _within(_integer, 1), auto=True, null=True)
NOT_NEGATIVE = Kind('a number, 0 or more, or "auto"', _within(_number, 0), auto=True, null=True)
FIXED = Kind("", lambda value: value, auto=True, null=True)  # compared with the one value that this trainer uses
OFFLOAD = {"device": _choice({"cpu": "cpu", "none": "none"}), "pin_memory": SWITCH}
COMMUNICATION_TYPES = {name: name for name in ("fp32", "bf16", "fp16")}
ACCUMULATION_TYPES = {
    alias: name
    for name, aliases in {
        "fp32": ("fp32", "float32", "float", "torch.float32"),
        "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
        "fp16": ("fp16", "float16", "half", "torch.float16"),
    }.items()
    for alias in aliases
}
KNOWN_KEYS: dict[str, Any] = {
    "train_batch_size": COUNT,
    "train_micro_batch_size_per_gpu": COUNT,
    "gradient_accumulation_steps": COUNT,
    "gradient_clipping": NOT_NEGATIVE,
    "bf16": {"enabled": AUTO_SWITCH},
    "fp16": {
        "enabled": AUTO_SWITCH,
        "auto_cast": Kind("false", _off, advice="inputs are never cast here, the model's weights are (--precision)"),
        "loss_scale": Kind("a number, 0 or more", _within(_loss_scale, 0)),
        "initial_scale_power": Kind("a whole number from 0 to 32", _within(_model_integer, 0, 32)),
        "loss_scale_window": Kind("a whole number, 1 or more", _within(_loss_scale_integer, 1)),
        "hysteresis": Kind("a whole number, 1 or more", _within(_model_integer, 1)),
        "consecutive_hysteresis": SWITCH,
        "min_loss_scale": Kind("a whole number, 1 or more", _within(_loss_scale_integer, 1)),
        "fp16_master_weights_and_grads": Kind("false", _off, advice="master weights are in float32"),
    },
    "optimizer": {
        "type": replace(
            _choice({"adamw": "AdamW", "adam": "Adam"}, any_case=True),
            advice="the optimizer is AdamW",
            auto=True,
            null=True,
        ),
        "params": {
            "lr": Kind('a number above 0, or "auto"', _positive, auto=True, null=True),
            "betas": FIXED,
            "eps": FIXED,
            "weight_decay": NOT_NEGATIVE,
        },
    },
    "zero_optimization": {
        "stage": Kind("0, 1, 2 or 3", _stage),
        "allgather_bucket_size": replace(_size(0), auto=True),
        "allgather_partitions": SWITCH,
        "contiguous_gradients": SWITCH,
        "ignore_unused_parameters": SWITCH,
        "offload_optimizer": OFFLOAD,
        "offload_param": OFFLOAD,
        "overlap_comm": replace(SWITCH, null=True),
        "reduce_bucket_size": replace(_size(1, LARGEST_SIZE), auto=True),
        "reduce_scatter": SWITCH,
        "round_robin_gradients": SWITCH,
        "stage3_gather_16bit_weights_on_model_save": SWITCH,
        "stage3_max_live_parameters": _size(0),
        "stage3_max_reuse_distance": _size(0),
        "stage3_model_persistence_threshold": _size(0),
        "stage3_param_persistence_threshold": replace(_size(0), auto=True),
        "stage3_prefetch_bucket_size": replace(_size(0), auto=True),
        "sub_group_size": _size(0),
    },
    "activation_checkpointing": {
        "partition_activations": FLAG,
        "contiguous_memory_optimization": FLAG,
        "cpu_checkpointing": FLAG,
        "number_checkpoints": Kind("a whole number, 0 or more", _within(_integer, 0), null=True),
        "synchronize_checkpoint_boundary": FLAG,
        "profile": FLAG,
    },
    "communication_data_type": replace(_choice(COMMUNICATION_TYPES, any_case=True), null=True),
    "data_types": {"grad_accum_dtype": replace(_choice(ACCUMULATION_TYPES), null=True)},
    "steps_per_print": Kind(
        "a whole number, 1 or more", _within(_print_interval, 1), null=True, advice="leave it out to print nothing"
    ),
    "wall_clock_breakdown": replace(FLAG, null=False),
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
}
# Sections that may be null, which is the same as no section.
NULL_SECTIONS = {
    ("bf16",),
    ("optimizer", "params"),
    ("zero_optimization", "offload_optimizer"),
    ("zero_optimization", "offload_param"),
}
