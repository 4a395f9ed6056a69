"""`checkpoint-N/`: everything that a run needs to go on as if it had never stopped, complete or not there at all.

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
from higgs_ds.common.files import sha256_of
from higgs_ds.common.run_files import ADAPTER_FOLDER, STATE_FILE, TRAINED_FOLDER
from higgs_ds.common.tensor_files import StoredTensors, shard_files

MANIFEST_FILE = "manifest.json"
OPTIMIZER_STEM, RNG_FILE = "optimizer", "rng_state.safetensors"
OPTIMIZER_FILE = f"{OPTIMIZER_STEM}.safetensors"  # of large ones there are several
_NAME = re.compile(r"checkpoint-(\d+)$")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def checkpoints_to_delete(output_dir: Path, state: TrainerState, keep: int) -> list[Path]:
    """Checkpoints up to the state's step that are neither among the `keep` newest nor the best by validation loss.

    Later ones are of a run that was taken up again from an earlier checkpoint; they are not this run's to delete.
    """
    past = [folder for folder in find_checkpoints(output_dir) if _step_of(folder) <= state.step]
    losses = {folder: state.val_losses.get(str(_step_of(folder)), math.inf) for folder in past}
    best = min((folder for folder in past if losses[folder] < math.inf), key=losses.__getitem__, default=None)
    return [folder for folder in past[keep:] if folder != best]


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, by its path in the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def why_incomplete(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None where all are there as they were written."""
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        manifest = {str(name): (file["size"], file["sha256"]) for name, file in json.loads(text).items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({type(error).__name__})"
    for name, (size, sha256) in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size or sha256_of(path) != sha256:
            return f"its {name} is not as it was written"
    return None


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    if not output_dir.is_dir():
        return []
    return sorted(filter(lambda path: _NAME.match(path.name), output_dir.iterdir()), key=_step_of, reverse=True)


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder, by its name; None for another folder."""
    match = _NAME.match(folder.name)
    return int(match[1]) if match else None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_complete(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is complete, and which newer ones were passed over and why."""
    passed_over: list[str] = []
    for folder in find_checkpoints(output_dir):
        reason = why_incomplete(folder)
        if reason is None:
            return folder, passed_over
        passed_over.append(f"{folder}: passed over: {reason}")
    return None, passed_over


def read_state(folder: Path) -> TrainerState:
    """The state of a complete checkpoint."""
    values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return TrainerState(**{key: value for key, value in values.items() if key != "finished"})


def masters_in(folder: Path) -> Mapping[str, torch.Tensor]:
    """The float32 masters in a checkpoint, by name: of adapters, or of weights that are trained in full."""
    if (folder / TRAINED_FOLDER).is_dir():
        return StoredTensors(shard_files(folder / TRAINED_FOLDER))
    return StoredTensors([folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS])


def moments_in(folder: Path, moment: str) -> Mapping[str, torch.Tensor]:
    """One of Adam's moments in a checkpoint, by the names of the masters."""
    return StoredTensors(shard_files(folder, OPTIMIZER_STEM), f"{moment}.")
