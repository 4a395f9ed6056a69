"""`checkpoint-N/`: everything that a run needs to resume as if it had never stopped, written atomically.

Rank 0 writes what all ranks have gathered; a checkpoint does not depend on the ZeRO stage or the number of ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from higgs_ds.adapters.save import ADAPTER_WEIGHTS
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import sha256_of
from higgs_ds.common.run_files import (
    ADAPTER_FOLDER,
    AVERAGED_ADAPTER_FOLDER,
    AVERAGED_TRAINED_FOLDER,
    STATE_FILE,
    TRAINED_FOLDER,
)
from higgs_ds.common.tensor_files import StoredTensors, shard_files, weight_shapes
from higgs_ds.options.metrics import METRICS

MANIFEST_FILE = "manifest.json"
OPTIMIZER_STEM, RNG_FILE = "optimizer", "rng_state.safetensors"
OPTIMIZER_FILE = f"{OPTIMIZER_STEM}.safetensors"  # large optimizer states are split into several files
_NAME = re.compile(r"checkpoint-(\d+)$")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def checkpoints_to_delete(output_dir: Path, state: TrainerState, keep: int) -> list[Path]:
    """Return the checkpoints up to the state's step, except the `keep` newest and the best by the state's metric.

    Later checkpoints exist if a run was resumed from an earlier one; this run must not delete them.
    """
    past = [folder for folder in find_checkpoints(output_dir) if _step_of(folder) <= state.step]
    ranking = state.ranking()
    ranks = {folder: ranking.get(_step_of(folder), math.inf) for folder in reversed(past)}  # of equal ones, the first
    best = min((folder for folder in ranks if ranks[folder] < math.inf), key=ranks.__getitem__, default=None)
    return [folder for folder in past[keep:] if folder != best]


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of every file, by its path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def why_incomplete(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None if all exist and match the manifest."""
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        manifest = {str(name): (file["size"], file["sha256"]) for name, file in json.loads(text).items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        return f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"
    missing = {STATE_FILE, RNG_FILE} - manifest.keys()
    if missing:
        return f"{MANIFEST_FILE} does not list {', '.join(sorted(missing))}"
    for name, (size, sha256) in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"missing {name}"
        if path.stat().st_size != size or sha256_of(path) != sha256:
            return f"{name} has changed since it was written"
    try:
        weight_shapes([folder / name for name in manifest if name.endswith(".safetensors")])
        read_state(folder)
    except InputError as error:
        return str(error)
    return None


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, newest first."""
    if not output_dir.is_dir():
        return []
    return sorted(filter(lambda path: _NAME.match(path.name), output_dir.iterdir()), key=_step_of, reverse=True)


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint folder; None for other folders."""
    match = _NAME.match(folder.name)
    return int(match[1]) if match else None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_complete(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint, and a note on each newer one that was skipped, with the reason."""
    skipped: list[str] = []
    for folder in find_checkpoints(output_dir):
        reason = why_incomplete(folder)
        if reason is None:
            return folder, skipped
        skipped.append(f"{folder}: skipped: {reason}")
    return None, skipped


def read_state(folder: Path) -> TrainerState:
    """Read the trainer state of a checkpoint or a run. Raises InputError if this version did not write it."""
    try:
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        state = TrainerState(**{key: value for key, value in values.items() if key != "finished"})
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{folder / STATE_FILE}: cannot be read: {type(error).__name__}: {error}") from error
    if type(state.step) is not int or not 0 <= state.step <= state.total_steps:
        raise InputError(f"{folder / STATE_FILE}: step {state.step!r} of {state.total_steps!r} is not possible")
    if not isinstance(state.metric, str) or state.metric not in METRICS:
        raise InputError(f"{folder / STATE_FILE}: {state.metric!r} is not a metric of this version")
    return state


def adapter_folder(checkpoint: Path, averaged: bool = False) -> Path:
    """Return the folder of the adapter in a checkpoint, or of the adapter of averaged weights (--ema_decay)."""
    return checkpoint / (AVERAGED_ADAPTER_FOLDER if averaged else ADAPTER_FOLDER)


def trained_folder(checkpoint: Path, averaged: bool = False) -> Path:
    """Return the folder of the fully fine-tuned weights in a checkpoint, or of their averages (--ema_decay)."""
    return checkpoint / (AVERAGED_TRAINED_FOLDER if averaged else TRAINED_FOLDER)


def masters_in(folder: Path, averaged: bool = False) -> Mapping[str, torch.Tensor]:
    """Return the float32 master weights in a checkpoint, adapters or fully fine-tuned, or their averages, by name."""
    full = trained_folder(folder, averaged)
    return StoredTensors(shard_files(full) if full.is_dir() else [adapter_folder(folder, averaged) / ADAPTER_WEIGHTS])


def moments_in(folder: Path, moment: str) -> Mapping[str, torch.Tensor]:
    """Return one of Adam's moments in a checkpoint, by the names of the master weights."""
    return StoredTensors(shard_files(folder, OPTIMIZER_STEM), f"{moment}.")
