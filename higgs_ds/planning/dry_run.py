"""--dry_run: print the memory plan of a training run, whether it fits and what would help; nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from higgs_ds.adapters.starting_point import check_geometry, starting_point
from higgs_ds.bases.builtin import DEFAULT_BASE, builtin_config, which_builtin
from higgs_ds.common import distributed
from higgs_ds.common.errors import DoesNotFitError, InputError, collect_problems
from higgs_ds.common.hub import resolve_config_folder
from higgs_ds.common.precision import AUTO, BF16, native_precision
from higgs_ds.model.config import parts_to_add, read_config, with_parts
from higgs_ds.model.parts import parts_of
from higgs_ds.options import ds_config
from higgs_ds.options.checks import check_options
from higgs_ds.options.compatibility import unsupported
from higgs_ds.options.train import TrainOptions, recompute_every
from higgs_ds.planning.activations import TEXT_POSITIONS
from higgs_ds.planning.advice import CONTEXT_GIB, GIB, advice, uses_of_room
from higgs_ds.planning.batches import SampleLengths
from higgs_ds.planning.plan import plan, with_checkpointing
from higgs_ds.planning.weights import Setting
from higgs_ds.planning.zero_stages import Plan

Resolve = Callable[[str, str, str | None], Path]


def main(options: TrainOptions, given: set[str], lengths: SampleLengths | None = None) -> None:
    """Print the plan, on rank 0 only. A plan that does not fit is an answer, not an error, without --require_fit.

    Args:
        given: names of the options that the user set explicitly.
        lengths: of the samples, where they are known.

    Raises:
        InputError: options or files are invalid.
        DoesNotFitError: the plan does not fit, with --require_fit.
    """
    distributed.take_rank()
    if not distributed.is_main():
        return
    setting = replace(make_setting(options, given), lengths=lengths)
    if options.model.precision == AUTO:
        assumed = "" if torch.cuda.is_available() and options.run.device_memory_gib is None else ", as on most GPUs"
        older = "; give --precision fp16 for a T4, V100, RTX 20 or GTX 16" if assumed else ""
        print(f"--precision auto: {setting.options.model.precision}{assumed}{older}")
    device_gib = options.run.device_memory_gib or _device_gib()
    if options.model.activation_checkpointing == "auto":
        setting = with_checkpointing(setting, math.inf if device_gib is None else device_gib * GIB)
    planned = plan(setting)
    print("\n".join(describe(setting, planned)), flush=True)
    if device_gib is None:
        print("\nno GPU on this machine: give --device_memory_gib N to check whether the plan fits")
        return
    needed_gib = planned.total / GIB + CONTEXT_GIB
    fits = needed_gib <= device_gib
    lines = uses_of_room(setting, device_gib) if fits else advice(setting, given, planned, device_gib)
    result = f"{needed_gib:.2f} GiB of {device_gib:.2f} GiB"
    print("\n".join([*lines, f"\n{'fits' if fits else 'does not fit'}: {result}"]), flush=True)
    if options.run.require_fit and not fits:
        raise DoesNotFitError(f"--require_fit: the plan does not fit: {result}")


def make_setting(options: TrainOptions, given: set[str], resolve: Resolve = resolve_config_folder) -> Setting:
    """Return the setting to plan. Raises InputError with all problems of options, DeepSpeed file and base at once.

    `resolve`: finds the folder or hub id of a base, with its configuration.
    """
    problems = check_options(options)
    if options.run.require_fit and options.run.device_memory_gib is None and not torch.cuda.is_available():
        problems.append("--require_fit: no GPU on this machine; give --device_memory_gib N")
    start, options = collect_problems(problems, lambda: starting_point(options, given)) or (None, options)
    ranks = options.run.plan_ranks or distributed.world_size()
    settings = None
    try:
        config_file = ds_config.read_ds_config(options.run.deepspeed)
        settings, options = ds_config.resolve(config_file, options, given, ranks, _native_precision(options))
        problems += unsupported(options, settings, on_gpu=True)
    except InputError as error:
        problems += error.problems
    config = collect_problems(problems, lambda: _base_config(options, resolve))
    if start is not None and config is not None:
        base = options.model.base_ckpt or DEFAULT_BASE
        collect_problems(problems, lambda: check_geometry(start, options, config, base))
    if problems or settings is None or config is None:
        raise InputError(problems)
    return Setting(config, options, settings, ranks, adapted=start.adapted if start else ())


def _native_precision(options: TrainOptions) -> str:
    """Return what --precision auto means on this machine's GPU, or on a GPU that is planned for."""
    if torch.cuda.is_available() and options.run.device_memory_gib is None:
        return native_precision(torch.device("cuda", 0))
    return BF16


def _base_config(options: TrainOptions, resolve: Resolve) -> Any:
    model = options.model
    built_in = which_builtin(model.base_ckpt)
    if built_in is not None:
        config = builtin_config(built_in)
    else:
        assert model.base_ckpt is not None  # None is the default base, which is built in
        config = read_config(resolve(model.base_ckpt, "--base_ckpt", model.base_revision))
    return with_parts(config, parts_to_add(model, parts_of(config), resolve_config_folder)[0])


def _device_gib() -> float | None:
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None


def describe(setting: Setting, planned: Plan) -> list[str]:
    """Return the plan as lines of text."""
    options, config = setting.options, setting.config
    size, length = planned.shape
    optim, lora, tune = options.optim, options.lora, options.tune
    text = min(TEXT_POSITIONS, (length + 1) // 2)
    built_in = which_builtin(options.model.base_ckpt)
    base = options.model.base_ckpt if built_in is None else f"{built_in} (built in)"
    every = recompute_every(options.model)
    recompute = "kept" if every is None else f"recomputed in {'every layer' if every == 1 else f'1 of {every} layers'}"
    recompute += " from inputs in host memory" if options.model.offload_checkpoints and every else ""
    four_bit = "NF4 in " if options.model.load_in_4bit else ""
    offloaded = [f"{what} offloaded, " for what in ("optimizer", "param") if setting.offloads(what)]
    rows = {
        **{f"weights, {group}": size_bytes for group, size_bytes in planned.weights.items()},
        "weights, 4-bit scales": planned.quantization,
        "trained weights" if options.is_full_finetuning else "LoRA": planned.trained,
        "gradients": planned.gradients,
        f"optimizer state, {'float32 masters' if optim.ema_decay is None else 'masters, averages'}": planned.optimizer,
        "DeepSpeed buckets": planned.buckets,
        "activations": planned.activations,
        "logits and loss": planned.logits,
        "working memory": planned.working,
        "weights gathered by ZeRO-3": planned.gathered,
        "optimizer step, beyond the above": max(0, planned.total - planned.resident - _pass_bytes(planned)),
    }
    table = [*((name, size_bytes) for name, size_bytes in rows.items() if size_bytes), ("total", planned.total)]
    lines = [
        "memory per GPU, planned from config.json alone; nothing was loaded or measured",
        f"base: {base}, {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{four_bit}{options.model.precision}",
        f"full fine-tuning: {', '.join(tune.train_groups)}; optimizer {optim.optim}"
        if options.is_full_finetuning
        else f"LoRA: rank {_ranks(setting)} on {', '.join(lora.lora_targets)}; optimizer {optim.optim}",
        f"ZeRO stage {setting.stage}, {''.join(offloaded)}on {setting.ranks} GPU{'s' if setting.ranks > 1 else ''}",
        f"batch: {size} x {length} positions{_source_of_length(setting, planned)}, activations {recompute}",
        f"assumed to be speech: {text} positions of each sample are text, all others audio",
        "",
        *_table(table),
        f"{'plus a CUDA context (assumed)':<36}{CONTEXT_GIB:>8.2f} GiB",
    ]
    if planned.host:
        host_rows = [*planned.host.items(), ("total", sum(planned.host.values()))]
        lines += ["", "host memory per rank, after loading", *_table(host_rows)]
    return lines


def _source_of_length(setting: Setting, planned: Plan) -> str:
    """Say where the length comes from; nothing if an option gives it."""
    options, lengths = setting.options, setting.lengths
    if lengths is None:
        given = options.data.max_seq_len or options.optim.max_tokens_per_batch
        return "" if given else " (a guess: give --train_manifest to plan for your samples, or --max_seq_len)"
    which = "the longest" if planned.shape == setting.batch_shape() else "the fullest micro-batch"
    return f" ({which} of {len(lengths.tokens):,} samples)"


def _ranks(setting: Setting) -> str:
    """Describe the rank of the adapters, or the ranks of those that the run starts from."""
    ranks = {layer.rank for layer in setting.adapted} or {setting.options.lora.lora_r}
    several = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else f"{max(ranks)}"
    return several + (f" (as {setting.options.lora.init_from})" if setting.adapted else "")


def _pass_bytes(planned: Plan) -> int:
    return planned.buckets + planned.activations + planned.logits + planned.working + planned.gathered


def _table(rows: list[tuple[str, int]]) -> list[str]:
    return [f"{name:<36}{size_bytes / GIB:>8.2f} GiB" for name, size_bytes in rows]
