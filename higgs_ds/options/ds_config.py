"""Read DeepSpeed JSON files, check all keys and values, and reconcile them with the options. Imports no DeepSpeed.

A bare DeepSpeed engine does not resolve "auto", ignores most unknown keys, uses many values unchecked, and does not
notice when a JSON file and the trainer disagree. Here all of these are errors, with the line of the file.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.common.precision import AUTO, BF16, FP16, FP32
from higgs_ds.common.resources import DS_CONFIGS
from higgs_ds.options.ds_values import KNOWN_KEYS, NULL_SECTIONS, Kind, shown
from higgs_ds.options.json_keys import keys_of
from higgs_ds.options.train import TrainOptions

REFUSED_KEYS = {
    "scheduler": "the learning rate schedule comes from --lr_scheduler_type and --warmup_ratio; remove this section",
    "torch_autocast": "use --precision",
    "amp": "use --precision",
}
# Keys of the JSON file, and the options with the same meaning.
SHARED_SETTINGS = {
    ("train_micro_batch_size_per_gpu",): "batch_size",
    ("gradient_accumulation_steps",): "grad_accum",
    ("gradient_clipping",): "max_grad_norm",
    ("optimizer", "params", "lr"): "lr",
    ("optimizer", "params", "weight_decay"): "weight_decay",
}
FIXED_SETTINGS = {
    ("optimizer", "params", "betas"): [0.9, 0.999],
    ("optimizer", "params", "eps"): 1e-8,
}
DEEPSPEED_BUCKET_SIZE = 500_000_000  # elements, where a file does not say
# DeepSpeed allocates the whole reduce bucket, 1 GB with its default of 5e8 elements. An adapter needs far less.
AUTO_ZERO_SETTINGS = {
    "allgather_bucket_size": 5_000_000,
    "reduce_bucket_size": 5_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 20_000_000,
}


@dataclass(frozen=True)
class DsConfig:
    """A DeepSpeed JSON file. It has known keys and valid values only; values may still be "auto"."""

    path: Path
    lines: dict[tuple[str, ...], int]
    values: dict[str, Any]

    def get(self, keys: tuple[str, ...]) -> Any:
        """Return a nested value, or None if it or a section around it does not exist."""
        value: Any = self.values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def where(self, keys: tuple[str, ...]) -> str:
        """Return "FILE:LINE: KEY" of a nested key, with which error messages begin."""
        return f"{self.path}:{self.lines[keys]}: {'.'.join(keys)}"


def _find_file(path: Path) -> Path:
    """Return `path`, or the project's own file for NAME.json and ds_configs/NAME.json if `path` does not exist."""
    shipped = DS_CONFIGS / path.name
    may_be_shipped = path.parent in (Path(), Path(DS_CONFIGS.name))
    return shipped if may_be_shipped and not path.exists() and shipped.is_file() else path


def read_ds_config(path: Path) -> DsConfig:
    """Read a DeepSpeed JSON file, the user's or one of the project's own.

    Raises:
        InputError: with every problem, each with its line.
    """
    path = _find_file(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except OSError as error:
        raise InputError([f"--deepspeed {path}: cannot be read: {error.strerror}"]) from error
    except json.JSONDecodeError as error:
        at = f"at character {error.colno} of the line"
        raise InputError([f"{path}:{error.lineno}: not JSON: {error.msg} {at}"]) from error
    except ValueError as error:
        raise InputError([f"{path}: not JSON: {error}"]) from error
    except RecursionError as error:
        raise InputError([f"{path}: not JSON: lists or objects are nested too deeply"]) from error
    if not isinstance(values, dict):
        raise InputError([f"{path}: must hold a JSON object"])
    problems: list[str] = []
    config = DsConfig(path, _lines_of_keys(path, text, problems), values)
    checked = replace(config, values=_checked_section(config, values, KNOWN_KEYS, (), problems))
    problems += _conflicts(checked)
    if problems:
        raise InputError(problems)
    return checked


def _lines_of_keys(path: Path, text: str, problems: list[str]) -> dict[tuple[str, ...], int]:
    lines: dict[tuple[str, ...], int] = {}
    for keys, line in keys_of(text):
        if keys in lines:
            where = f"{path}:{line}: {'.'.join(keys)}"
            problems.append(f"{where}: is given twice, first in line {lines[keys]}; remove one of them")
        lines[keys] = line
    return lines


def _checked_section(
    config: DsConfig, values: dict[str, Any], known: dict[str, Any], parents: tuple[str, ...], problems: list[str]
) -> dict[str, Any]:
    """Return the valid values of a section, converted, without those that are null; append the problems of others."""
    checked = {}
    for key, value in values.items():
        keys = (*parents, key)
        where = config.where(keys)
        kind = known.get(key)
        if not parents and key in REFUSED_KEYS:
            problems.append(f"{where}: {REFUSED_KEYS[key]}")
        elif kind is None:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(f"{where}: is not an option of this trainer; {hint}")
        elif isinstance(kind, dict):
            if isinstance(value, dict):
                checked[key] = _checked_section(config, value, kind, keys, problems)
            elif value is not None or keys not in NULL_SECTIONS:
                problems.append(f"{where}: must be a JSON object; is {shown(value)}")
        else:
            converted = _checked_value(where, value, kind, problems)
            if converted is not None:
                checked[key] = converted
    return checked


def _checked_value(where: str, value: Any, kind: Kind, problems: list[str]) -> Any:
    """Return a value as DeepSpeed or an option takes it, or None if it is null or invalid."""
    if (value is None and kind.null) or (value == AUTO and kind.auto):
        return value
    try:
        return kind.convert(value)
    except (ValueError, OverflowError):
        problems.append(f"{where}: {kind.problem(value)}")
        return None


def _conflicts(config: DsConfig) -> list[str]:
    """Return the problems of valid values that do not fit this trainer or each other."""
    problems = []
    for keys, fixed in FIXED_SETTINGS.items():
        value = config.get(keys)
        if value not in (None, AUTO, fixed):
            problems.append(f"{config.where(keys)} is {shown(value)}; this trainer uses {shown(fixed)}")
    stage = config.get(("zero_optimization", "stage"))
    if stage is None:
        if ("zero_optimization", "stage") in config.lines:
            return problems  # the stage is invalid, and nothing can be compared with it
        stage = 0

    def refuse(key: str, what: str) -> None:
        problems.append(f"{config.where(('zero_optimization', key))}: {what}, the stage is {stage}")

    if config.get(("zero_optimization", "offload_param", "device")) == "cpu" and stage != 3:
        refuse("offload_param", "needs stage 3")
    if config.get(("zero_optimization", "offload_optimizer", "device")) == "cpu" and stage == 0:
        refuse("offload_optimizer", "needs stage 1, 2 or 3")
    power, minimum = (config.get(("fp16", key)) for key in ("initial_scale_power", "min_loss_scale"))
    if minimum is not None and minimum > 2 ** (16 if power is None else power):
        problems.append(f"{config.where(('fp16', 'min_loss_scale'))} is above the initial loss scale")
    bucket = config.get(("zero_optimization", "allgather_bucket_size"))
    if stage in (1, 2) and isinstance(bucket, int) and bucket % 2:
        refuse("allgather_bucket_size", f"must be even at stages 1 and 2; is {bucket}")  # DeepSpeed asserts it
    return problems


def resolve(
    config: DsConfig, options: TrainOptions, given: set[str], world_size: int, native: str = BF16
) -> tuple[dict[str, Any], TrainOptions]:
    """Reconcile a DeepSpeed JSON file with the options.

    A value that is "auto" or missing in the file comes from the options. A value in the file overrides the default of
    an option that was not given.

    Args:
        given: names of the options that were given, on the command line or in an options file.
        native: what --precision auto means: `native_precision` of the device, or what a resumed run was trained in.

    Returns:
        The settings for `deepspeed.initialize`, without any "auto", and the options with the values of the file.

    Raises:
        InputError: the file disagrees with an option that was given.
    """
    precision, problems = _choose_precision(config, options.model.precision, "precision" in given, native)
    from_file: dict[str, Any] = {"precision": precision}
    for keys, name in SHARED_SETTINGS.items():
        value = config.get(keys)
        if value is None or value == AUTO:
            continue
        current = options.flat()[name]
        if name in given and value != current:
            problems.append(
                f"{config.where(keys)} is {shown(config.get(keys))}, but --{name} is {current!r}: remove one of them"
            )
        else:
            from_file[name] = value
    options = options.replace(**from_file)
    optim = options.optim
    product = optim.batch_size * optim.grad_accum * world_size
    train_batch_size = config.get(("train_batch_size",))
    if train_batch_size not in (None, AUTO, product):
        problems.append(
            f"{config.where(('train_batch_size',))} is {train_batch_size}, but {optim.batch_size} per rank x "
            f"{optim.grad_accum} accumulated x {world_size} ranks are {product}"
        )
    if problems:
        raise InputError(problems)

    kept = {
        key: value
        for key, value in config.values.items()
        if key not in ("optimizer", "fp16", "activation_checkpointing")
    }
    zero = {
        key: AUTO_ZERO_SETTINGS[key] if value == AUTO else value
        for key, value in kept.get("zero_optimization", {}).items()
    }
    settings = kept | {
        "zero_optimization": {"stage": 0} | zero,
        "train_batch_size": product,
        "train_micro_batch_size_per_gpu": optim.batch_size,
        "gradient_accumulation_steps": optim.grad_accum,
        "gradient_clipping": optim.max_grad_norm,
        "bf16": {"enabled": precision == BF16},
        # torch's AdamW updates the offloaded states too: DeepSpeed's own CPU optimizer needs a compiler, and an
        # adapter's states are small.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # bitsandbytes' AdamW is tested here, but is not on DeepSpeed's list
    }
    if precision == FP16:
        settings["fp16"] = config.values.get("fp16", {}) | {"enabled": True}
    if precision == FP32 or settings["zero_optimization"]["stage"] == 0:
        settings.pop("data_types", None)  # float32 accumulates in float32 anyway; stage 0 supports no other type
    settings.setdefault("steps_per_print", 1_000_000_000)
    return settings, options


def _choose_precision(config: DsConfig, precision: str, is_given: bool, native: str) -> tuple[str, list[str]]:
    """Return the precision to train in, and the problems of the file.

    A section that is "auto" or missing follows --precision; one that is enabled decides, and one that is not enabled
    excludes its precision, unless --precision was given with another value.

    Args:
        precision: --precision.
        is_given: whether the user gave it.
        native: what auto means on this machine.
    """
    switches = {name: config.get((name, "enabled")) for name in (BF16, FP16)}
    enabled = [name for name, value in switches.items() if value is True]
    excluded = [name for name, value in switches.items() if value is False]
    if len(enabled) == 2:
        other = config.where((BF16, "enabled"))
        return FP32, [f"{config.where((FP16, 'enabled'))} is true, and so is {other}: enable one of them"]
    wanted = native if precision == AUTO else precision
    refused = [name for name in enabled if name != wanted] + [name for name in excluded if name == wanted]
    if is_given and precision != AUTO and refused:
        where, value = config.where((refused[0], "enabled")), shown(switches[refused[0]])
        return wanted, [f"{where} is {value}, but --precision is {precision!r}: remove one of them"]
    if enabled:
        return enabled[0], []
    return FP32 if wanted in excluded else wanted, []


def fit_buckets(settings: dict[str, Any], num_trained: int, ranks: int) -> dict[str, Any]:
    """Return DeepSpeed settings without buckets, or parts of buckets, that nothing would ever be in.

    DeepSpeed allocates the buckets in which it sums gradients over ranks at full size. A bucket holds at most all
    gradients, and a single rank needs none.

    Args:
        num_trained: number of elements of all trained weights.
    """
    zero = dict(settings["zero_optimization"])
    bucket = zero.get("reduce_bucket_size", DEEPSPEED_BUCKET_SIZE)
    zero["reduce_bucket_size"] = max(1, min(bucket, num_trained))
    if ranks == 1 and zero["stage"] in (1, 2):
        zero |= {"overlap_comm": False, "contiguous_gradients": False}
    return settings | {"zero_optimization": zero}
