"""Read DeepSpeed JSON files, check every key, and reconcile them with the options. Does not import DeepSpeed.

A bare DeepSpeed engine does not resolve "auto", ignores most unknown keys, and does not notice when a JSON file and the
trainer disagree. Here an unknown key or a value that disagrees is an error.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.common.resources import DS_CONFIGS
from higgs_ds.options.train import TrainOptions

AUTO = "auto"
ANY: dict[str, Any] = {}  # a section whose keys are not checked
KNOWN_KEYS: dict[str, Any] = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": None,
    "gradient_clipping": None,
    "bf16": {"enabled": None},
    "fp16": ANY,
    "optimizer": {"type": None, "params": {"lr": None, "betas": None, "eps": None, "weight_decay": None}},
    "zero_optimization": {
        "stage": None,
        "allgather_bucket_size": None,
        "allgather_partitions": None,
        "contiguous_gradients": None,
        "ignore_unused_parameters": None,
        "offload_optimizer": {"device": None, "pin_memory": None},
        "offload_param": {"device": None, "pin_memory": None},
        "overlap_comm": None,
        "reduce_bucket_size": None,
        "reduce_scatter": None,
        "round_robin_gradients": None,
        "stage3_gather_16bit_weights_on_model_save": None,
        "stage3_max_live_parameters": None,
        "stage3_max_reuse_distance": None,
        "stage3_model_persistence_threshold": None,
        "stage3_param_persistence_threshold": None,
        "stage3_prefetch_bucket_size": None,
        "sub_group_size": None,
    },
    "activation_checkpointing": ANY,
    "communication_data_type": None,
    "data_types": {"grad_accum_dtype": None},
    "steps_per_print": None,
    "wall_clock_breakdown": None,
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
}
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
    ("bf16", "enabled"): "precision",
    ("optimizer", "params", "lr"): "lr",
    ("optimizer", "params", "weight_decay"): "weight_decay",
}
FIXED_SETTINGS = {
    ("optimizer", "params", "betas"): [0.9, 0.999],
    ("optimizer", "params", "eps"): 1e-8,
}
# DeepSpeed allocates the whole reduce bucket, 1 GB with its default of 5e8 elements. An adapter needs far less.
AUTO_ZERO_SETTINGS = {
    "allgather_bucket_size": 5_000_000,
    "reduce_bucket_size": 5_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_prefetch_bucket_size": 20_000_000,
}


@dataclass(frozen=True)
class DsConfig:
    """A DeepSpeed JSON file. It has known keys only; values may still be "auto"."""

    path: Path
    text: str
    values: dict[str, Any]

    def get(self, keys: tuple[str, ...]) -> Any:
        """Return a nested value, or None if it or a section around it does not exist."""
        value: Any = self.values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def where(self, keys: tuple[str, ...]) -> str:
        """Return "FILE:LINE: KEY" of a nested key, with which error messages begin."""
        position = 0
        for key in keys:
            position = max(self.text.find(f'"{key}"', position), position)
        return f"{self.path}:{self.text.count(chr(10), 0, position) + 1}: {'.'.join(keys)}"


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
        values = json.loads(text, object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise InputError([f"--deepspeed {path}: cannot be read: {error.strerror}"]) from error
    except ValueError as error:
        raise InputError([f"{path}: not JSON: {error}"]) from error
    if not isinstance(values, dict):
        raise InputError([f"{path}: must hold a JSON object"])
    config = DsConfig(path, text, values)
    problems = _unknown_keys(config, values, KNOWN_KEYS, ()) + _refused_values(config)
    if problems:
        raise InputError(problems)
    return config


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"keys given twice: {', '.join(twice)}")
    return dict(pairs)


def _unknown_keys(
    config: DsConfig, values: dict[str, Any], known: dict[str, Any], parents: tuple[str, ...]
) -> list[str]:
    problems = []
    for key, value in values.items():
        keys = (*parents, key)
        if not parents and key in REFUSED_KEYS:
            problems.append(f"{config.where(keys)}: {REFUSED_KEYS[key]}")
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(f"{config.where(keys)}: is not an option of this trainer; {hint}")
        elif isinstance(known[key], dict):
            if not isinstance(value, dict):
                problems.append(f"{config.where(keys)}: must be a JSON object, is {value!r}")
            elif known[key] is not ANY:
                problems += _unknown_keys(config, value, known[key], keys)
    return problems


def _refused_values(config: DsConfig) -> list[str]:
    problems = []

    def expect(keys: tuple[str, ...], allowed: tuple[Any, ...], remedy: str) -> None:
        value = config.get(keys)
        if value is not None and (value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool)):
            problems.append(f"{config.where(keys)}: {value!r} is not supported; {remedy}")

    expect(("zero_optimization", "stage"), (0, 1, 2, 3), "use stage 0, 1, 2 or 3")
    expect(("fp16", "enabled"), (False,), "training is in bf16 or fp32 (--precision)")
    expect(("optimizer", "type"), ("AdamW", "Adam", AUTO), "the optimizer is AdamW")
    for name in ("offload_optimizer", "offload_param"):
        expect(("zero_optimization", name, "device"), ("cpu", "none"), "use cpu or none")
    stage = config.get(("zero_optimization", "stage")) or 0
    if config.get(("zero_optimization", "offload_param", "device")) == "cpu" and stage != 3:
        problems.append(f"{config.where(('zero_optimization', 'offload_param'))}: needs stage 3, the stage is {stage}")
    if config.get(("zero_optimization", "offload_optimizer", "device")) == "cpu" and stage == 0:
        problems.append(f"{config.where(('zero_optimization', 'offload_optimizer'))}: needs stage 1, 2 or 3, not 0")
    return problems


def resolve(
    config: DsConfig, options: TrainOptions, given: set[str], world_size: int
) -> tuple[dict[str, Any], TrainOptions]:
    """Reconcile a DeepSpeed JSON file with the options.

    A value that is "auto" or missing in the file comes from the options. A value in the file overrides the default of
    an option that was not given.

    Args:
        given: names of the options that were given, on the command line or in an options file.

    Returns:
        The settings for `deepspeed.initialize`, without any "auto", and the options with the values of the file.

    Raises:
        InputError: the file disagrees with an option that was given.
    """
    problems = []
    from_file: dict[str, Any] = {}
    for keys, name in SHARED_SETTINGS.items():
        value = config.get(keys)
        if value is None or value == AUTO:
            continue
        value = _to_option_value(name, value)
        current = options.flat()[name]
        if name in given and value != current:
            problems.append(
                f"{config.where(keys)} is {config.get(keys)!r}, but --{name} is {current!r}: remove one of them"
            )
        else:
            from_file[name] = value
    for keys, fixed in FIXED_SETTINGS.items():
        value = config.get(keys)
        if value not in (None, AUTO, fixed):
            problems.append(f"{config.where(keys)} is {value!r}; this trainer uses {fixed!r}")
    options = options.replace(**from_file)
    optim = options.optim
    product = optim.batch_size * optim.grad_accum * world_size
    train_batch_size = config.get(("train_batch_size",))
    if train_batch_size not in (None, AUTO, product):
        problems.append(
            f"{config.where(('train_batch_size',))} is {train_batch_size}, but {optim.batch_size} per rank x "
            f"{optim.grad_accum} accumulated x {world_size} ranks are {product}"
        )
    problems += _unresolved_auto(config, config.values, ())
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
        "bf16": {"enabled": options.model.precision == "bf16"},
        # torch's AdamW updates the offloaded states too: DeepSpeed's own CPU optimizer needs a compiler, and an
        # adapter's states are small.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # bitsandbytes' AdamW is tested here, but is not on DeepSpeed's list
    }
    if options.model.precision != "bf16" or settings["zero_optimization"]["stage"] == 0:
        settings.pop("data_types", None)  # float32 accumulates in float32 anyway; stage 0 supports no other type
    settings.setdefault("steps_per_print", 1_000_000_000)
    return settings, options


def _to_option_value(name: str, value: Any) -> Any:
    if name == "precision":
        return "bf16" if value else "fp32"
    return float(value) if isinstance(value, int) and name in ("lr", "weight_decay", "max_grad_norm") else value


def _unresolved_auto(config: DsConfig, values: dict[str, Any], parents: tuple[str, ...]) -> list[str]:
    """Return the problems of keys whose value is "auto" but which have no option or default to resolve it."""
    problems = []
    for key, value in values.items():
        keys = (*parents, key)
        if isinstance(value, dict):
            problems += _unresolved_auto(config, value, keys)
        elif value == AUTO:
            known = (
                keys in SHARED_SETTINGS
                or keys in FIXED_SETTINGS
                or keys in (("train_batch_size",), ("optimizer", "type"))
            )
            if not known and not (parents == ("zero_optimization",) and key in AUTO_ZERO_SETTINGS):
                problems.append(f'{config.where(keys)}: "auto" has no meaning here; give a value')
    return problems
