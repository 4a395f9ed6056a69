"""The table at the start of a run: what is trained, on which data, in how many steps, and the planned memory."""

from __future__ import annotations

import textwrap

import torch

from higgs_ds.bases.builtin import BUILT_IN, which_builtin
from higgs_ds.bases.bundle import Bundle
from higgs_ds.bases.licence import licence_of
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common import distributed
from higgs_ds.common.resources import resident_bytes
from higgs_ds.common.run_files import DROPPED_FILE
from higgs_ds.common.words import counted
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.options.optim import OptimOptions
from higgs_ds.planning.plan import plan
from higgs_ds.planning.weights import Setting
from higgs_ds.training.intervals import describe_intervals
from higgs_ds.training.preflight import GIB, seconds_left
from higgs_ds.training.run import Inputs, PlannedMemory
from higgs_ds.training.selection import describe_manifests

NAMES = 10  # width of the column of names, in characters
WIDTH = 110  # width of the column of texts


def overview(inputs: Inputs, sampler: WindowSampler, state: TrainerState, adapters: str, memory: PlannedMemory) -> str:
    """Return the lines of the table.

    Args:
        adapters: one line that describes what is trained.
    """
    rows = {
        "base": _base(inputs),
        "model": inputs.bundle.family.describe(inputs.bundle.config),
        **_terms(inputs.bundle),
        "trained": adapters,
        "objective": inputs.options.objective.describe() if inputs.options.objective.is_dpo else "",
        "start": _start(inputs),
        "data": _data(inputs, sampler),
        "manifests": "\n".join(describe_manifests(inputs.train, inputs.val)),
        "reference": _references(inputs),
        "left out": _left_out(inputs),
        "steps": _steps(inputs, sampler, state),
        "memory": _memory(inputs, memory),
        "time": _time(inputs),
        "output": str(inputs.output_dir),
        "resumed": f"{inputs.resume_from}, at step {state.step}" if inputs.resume_from else "",
    }
    return "\n".join(_row(name, text) for name, text in rows.items() if text)


def _row(name: str, text: str) -> str:
    lines = [
        line
        for part in text.splitlines()
        for line in textwrap.wrap(part, WIDTH, break_long_words=False, break_on_hyphens=False)
    ]
    return f"{name:<{NAMES}}" + f"\n{'':<{NAMES}}".join(lines)


def _base(inputs: Inputs) -> str:
    options, bundle = inputs.options.model, inputs.bundle
    built_in = which_builtin(options.base_ckpt)
    description = "" if built_in is None else f" ({BUILT_IN[built_in]})"
    four_bit = "NF4 and " if options.load_in_4bit else ""
    added = f"; added: {bundle.added}" if bundle.added else ""
    return f"{bundle.name}{description}, in the {bundle.layout} layout, loaded in {four_bit}{options.precision}{added}"


def _start(inputs: Inputs) -> str:
    """Describe the adapter of --init_from; of a resumed run, the row of the checkpoint does."""
    if inputs.start is None or inputs.resume_from is not None:
        return ""
    lora = inputs.options.lora
    return f"{inputs.start.folder}: rank {lora.lora_r}, alpha {lora.lora_alpha}, {inputs.start.comparison}"


def _data(inputs: Inputs, sampler: WindowSampler) -> str:
    train = inputs.train
    lengths = train.lengths_in(0)
    in_first = train.samples_in(0)
    varies = train.references is not None or train.mix is not None
    mixed = "" if train.mix is None else f" ({len(in_first):,} in the first epoch)"
    padding = f", {sampler.padding():.1%} padding"
    what, size = "sample", inputs.options.objective.group_size
    if size > 1:  # the samples of a pair differ in length, which the sampler does not know
        what, padding = "pair", ""
    return (
        f"{counted(len(train) // size, f'training {what}')}{mixed}, "
        f"{counted(len(inputs.val) // size, f'validation {what}')}; "
        f"{sum(lengths[i] for i in in_first):,} tokens {'in the first' if varies else 'per'} epoch, "
        f"{train.longest:,} in the longest sample{padding}"
    )


def _references(inputs: Inputs) -> str:
    """Describe the references where they depend on the epoch. In validation, none are left out."""
    train, val = inputs.train.references, inputs.val.references
    if train is None or val is None:
        return ""
    validation = f"; in validation, {val.describe(with_dropout=False)}" if len(inputs.val) else ""
    first_epoch = None if inputs.train.mix is None else inputs.train.samples_in(0)
    return f"{train.describe(first_epoch=first_epoch)}{validation}"


def _left_out(inputs: Inputs) -> str:
    if not inputs.too_long:
        return ""
    return (
        f"{counted(len(inputs.too_long), 'sample')} longer than --max_seq_len {inputs.options.data.max_seq_len}, for "
        f"instance {inputs.too_long[0]}; all are listed in {inputs.output_dir / DROPPED_FILE}"
    )


def _steps(inputs: Inputs, sampler: WindowSampler, state: TrainerState) -> str:
    optim, ranks = inputs.options.optim, distributed.world_size()
    micro_batch = f"{optim.max_tokens_per_batch} tokens" if sampler.max_tokens else f"{optim.batch_size}"
    unit = "micro-batches" if sampler.max_tokens else "pairs" if sampler.group_size > 1 else "samples"
    return (
        f"{state.total_steps:,} ({sampler.num_steps(1):,} in the first epoch) of {sampler.window_size} "
        f"{unit} each ({micro_batch} per rank x {optim.grad_accum} "
        f"accumulated x {ranks} rank{'s' if ranks > 1 else ''}); learning rate {_learning_rates(optim)}\n"
        f"{describe_intervals(inputs.options)}"
    )


def _learning_rates(optim: OptimOptions) -> str:
    ratio = optim.loraplus_lr_ratio
    factors = "" if ratio is None else f" (B factors: {ratio:g} times as high)"
    return ", ".join([f"{optim.lr:g}", *(optim.group_lr or ())]) + f"{factors}, {optim.lr_scheduler_type}"


def plan_memory(inputs: Inputs) -> PlannedMemory:
    """Plan for the longest sample, which needs the most memory. For a large base, this takes a few seconds."""
    on_gpu = distributed.device().type == "cuda"
    ranks = distributed.world_size()
    planned = plan(
        Setting(inputs.bundle.config, inputs.options, inputs.ds_settings, ranks, on_gpu, inputs.adapted, inputs.lengths)
    )
    return PlannedMemory(planned, 0 if on_gpu else resident_bytes())


def _terms(bundle: Bundle) -> dict[str, str]:
    """Return the licence of a family whose released weights may not be used for everything."""
    licence = licence_of(bundle.name, bundle.folder, bundle.family) if bundle.family.licence else None
    return {"licence": f"{licence.name}. {licence.conditions}"} if licence and licence.conditions else {}


def _memory(inputs: Inputs, memory: PlannedMemory) -> str:
    planned, device = memory.plan, distributed.device()
    on_gpu = device.type == "cuda"
    weights = sum(planned.weights.values()) + planned.quantization
    parts = {
        **({} if on_gpu else {"Python and its libraries": memory.libraries}),
        "weights": weights,
        "trained parameters with gradients and optimizer state": planned.resident - weights,
        "peak of a pass or an optimizer step": planned.total - planned.resident,
    }
    capacity = f" of {torch.cuda.get_device_properties(device).total_memory / GIB:.1f} GiB" if on_gpu else ""
    host = f"; host memory {_gib(sum(planned.host.values()))}" if planned.host else ""
    return (
        f"planned per {'GPU, without the CUDA context' if on_gpu else 'rank'}: {memory.gib:.2f} GiB{capacity} ("
        + ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
        + f"{host}), at ZeRO stage {inputs.zero_stage}"
    )


def _gib(size_bytes: int) -> str:
    gib = size_bytes / GIB
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.3f}"


def _time(inputs: Inputs) -> str:
    limit_s = seconds_left()
    limit = "" if limit_s is None else f"the job's time limit is in {limit_s / 3600:.1f} h; "
    return f"{limit}log lines show the remaining time, from step {inputs.options.run.log_steps} on"
