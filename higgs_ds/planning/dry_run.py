"""--dry_run: what a training will take, whether it fits, and what to change where it does not; nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import HiggsAudioV2Config

from higgs_ds.bases.builtin import builtin_config, which_builtin
from higgs_ds.common import distributed
from higgs_ds.common.errors import InputError
from higgs_ds.common.hub import resolve_config_folder
from higgs_ds.common.resources import DEFAULT_DS_CONFIG
from higgs_ds.model.loading import read_config
from higgs_ds.model.parts import parts_to_add, with_parts
from higgs_ds.options import ds_config
from higgs_ds.options.checks import check_options
from higgs_ds.options.compatibility import unsupported
from higgs_ds.options.fields import LORA
from higgs_ds.options.train import TrainOptions, recompute_every
from higgs_ds.planning.activations import TEXT_POSITIONS
from higgs_ds.planning.plan import CONTEXT_BYTES, plan, with_checkpointing
from higgs_ds.planning.weights import Setting
from higgs_ds.planning.zero_stages import Plan

GIB = 2**30
CONTEXT_GIB = CONTEXT_BYTES / GIB
SHARDED_RANKS = 4  # number of GPUs that ZeRO-3 is proposed for where one is planned for


def main(options: TrainOptions, given: set[str]) -> None:
    """Print the plan, on rank 0 alone; that something does not fit is an answer, not an error.

    Args:
        given: names of the options that the user gave himself.

    Raises InputError: options or files are bad.
    """
    if not distributed.is_main():
        return
    setting = make_setting(options, given)
    device_gib = options.run.device_memory_gib or _device_gib()
    if options.model.activation_checkpointing == "auto":
        setting = with_checkpointing(setting, math.inf if device_gib is None else device_gib * GIB)
    made = plan(setting)
    print("\n".join(describe(setting, made)), flush=True)
    if device_gib is None:
        print("\nno GPU here: give --device_memory_gib N to see whether it fits")
        return
    needed_gib = made.total / GIB + CONTEXT_GIB
    if needed_gib > device_gib:
        print("\n".join(_advice(setting, given, made, device_gib)))
    verdict = "fits" if needed_gib <= device_gib else "does not fit"
    print(f"\n{verdict}: {needed_gib:.2f} GiB of {device_gib:.2f} GiB")


def make_setting(options: TrainOptions, given: set[str]) -> Setting:
    """What is to be planned. Raises InputError with all that is wrong in the options, the DeepSpeed file, the base."""
    problems = check_options(options)
    ranks = options.run.plan_ranks or distributed.world_size()
    settings, config = None, None
    try:
        settings, options = ds_config.resolve(ds_config.read_ds_config(options.run.deepspeed), options, given, ranks)
        problems += unsupported(options, settings, on_gpu=True)
    except InputError as error:
        problems += error.problems
    try:
        config = _base_config(options)
    except InputError as error:
        problems += error.problems
    if problems or settings is None or config is None:
        raise InputError(problems)
    return Setting(config, options, settings, ranks)


def _base_config(options: TrainOptions) -> HiggsAudioV2Config:
    model = options.model
    built_in = which_builtin(model.base_ckpt)
    if built_in is not None:
        config = builtin_config(built_in)
    else:
        assert model.base_ckpt is not None  # that would be the default
        config = read_config(resolve_config_folder(model.base_ckpt, "--base_ckpt", model.base_revision))
    return with_parts(config, parts_to_add(model, config, resolve_config_folder)[0])


def _device_gib() -> float | None:
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None


def describe(setting: Setting, made: Plan) -> list[str]:
    """The plan as lines of text."""
    options, config = setting.options, setting.config
    size, length = setting.batch_shape()
    data, optim, lora, tune = options.data, options.optim, options.lora, options.tune
    assumed = data.max_seq_len is None and optim.max_tokens_per_batch is None
    text = min(TEXT_POSITIONS, (length + 1) // 2)
    built_in = which_builtin(options.model.base_ckpt)
    base = options.model.base_ckpt if built_in is None else f"{built_in} (built in)"
    every = recompute_every(options.model)
    recompute = "kept" if every is None else f"recomputed in {'every layer' if every == 1 else f'1 layer of {every}'}"
    recompute += " from host memory" if options.model.offload_checkpoints and every else ""
    guess = " (a guess: give --max_seq_len)" if assumed else ""
    four_bit = "NF4 in " if options.model.load_in_4bit else ""
    offloaded = [f"{what} offloaded, " for what in ("optimizer", "param") if setting.offloads(what)]
    rows = {
        **{f"weights, {group}": size_bytes for group, size_bytes in made.weights.items()},
        "weights, scales of 4 bits": made.quantization,
        "weights that are trained" if options.is_full_finetuning else "LoRA": made.trained,
        "gradients": made.gradients,
        "optimizer state, float32 masters": made.optimizer,
        "DeepSpeed's buckets": made.buckets,
        "activations": made.activations,
        "logits and loss": made.logits,
        "working memory": made.working,
        "weights gathered by ZeRO-3": made.gathered,
        "optimizer step, above all this": max(0, made.total - made.resident - _in_pass(made)),
    }
    table = [*((name, size_bytes) for name, size_bytes in rows.items() if size_bytes), ("total", made.total)]
    lines = [
        "planned per GPU from config.json alone; nothing was loaded or measured",
        f"base: {base}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{four_bit}{options.model.precision}",
        f"full: {', '.join(tune.train_groups)}; optimizer {optim.optim}"
        if options.is_full_finetuning
        else f"LoRA: rank {lora.lora_r} on {', '.join(lora.lora_targets)}; optimizer {optim.optim}",
        f"ZeRO stage {setting.stage}, {''.join(offloaded)}on {setting.ranks} GPU{'s' if setting.ranks > 1 else ''}",
        f"batch: {size} x {length} positions{guess}, activations {recompute}",
        f"planned as speech: of each sample {text} positions are text, all others audio",
        "",
        *_table(table),
        f"{'besides, a CUDA context (assumed)':<36}{CONTEXT_GIB:>8.2f} GiB",
    ]
    if made.host:
        host_rows = [*made.host.items(), ("total", sum(made.host.values()))]
        lines += ["", "host memory per rank, once loaded", *_table(host_rows)]
    return lines


def _in_pass(made: Plan) -> int:
    return made.buckets + made.activations + made.logits + made.working + made.gathered


def _table(rows: list[tuple[str, int]]) -> list[str]:
    return [f"{name:<36}{size_bytes / GIB:>8.2f} GiB" for name, size_bytes in rows]


@dataclass(frozen=True)
class Change:
    """Something to change, as it is given on the command line, and what is then planned."""

    text: str
    setting: Setting


def _advice(setting: Setting, given: set[str], made: Plan, device_gib: float) -> list[str]:
    """Lines: changes that help, what costs least first, and as many of the options together as it takes to fit."""
    lines = ["", "what would help, each by itself:"]
    together, at_best, names = setting, made, list[str]()
    for change in _changes(setting, given):
        changed = plan(change.setting)
        if (made.total - changed.total) / GIB < 0.005:
            continue
        lines.append(f"  {change.text:<46}{_saving(made, changed, device_gib)}")
        is_option = change.setting.ds_settings is setting.ds_settings
        if is_option and at_best.total / GIB + CONTEXT_GIB > device_gib:
            wider = _merged(together, change.setting, setting)
            if plan(wider).total < at_best.total:
                together, at_best = wider, plan(wider)
                names.append(change.text)
    if len(names) > 1:
        lines.append(f"together: {' '.join(names)}\n  {_saving(made, at_best, device_gib)}")
    return lines


def _saving(made: Plan, changed: Plan, device_gib: float) -> str:
    needed_gib = changed.total / GIB + CONTEXT_GIB
    verdict = "fits" if needed_gib <= device_gib else "does not fit"
    return f"saves {(made.total - changed.total) / GIB:>6.2f} GiB: {needed_gib:>6.2f} GiB, {verdict}"


def _merged(one: Setting, other: Setting, plain: Setting) -> Setting:
    """The first with those options that the second has changed against `plain`."""
    before, after = plain.options.flat(), other.options.flat()
    return replace(one, options=one.options.replace(**{k: v for k, v in after.items() if v != before[k]}))


def _changes(setting: Setting, given: set[str]) -> Iterator[Change]:
    """Every change that can be proposed, what costs least first."""
    size, length = setting.batch_shape()
    by_tokens = setting.options.optim.max_tokens_per_batch is not None
    smaller = {"max_tokens_per_batch": length} if by_tokens else {"batch_size": max(1, size // 2)}
    half: dict[str, Any] = {"max_seq_len": length // 2} | ({"max_tokens_per_batch": length // 2} if by_tokens else {})
    candidates: list[dict[str, Any]] = [
        {"activation_checkpointing": "every_layer"},
        smaller,
        {"load_in_4bit": True},
        {"offload_embeddings": True},
        {"optim": "adamw_8bit"},
    ]
    if recompute_every(setting.options.model) is not None:
        candidates.append({"offload_checkpoints": True})
    if setting.options.is_full_finetuning:
        candidates.append({"finetune": LORA})
    flat = setting.options.flat()
    for values in candidates:
        if check_options(setting.options.replace(**values)) != check_options(setting.options):
            continue  # with --finetune full, not all of them are to be had
        if any(flat[name] != value for name, value in values.items()):
            yield _change(setting, values)
    for name in ("small_card.json", "zero2_offload.json", "zero3.json"):
        path = DEFAULT_DS_CONFIG.parent / name
        ranks = max(setting.ranks, SHARDED_RANKS if name == "zero3.json" and setting.ranks == 1 else 1)
        if path.is_file():
            settings, options = ds_config.resolve(ds_config.read_ds_config(path), setting.options, given, ranks)
            text = f"--deepspeed ds_configs/{name}{'' if ranks == setting.ranks else f' on {ranks} GPUs'}"
            yield Change(text, replace(setting, options=options, ds_settings=settings, ranks=ranks))
    if length >= 512:
        yield _change(setting, half)


def _change(setting: Setting, values: dict[str, Any]) -> Change:
    text = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items())
    return Change(text, replace(setting, options=setting.options.replace(**values)))
