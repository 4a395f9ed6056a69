"""Inspect the output of runs: list adapters, validate checkpoints and adapters. No model is loaded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from higgs_ds.adapters.load import Adapter, check_fit, read_adapter
from higgs_ds.adapters.lora_config import LoraValues
from higgs_ds.adapters.save import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from higgs_ds.bases.builtin import find_base
from higgs_ds.bases.conversion import native_folder
from higgs_ds.checkpoints.choice import recommend, run_of
from higgs_ds.checkpoints.folder import (
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    OPTIMIZER_STEM,
    RNG_FILE,
    adapter_folder,
    find_checkpoints,
    masters_in,
    read_state,
    step_of,
    trained_folder,
    why_incomplete,
)
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.checkpoints.trained_weights import FACTS_FILE, read_trained
from higgs_ds.common.errors import InputError
from higgs_ds.common.resources import command, default_cache_dir
from higgs_ds.common.run_files import ADAPTER_FOLDER, MOMENTS, STATE_FILE, TRAINED_FOLDER
from higgs_ds.common.tensor_files import shard_files, weight_files, weight_shapes
from higgs_ds.options.commands import InspectOptions
from higgs_ds.options.fields import FULL


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter's folder and its properties; `problem` says why the adapter is unusable."""

    path: str
    problem: str | None = None
    base: str | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: list[str] = field(default_factory=list)
    tensors: int = 0
    size_mib: float = 0.0
    base_in_4bit: bool = False
    in_full: str = "none"
    of_step: int | None = None
    changed: str = ""
    sha256: str = ""  # see `adapters.save.digest`
    same_as: str | None = None  # the run's adapter, if this is a copy of it
    take: str | None = None  # why this one is recommended, if it is

    def lines(self) -> list[str]:
        """Return the lines to print."""
        if self.problem:
            return [f"{self.path}", f"  unusable: {self.problem}"]
        four_bit = ", quantized to 4 bits" if self.base_in_4bit else ""
        step = f"step {self.of_step}, " if self.of_step is not None else ""
        if self.same_as is not None:
            return [f"{self.path}", f"  {step}the same adapter as {self.same_as}"]
        return [
            f"{self.path}",
            f"  rank {self.rank}, alpha {self.alpha}, on {', '.join(self.targets)}; "
            f"fully trained parts: {self.in_full}",
            f"  base: {self.base}{four_bit}",
            f"  {step}{self.tensors} tensors, {self.size_mib:.1f} MiB, {self.changed}",
        ]


def find_adapters(options: InspectOptions) -> None:
    """List the adapters below a folder, and say which one to take; if there are none, say where to search.

    Raises:
        InputError: there is no such folder.
    """
    if not options.path.is_dir():
        raise InputError(f"{options.path}: is not a folder")
    folders = [path.parent for path in sorted(options.path.rglob(ADAPTER_CONFIG))]
    found = _compared(options.path, [describe_adapter(folder) for folder in folders])
    if options.as_json:
        print(json.dumps([asdict(adapter) for adapter in found], indent=2))
    elif not found:
        print("\n".join(_tips(options.path)))
    else:
        print("\n".join(line for adapter in found for line in adapter.lines()))
        for adapter in found:
            if adapter.take is not None:
                print(f"Take {adapter.path}: {adapter.take}")
        print(f"Merge one: {command('merge')} --lora_adapter_path ADAPTER --output_path MERGED")


def describe_adapter(folder: Path) -> FoundAdapter:
    """Return the properties of an adapter, or why it is unusable."""
    step = step_of(folder.parent)
    try:
        adapter = read_adapter(folder)
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except InputError as error:
        return FoundAdapter(str(folder), "; ".join(error.problems), of_step=step)
    stat, values, targets = (folder / ADAPTER_WEIGHTS).stat(), LoraValues.of(config), config.get("target_modules") or []
    return FoundAdapter(
        path=str(folder),
        base=config.get("base_model_name_or_path"),
        rank=values.r,
        alpha=values.lora_alpha,
        targets=[targets] if isinstance(targets, str) else sorted(targets),
        tensors=len(weight_shapes([folder / ADAPTER_WEIGHTS])),
        size_mib=stat.st_size / 2**20,
        base_in_4bit=adapter.quantization is not None,
        in_full=str(adapter.full),
        of_step=step,
        changed=time.strftime("%Y-%m-%d %H:%M", time.localtime(stat.st_mtime)),
        sha256=adapter.record.sha256,
    )


def _compared(searched: Path, found: list[FoundAdapter]) -> list[FoundAdapter]:
    """Return the adapters with what is known from comparing them: `same_as` and `take`."""
    usable = {Path(adapter.path): adapter.sha256 for adapter in found if adapter.problem is None}
    chosen = recommend(searched, usable)

    def original(folder: Path) -> str | None:
        run = run_of(folder)
        of_run = run / ADAPTER_FOLDER if run else folder
        return str(of_run) if of_run != folder and folder in usable and usable.get(of_run) == usable[folder] else None

    return [
        replace(adapter, same_as=original(Path(adapter.path)), take=chosen.get(Path(adapter.path))) for adapter in found
    ]


def _tips(folder: Path) -> list[str]:
    checkpoints = find_checkpoints(folder)
    runs = sorted({path.parent for path in folder.rglob(STATE_FILE) if not path.parent.name.startswith("checkpoint-")})
    tips = [f"no adapter below {folder} (an adapter is a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS})"]
    if any(_is_full_finetuning(run) for run in runs):
        tips.append(
            "runs with --finetune full train no adapter: the model is in final_model/; "
            f"{command('export')} makes a model of a checkpoint-N"
        )
    elif checkpoints or runs:
        tips.append(
            f"runs found: {', '.join(map(str, runs or [folder]))}; a run writes its adapter to {ADAPTER_FOLDER}/ with "
            "its first checkpoint. A signal (SIGUSR1, SIGTERM) makes it save one"
        )
    else:
        tips.append("training writes adapters to OUTPUT_DIR/lora_adapters/, and prints the output folder at its end")
        tips.append(f"search a folder above it: {command('find_lora_adapters')} {folder.resolve().parent}")
    return tips


def _is_full_finetuning(run: Path) -> bool:
    try:
        return bool(read_state(run).settings.get("finetune") == FULL)
    except InputError:  # no state file, or one of another program
        return False


@dataclass
class Report:
    """The checks of a folder and their results."""

    path: str
    checks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, problem: str | None, detail: str = "") -> bool:
        """Add the result of one check. Returns whether it is good: `problem` is None."""
        self.checks.append({"what": what, "good": problem is None, "detail": problem or detail})
        return problem is None

    def add_result_of(self, what: str, check: Callable[[], str]) -> bool:
        """Run one check, which returns a detail or raises InputError, and add its result."""
        try:
            return self.add(what, None, check())
        except InputError as error:
            return self.add(what, "; ".join(error.problems))

    def show(self, as_json: bool) -> None:
        """Print the report.

        Raises:
            InputError: a check failed.
        """
        bad = [check["what"] for check in self.checks if not check["good"]]
        if as_json:
            print(json.dumps({"path": self.path, "good": not bad, "checks": self.checks}, indent=2))
        else:
            print(self.path)
            for check in self.checks:
                print(f"  {'good' if check['good'] else 'BAD '}  {check['what']}: {check['detail']}")
        if bad:
            raise InputError(f"{self.path}: failed checks: {', '.join(bad)}")


def validate_checkpoint(options: InspectOptions) -> None:
    """Check a checkpoint and print a report.

    Raises:
        InputError: the folder is not a checkpoint, or a check failed; the report is printed first.
    """
    folder = options.path
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder")
    if not (folder / MANIFEST_FILE).is_file() and not folder.name.startswith("checkpoint-"):
        found = ", ".join(map(str, find_checkpoints(folder)))
        raise InputError(f"{folder}: is not a checkpoint-N folder" + (f"; it holds {found}" if found else ""))
    report = Report(str(folder))
    is_full = (folder / TRAINED_FOLDER).is_dir() or _is_full_finetuning(folder)
    files = [MANIFEST_FILE, STATE_FILE, RNG_FILE]
    if is_full:  # the names of the other files depend on their number; the manifest lists them
        files.append(f"{TRAINED_FOLDER}/{FACTS_FILE}")
    else:
        files += [OPTIMIZER_FILE, f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}", f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"]
    missing = [name for name in files if not (folder / name).is_file()]
    report.add("files", f"missing {', '.join(missing)}" if missing else None, f"all {len(files)} exist")
    reason = why_incomplete(folder)
    report.add("as written", reason, "every file has the size and SHA-256 of its manifest")
    _check_weights(report, folder, is_full)
    if _has_averages(folder):
        _check_weights(report, folder, is_full, averaged=True)
    if reason is None:
        report.add_result_of("optimizer", lambda: _describe_moments(folder))
        report.add("state", None, _describe_state(read_state(folder)))
    report.show(options.as_json)
    if not options.as_json:
        print(f"to resume from it: --resume {folder}")


def _check_weights(report: Report, checkpoint: Path, is_full: bool, averaged: bool = False) -> None:
    what, adapter = "averaged " if averaged else "", adapter_folder(checkpoint, averaged)
    if is_full:
        report.add_result_of(f"{what}weights", lambda: _describe_weights(checkpoint, averaged))
    else:
        report.add_result_of(f"{what}adapter", lambda: _describe_adapter(read_adapter(adapter)))


def _describe_adapter(adapter: Adapter) -> str:
    return f"{len(adapter.factors)} layers adapted, fully trained beside them: {adapter.full}, all finite"


def _has_averages(checkpoint: Path) -> bool:
    """Whether a checkpoint has averaged weights (--ema_decay), or should have."""
    if adapter_folder(checkpoint, averaged=True).is_dir() or trained_folder(checkpoint, averaged=True).is_dir():
        return True
    try:
        return read_state(checkpoint).settings.get("ema_decay") is not None
    except InputError:  # which is reported by another check
        return False


def _describe_weights(checkpoint: Path, averaged: bool) -> str:
    weights, form = read_trained(checkpoint, averaged)
    broken = [name for name in weights if not weights[name].isfinite().all()]
    if broken:
        raise InputError(f"{broken[0]} holds NaN or infinity")
    groups = ", ".join(form.groups)
    return f"{len(weights)} weights fully fine-tuned ({groups}; optional parts: {form.full_parts}), all finite"


def _describe_state(state: TrainerState) -> str:
    best = state.best_step
    shown = f", best {state.compared_by.words} {state.best_value:.4g} at step {best}" if best is not None else ""
    return f"step {state.step} of {state.total_steps}, epoch {state.epoch:.2f}{shown}"


def _describe_moments(folder: Path) -> str:
    names, found = masters_in(folder), weight_shapes(shard_files(folder, OPTIMIZER_STEM))
    missing = sorted({f"{moment}.{name}" for moment in MOMENTS for name in names} - found.keys())
    if missing:
        raise InputError(f"missing {len(missing)} moments, for instance {missing[0]}")
    return "both of Adam's moments exist for every trained tensor"


def validate_adapter(options: InspectOptions) -> None:
    """Check an adapter, and whether it fits a base if one is given, and print a report.

    Raises:
        InputError: a check failed; the report is printed first.
    """
    report = Report(str(options.path))
    if report.add_result_of("files", lambda: _describe_adapter(read_adapter(options.path))):
        adapter = read_adapter(options.path)
        moved = adapter.full_weights or any(factors.b.any() for factors in adapter.factors.values())
        untrained = "every lora_B is zero, as before training: the adapter has no effect"
        report.add("trained", None if moved else untrained, "not every lora_B is zero")
        base = "the base's own" if adapter.quantization is None else f"{adapter.quantization.quant_type}"
        report.add("weights it was trained on", None, base)
        name = options.base_model_path
        if name is not None:
            report.add_result_of("fits", lambda: _describe_fit(adapter, options.path, name))
    report.show(options.as_json)


def _describe_fit(adapter: Adapter, folder: Path, base: str) -> str:
    base_folder = find_base(base, "--base_model_path", default_cache_dir())
    base_folder = native_folder(base_folder, "--base_model_path", default_cache_dir())
    check_fit(adapter, weight_shapes(weight_files(base_folder)), folder, base_folder)
    return f"every adapted layer exists in {base} with the same shape"
