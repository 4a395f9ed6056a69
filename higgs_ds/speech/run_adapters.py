"""The adapters in the checkpoints of a run that are to be evaluated, and why they cannot be."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from higgs_ds.adapters.files import AdapterFiles, problems_of, read_files, why_not_scalable
from higgs_ds.checkpoints.folder import adapter_folder, find_checkpoints, step_of, trained_folder, why_incomplete
from higgs_ds.common.errors import InputError, collect_problems
from higgs_ds.common.resources import command
from higgs_ds.options.commands import EvaluateOptions


@dataclass(frozen=True)
class Candidate:
    """The adapter of a checkpoint, or that of its averaged weights, at a strength.

    `sha256`: see `adapters.save.digest`.
    """

    step: int
    averaged: bool
    strength: float
    adapter: Path
    sha256: str

    @property
    def label(self) -> str:
        averaged = " averaged" if self.averaged else ""
        return f"checkpoint-{self.step}{averaged}" + (f" x {self.strength:g}" if self.strength != 1 else "")

    @property
    def folder_name(self) -> str:
        return self.label.replace(" averaged", "-ema").replace(" x ", "-x")


@dataclass(frozen=True)
class RunAdapters:
    """The candidates of a run, earliest first; a line for each checkpoint that was skipped; the base that they name.

    `base_weights`: the digest of that base, if it is recorded.
    """

    candidates: tuple[Candidate, ...]
    skipped: tuple[str, ...]
    base: str | None
    base_weights: str | None


def checkpoint_option_problems(options: EvaluateOptions) -> list[str]:
    """Return which options contradict --checkpoints, and what is wrong with --strengths."""
    run, base = options.checkpoints, options.base_model_path
    problems = []
    if options.lora_adapter_path is not None:
        problems.append("--lora_adapter_path: --checkpoints evaluates the adapters of a run; give one of the two")
    if options.lora_scale != 1:
        problems.append(f"--lora_scale {options.lora_scale:g}: with --checkpoints, give --strengths instead")
    if options.compare_with is not None:
        problems.append("--compare_with: --checkpoints compares the checkpoints with each other; leave it out")
    if run is not None and base is not None and run.resolve() in Path(base).resolve().parents:
        problems.append(
            f"--base_model_path {base}: is a model of the run, which has learned already what its adapters add; leave "
            "it out, or give the run's base"
        )
    strengths = options.strengths or ()
    problems += [
        f"--strengths {s}: must be a finite number, for instance 0.6" for s in strengths if not math.isfinite(s)
    ]
    counts = Counter(f"{strength:g}" for strength in strengths)
    return problems + [f"--strengths {strength}: is given {n} times" for strength, n in counts.items() if n > 1]


def find_run_adapters(run: Path, strengths: Sequence[float]) -> RunAdapters:
    """Return the adapters in the complete checkpoints of a run, also those of averaged weights, each at each strength.

    Raises:
        InputError: with all problems: there is no such run, it trained no adapters, or they cannot be used.
    """
    checkpoints = sorted(_complete(run), key=lambda checkpoint: step_of(checkpoint[0]) or 0)
    skipped = tuple(f"{folder}: skipped: {reason}" for folder, reason in checkpoints if reason is not None)
    complete = [folder for folder, reason in checkpoints if reason is None]
    if not complete:
        raise InputError([f"--checkpoints {run}: has no complete checkpoint", *skipped])
    problems: list[str] = []
    candidates, forms, first = list[Candidate](), dict[object, Path](), None
    for checkpoint, averaged in itertools.product(complete, (False, True)):
        folder = adapter_folder(checkpoint, averaged)
        if averaged and not folder.is_dir():
            continue
        files = collect_problems(problems, lambda folder=folder: _read(folder, strengths))  # type: ignore[misc]
        if files is None:
            continue
        first = first or files
        forms.setdefault(_form(files), checkpoint)
        step = step_of(checkpoint)
        assert step is not None
        candidates += [Candidate(step, averaged, strength, folder, files.record.sha256) for strength in strengths]
    if len(forms) > 1:
        named = " and ".join(checkpoint.name for checkpoint in forms.values())
        problems.append(
            f"--checkpoints {run}: the adapters of {named} were trained on different bases, or with different parts "
            "beside them; keep the checkpoints of one run in the folder"
        )
    if problems or first is None:
        raise InputError(problems)
    return RunAdapters(tuple(candidates), skipped, first.record.base, first.record.base_weights)


def _complete(run: Path) -> list[tuple[Path, str | None]]:
    """Return the checkpoints of a run with adapters, and why each is incomplete. Raises InputError if it is no run."""
    if not run.is_dir():
        raise InputError(f"--checkpoints {run}: no such folder")
    if step_of(run) is not None:
        raise InputError(f"--checkpoints {run}: is one checkpoint; give the folder of its run, {run.parent}")
    found = find_checkpoints(run)
    if not found:
        raise InputError(f"--checkpoints {run}: has no checkpoint-N/; give the --output_dir of a training run")
    full = [folder.name for folder in found if trained_folder(folder).is_dir()]
    if full:
        raise InputError(
            f"--checkpoints {run}: is a run with --finetune full, whose checkpoints have no adapters; write each as a "
            f"model, {command('export')} --checkpoint_path {run / full[0]} --output_path MODEL, and evaluate it with "
            "--base_model_path MODEL"
        )
    return [(folder, why_incomplete(folder)) for folder in found]


def _read(folder: Path, strengths: Sequence[float]) -> AdapterFiles:
    files = read_files(folder)
    problems = problems_of(files)
    for strength in strengths:
        problems += why_not_scalable(files, strength, "--strengths") if strength != 1 else []
    if problems:
        raise InputError([f"{folder}: {problem}" for problem in problems])
    return files


def _form(files: AdapterFiles) -> tuple[object, ...]:
    """Return what the base must be for an adapter: equal for all checkpoints of a run."""
    record = files.record
    quantization = repr(files.quantization)
    return record.base_weights or record.base, quantization, repr(files.full_parts)
