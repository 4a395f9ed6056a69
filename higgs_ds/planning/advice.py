"""What would make a plan fit, and what could be done with memory that is left."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from higgs_ds.common.resources import DEFAULT_DS_CONFIG
from higgs_ds.options import ds_config
from higgs_ds.options.checks import check_options
from higgs_ds.options.compatibility import unsupported
from higgs_ds.options.fields import LORA
from higgs_ds.options.train import recompute_every
from higgs_ds.planning.plan import AUTO_CHECKPOINTING, CONTEXT_BYTES, plan
from higgs_ds.planning.weights import Setting
from higgs_ds.planning.zero_stages import Plan

GIB = 2**30
CONTEXT_GIB = CONTEXT_BYTES / GIB
SHARDED_RANKS = 4  # number of GPUs in the proposal of ZeRO-3, if the plan is for one GPU
MOST_PAIRS = 3  # that are listed
USED_SHARE = 0.9  # of the memory, by what is proposed for room that is left: fragmentation is not planned


@dataclass(frozen=True)
class Change:
    """A proposed change, as it is written on the command line, and the setting with it."""

    text: str
    setting: Setting


def advice(setting: Setting, given: set[str], planned: Plan, device_gib: float) -> list[str]:
    """Return lines with the changes that help, cheapest first: each alone; if none is enough, pairs, then as many
    options as it takes.
    """
    lines = ["", "what would help, each on its own:"]
    helpful = []
    for change in _changes(setting, given):
        changed = plan(change.setting)
        if (planned.total - changed.total) / GIB >= 0.005:
            helpful.append((change, changed))
            lines.append(f"  {change.text:<44}  {_saving(planned, changed, device_gib)}")
    if any(_fits(changed, device_gib) for _, changed in helpful):
        return lines
    changes = [change for change, _ in helpful]
    pairs = itertools.islice(_fitting_pairs(setting, changes, device_gib), MOST_PAIRS)
    found = [f"  {pair.text:<44}  {_saving(planned, plan(pair.setting), device_gib)}" for pair in pairs]
    if found:
        return [*lines, "no single change is enough; two that are, cheapest first:", *found]
    return lines + _together(setting, changes, planned, device_gib)


def _fitting_pairs(setting: Setting, changes: list[Change], device_gib: float) -> Iterator[Change]:
    """Yield the pairs of changes with which the plan fits, those of cheap changes first."""
    by_cost = sorted(itertools.combinations(range(len(changes)), 2), key=lambda pair: (sum(pair), pair))
    for first, second in by_cost:
        pair = _combined(setting, changes[first], changes[second])
        if pair is not None and _fits(plan(pair.setting), device_gib):
            yield pair


def _together(setting: Setting, changes: list[Change], planned: Plan, device_gib: float) -> list[str]:
    """Return lines with as many options combined as it takes to fit, or with all that help."""
    together, best = Change("", setting), planned
    for change in changes:
        if change.setting.ds_settings is not setting.ds_settings or _fits(best, device_gib):
            continue
        wider = _combined(setting, together, change)
        if wider is not None and plan(wider.setting).total < best.total:
            together, best = wider, plan(wider.setting)
    return [f"together: {together.text.strip()}\n  {_saving(planned, best, device_gib)}"] if together.text else []


def _combined(original: Setting, first: Change, second: Change) -> Change | None:
    """Return two changes as one; None if both change the same, or if they do not go together."""
    before = original.options.flat()
    changed = [
        {name: value for name, value in change.setting.options.flat().items() if value != before[name]}
        for change in (first, second)
    ]
    files = [change.setting for change in (first, second) if change.setting.ds_settings is not original.ds_settings]
    if changed[0].keys() & changed[1].keys() or len(files) > 1:
        return None
    options = original.options.replace(**changed[0] | changed[1])
    base = files[0] if files else original
    setting = replace(original, options=options, ds_settings=base.ds_settings, ranks=base.ranks)
    if _problems(setting) != _problems(original):
        return None
    return Change(f"{first.text} {second.text}", setting)


def _problems(setting: Setting) -> list[str]:
    return check_options(setting.options) + unsupported(setting.options, setting.ds_settings, on_gpu=True)


def _needed_gib(planned: Plan) -> float:
    return planned.total / GIB + CONTEXT_GIB


def _fits(planned: Plan, device_gib: float) -> bool:
    return _needed_gib(planned) <= device_gib


def _saving(planned: Plan, changed: Plan, device_gib: float) -> str:
    verdict = "fits" if _fits(changed, device_gib) else "does not fit"
    return f"saves {(planned.total - changed.total) / GIB:>6.2f} GiB: {_needed_gib(changed):>6.2f} GiB, {verdict}"


def _changes(setting: Setting, given: set[str]) -> Iterator[Change]:
    """Yield every change that can be proposed, cheapest first."""
    _, length = setting.batch_shape()
    optim, group_size = setting.options.optim, setting.options.objective.group_size
    by_tokens = optim.max_tokens_per_batch is not None
    smaller = (
        {"max_tokens_per_batch": group_size * length} if by_tokens else {"batch_size": max(1, optim.batch_size // 2)}
    )
    candidates: list[dict[str, Any]] = [
        {"activation_checkpointing": "every_layer"},
        smaller,
        *([] if setting.adapted else [{"load_in_4bit": True}]),  # the adapter belongs to the base as it is
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
            continue  # not all of them are available with --finetune full
        if any(flat[name] != value for name, value in values.items()):
            yield _option_change(setting, values)
    for name in ("small_card.json", "zero2_offload.json", "zero3.json"):
        path = DEFAULT_DS_CONFIG.parent / name
        ranks = max(setting.ranks, SHARDED_RANKS if name == "zero3.json" and setting.ranks == 1 else 1)
        if path.is_file():
            settings, options = ds_config.resolve(ds_config.read_ds_config(path), setting.options, given, ranks)
            text = f"--deepspeed ds_configs/{name}{'' if ranks == setting.ranks else f' on {ranks} GPUs'}"
            yield Change(text, replace(setting, options=options, ds_settings=settings, ranks=ranks))
    if length >= 512:
        yield from _half_as_long(setting, length // 2, by_tokens)


def _half_as_long(setting: Setting, limit: int, by_tokens: bool) -> Iterator[Change]:
    """Yield the change to shorter samples; of known samples, one that keeps some, with the number that it drops."""
    tokens = setting.options.objective.group_size * limit
    values = {"max_seq_len": limit} | ({"max_tokens_per_batch": tokens} if by_tokens else {})
    if setting.lengths is None:
        yield _option_change(setting, values)
        return
    kept = len(setting.lengths.up_to(limit))
    if kept:
        dropped = len(setting.lengths.tokens) - kept
        shorter = _option_change(setting, values)
        yield replace(shorter, text=f"{shorter.text} (drops {dropped:,} samples)")


def _option_change(setting: Setting, values: dict[str, Any]) -> Change:
    text = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items())
    return Change(text, replace(setting, options=setting.options.replace(**values)))


def uses_of_room(setting: Setting, device_gib: float) -> list[str]:
    """Return lines with what the memory that is left would be enough for, each on its own; empty if for nothing."""
    limit_gib = USED_SHARE * device_gib
    uses = [*_larger_batch(setting, limit_gib), *_faster(setting, limit_gib)]
    lines = [f"  {use.text:<44}  {_needed_gib(plan(use.setting)):>6.2f} GiB" for use in uses]
    return ["", "room is left for, each on its own:", *lines] if lines else []


def _larger_batch(setting: Setting, limit_gib: float) -> Iterator[Change]:
    """Yield the largest micro-batch, by doubling, that fits with fewer accumulated ones, for the same steps."""
    optim = setting.options.optim
    name = "batch_size" if optim.max_tokens_per_batch is None else "max_tokens_per_batch"
    now, factor, largest = getattr(optim, name), 2, None
    while optim.grad_accum % factor == 0:
        change = _option_change(setting, {name: factor * now, "grad_accum": optim.grad_accum // factor})
        if not _fits(plan(change.setting), limit_gib):
            break
        factor, largest = 2 * factor, change
    if largest is not None:
        yield largest


def _faster(setting: Setting, limit_gib: float) -> Iterator[Change]:
    """Yield the options that save memory and take time, and that the run could do without."""
    model, optim = setting.options.model, setting.options.optim
    every = model.activation_checkpointing
    fewer = AUTO_CHECKPOINTING[: AUTO_CHECKPOINTING.index(every)] if every in AUTO_CHECKPOINTING else ()
    candidates: list[tuple[str, dict[str, Any]]] = [
        (f"--activation_checkpointing {choice}", {"activation_checkpointing": choice, "offload_checkpoints": False})
        for choice in fewer
    ]
    if optim.optim != "adamw":
        candidates.append(("--optim adamw", {"optim": "adamw"}))
    without: list[tuple[bool, dict[str, Any]]] = [
        (model.offload_embeddings, {"offload_embeddings": False}),
        (model.offload_checkpoints, {"offload_checkpoints": False}),
        (model.load_in_4bit and not setting.adapted, {"load_in_4bit": False, "finetune": LORA}),
    ]
    candidates += [(f"no --{next(iter(values))}", values) for is_set, values in without if is_set]
    found = set()
    for text, values in candidates:
        kind = next(iter(values))
        change = Change(text, replace(setting, options=setting.options.replace(**values)))
        if kind not in found and _fits(plan(change.setting), limit_gib):
            found.add(kind)
            yield change
