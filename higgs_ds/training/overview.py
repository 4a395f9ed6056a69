"""The table at the start of a run: what is trained, on what, in how many steps, in how much memory by the plan."""

from __future__ import annotations

import textwrap

import torch

from higgs_ds.bases.builtin import BUILT_IN, which_builtin
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common import distributed
from higgs_ds.common.run_files import DROPPED_FILE
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.model.higgs import describe_model
from higgs_ds.planning.plan import plan
from higgs_ds.planning.weights import Setting
from higgs_ds.training.preflight import GIB, seconds_left
from higgs_ds.training.run import Inputs

NAMES = 10  # columns of the names
WIDTH = 110  # columns of what is said of them


def overview(inputs: Inputs, sampler: WindowSampler, state: TrainerState, adapters: str) -> str:
    """The table, in lines; a few seconds of planning for a large base.

    Args:
        adapters: one line on what is trained.
    """
    rows = {
        "base": _base(inputs),
        "model": describe_model(inputs.bundle.config),
        "trained": adapters,
        "data": _data(inputs, sampler),
        "left out": _left_out(inputs),
        "steps": _steps(inputs, sampler, state),
        "memory": _memory(inputs),
        "time": _time(inputs),
        "output": str(inputs.output_dir),
        "resumed": f"{inputs.resume_from}, at step {state.step}" if inputs.resume_from else "",
    }
    return "\n".join(_row(name, text) for name, text in rows.items() if text)


def _row(name: str, text: str) -> str:
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return f"{name:<{NAMES}}" + f"\n{'':<{NAMES}}".join(lines)


def _base(inputs: Inputs) -> str:
    options, bundle = inputs.options.model, inputs.bundle
    built_in = which_builtin(options.base_ckpt)
    told = "" if built_in is None else f" ({BUILT_IN[built_in]})"
    four_bit = "NF4 in " if options.load_in_4bit else ""
    added = f"; added: {bundle.added}" if bundle.added else ""
    return f"{bundle.name}{told}, in the {bundle.layout} layout, held in {four_bit}{options.precision}{added}"


def _data(inputs: Inputs, sampler: WindowSampler) -> str:
    train = inputs.train
    return (
        f"{len(train):,} samples to train on, {len(inputs.val):,} to validate on; {sum(train.lengths):,} tokens an "
        f"epoch, {max(train.lengths):,} in the longest sample, {sampler.padding():.1%} padding"
    )


def _left_out(inputs: Inputs) -> str:
    if not inputs.too_long:
        return ""
    return (
        f"{len(inputs.too_long):,} samples longer than --max_seq_len {inputs.options.data.max_seq_len}, for instance "
        f"{inputs.too_long[0]}; all are in {inputs.output_dir / DROPPED_FILE}"
    )


def _steps(inputs: Inputs, sampler: WindowSampler, state: TrainerState) -> str:
    optim, ranks = inputs.options.optim, distributed.world_size()
    micro_batch = f"{sampler.max_tokens} tokens" if sampler.max_tokens else f"{optim.batch_size}"
    return (
        f"{state.total_steps:,}, {sampler.num_steps(1):,} in the first epoch, of {sampler.window_size} "
        f"{'micro-batches' if sampler.max_tokens else 'samples'} ({micro_batch} per rank x {optim.grad_accum} "
        f"accumulated x {ranks} rank{'s' if ranks > 1 else ''}); learning rate {optim.lr:g}, {optim.lr_scheduler_type}"
    )


def _memory(inputs: Inputs) -> str:
    """The plan for the longest sample, which is what decides whether it fits."""
    here = distributed.device()
    on_gpu = here.type == "cuda"
    longest = inputs.options.replace(max_seq_len=inputs.longest)
    made = plan(Setting(inputs.bundle.config, longest, inputs.ds_settings, distributed.world_size(), on_gpu))
    weights = sum(made.weights.values()) + made.quantization
    parts = {
        "weights": weights,
        "what is trained, its gradients and optimizer state": made.resident - weights,
        "a pass or a step": made.total - made.resident,
    }
    of = f" of {torch.cuda.get_device_properties(here).total_memory / GIB:.1f} GiB" if on_gpu else ""
    host = f"; host memory {_gib(sum(made.host.values()))}" if made.host else ""
    return (
        f"planned per {'GPU' if on_gpu else 'rank, beside the libraries'}: {_gib(made.total)} GiB{of} ("
        + ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
        + f"{host}), at ZeRO stage {inputs.zero_stage}"
    )


def _gib(size_bytes: int) -> str:
    gib = size_bytes / GIB
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.3f}"


def _time(inputs: Inputs) -> str:
    limit_s = seconds_left()
    limit = "" if limit_s is None else f"the job's limit is in {limit_s / 3600:.1f} h; "
    return f"{limit}log lines tell what is left, from step {inputs.options.run.log_steps} on"
