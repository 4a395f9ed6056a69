"""`checkpoint-N/`: everything that a run needs to go on as if it had never stopped, complete or not there at all.

Rank 0 writes what all ranks have gathered; a checkpoint does not depend on the ZeRO stage or the number of ranks.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from higgs_ds.distributed import gather_objects, on_main_with, rank
from higgs_ds.engine import Engine
from higgs_ds.errors import InputError
from higgs_ds.export import ADAPTER_FOLDER, ADAPTER_WEIGHTS, AdapterFormat, write_adapter
from higgs_ds.files import remove_folder, replaced_folder, saving, sha256_of, write_json
from higgs_ds.metrics import Meter
from higgs_ds.optimizers import MOMENTS
from higgs_ds.shards import StoredTensors, shard_files, write_shards
from higgs_ds.trained import TRAINED_FOLDER, FullFormat, write_trained

STATE_FILE, MANIFEST_FILE = "trainer_state.json", "manifest.json"
OPTIMIZER_STEM, RNG_FILE = "optimizer", "rng_state.safetensors"
OPTIMIZER_FILE = f"{OPTIMIZER_STEM}.safetensors"  # of large ones there are several
_NAME = re.compile(r"checkpoint-(\d+)$")


@dataclass
class TrainerState:
    """Where a run stands. `step` counts optimizer steps; the place in the data follows from it and the settings."""

    total_steps: int
    settings: dict[str, Any]
    step: int = 0
    epoch: float = 0.0
    skipped: list[int] = field(default_factory=list)  # steps that were not taken, as something was not finite
    has_learned: bool = False  # whether any step so far had a learning rate above 0
    validation_due: bool = False  # whether a signal came before the validation of this step was done
    val_losses: dict[str, float] = field(default_factory=dict)  # of each validation so far, by its step
    stopped_early: bool = False  # whether validation losses have ended the run before its last step
    scheduler: dict[str, Any] = field(default_factory=dict)
    meters: list[dict[str, Any]] = field(default_factory=list)  # each rank's, of the steps since the last log line

    def skips(self) -> dict[str, float]:
        """For the log: how many steps were not taken, once there are any."""
        return {"skipped_steps": len(self.skipped)} if self.skipped else {}

    def to_json(self) -> dict[str, Any]:
        return {"finished": self.stopped_early or self.step >= self.total_steps, **asdict(self)}

    @property
    def best_step(self) -> int | None:
        """The step of the lowest validation loss so far."""
        return int(min(self.val_losses, key=self.val_losses.__getitem__)) if self.val_losses else None

    def is_out_of_patience(self, patience: int | None, min_delta: float) -> bool:
        """Whether that many validations in a row, up to the last, were not lower than all before by `min_delta`."""
        if patience is None:
            return False
        lowest, without = math.inf, 0
        for _, loss in sorted(self.val_losses.items(), key=lambda item: int(item[0])):
            lower = loss < lowest - min_delta
            lowest, without = (loss, 0) if lower else (lowest, without + 1)
        return without >= patience


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def save_checkpoint(
    output_dir: Path,
    engine: Engine,
    state: TrainerState,
    meter: Meter,
    form: AdapterFormat | FullFormat,
    keep: int | None = None,
) -> None:
    """Write `checkpoint-N/` and renew `lora_adapters/` and `trainer_state.json` beside it. Every rank must call this.

    Weights that are trained in full go from the ranks to the files one after another, about a gigabyte at a time.

    Args:
        keep: how many of the newest checkpoints are kept, besides the best; None for all.

    Raises, on every rank, SaveError where it cannot be written and NotFiniteError where training has gone astray; what
    was saved before stays as it was.
    """
    state.scheduler = engine.scheduler.state_dict()
    state.meters = gather_objects(meter.state())
    rng_states = gather_objects(_rng_state())
    target = checkpoint_folder(output_dir, state.step)
    sizes = engine.master_bytes

    def write(tensors: Iterator[torch.Tensor]) -> None:
        with saving(target), replaced_folder(target) as folder:
            masters = islice(tensors, len(sizes))
            if isinstance(form, FullFormat):
                write_trained(folder / TRAINED_FOLDER, sizes, masters, form)
            else:
                named = dict(zip(sizes, masters, strict=True))
                write_adapter(folder / ADAPTER_FOLDER, named, form, state.has_learned)
            of_moments = {f"{moment}.{name}": size for moment in MOMENTS for name, size in sizes.items()}
            write_shards(of_moments, tensors, folder, OPTIMIZER_STEM)
            by_rank = {f"{r}.{kind}": tensor for r, states in enumerate(rng_states) for kind, tensor in states.items()}
            save_file(by_rank, folder / RNG_FILE)
            write_json(folder / STATE_FILE, state.to_json())
            write_json(folder / MANIFEST_FILE, _manifest(folder))
        publish(target, output_dir, state, keep)

    on_main_with(engine.gather(None, *MOMENTS), write)


def publish(checkpoint: Path, output_dir: Path, state: TrainerState, keep: int | None) -> None:
    """Renew what lies beside the checkpoints from one of them, with its state, and delete those that are not kept.

    Raises SaveError.
    """
    if (checkpoint / ADAPTER_FOLDER).is_dir():
        with saving(output_dir / ADAPTER_FOLDER), replaced_folder(output_dir / ADAPTER_FOLDER) as folder:
            shutil.copytree(checkpoint / ADAPTER_FOLDER, folder, dirs_exist_ok=True)
    with saving(output_dir / STATE_FILE):
        write_json(output_dir / STATE_FILE, state.to_json())
    for folder in superfluous(output_dir, state, keep) if keep is not None else ():
        with saving(folder):
            remove_folder(folder)


def superfluous(output_dir: Path, state: TrainerState, keep: int) -> list[Path]:
    """Checkpoints up to the state's step that are neither among the `keep` newest nor the best by validation loss.

    Later ones are of a run that was taken up again from an earlier checkpoint; they are not this run's to delete.
    """
    past = [folder for folder in find_checkpoints(output_dir) if _step_of(folder) <= state.step]
    losses = {folder: state.val_losses.get(str(_step_of(folder)), math.inf) for folder in past}
    best = min((folder for folder in past if losses[folder] < math.inf), key=losses.__getitem__, default=None)
    return [folder for folder in past[keep:] if folder != best]


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
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


def check_same_run(saved: TrainerState, fresh: TrainerState, folder: Path) -> None:
    """Raise InputError where a checkpoint's settings are not those of the run that would go on from it."""
    names = saved.settings.keys() | fresh.settings.keys()
    problems = [
        f"{folder}: was trained with {name} {saved.settings.get(name)!r}, now it is {fresh.settings.get(name)!r}"
        for name in sorted(names)
        if saved.settings.get(name) != fresh.settings.get(name)
    ]
    if saved.total_steps != fresh.total_steps:
        problems.append(f"{folder}: was trained for {saved.total_steps} steps, now it would be {fresh.total_steps}")
    if problems:
        raise InputError([*problems, "--resume goes on with the same settings; begin anew in another --output_dir"])


def masters_in(folder: Path) -> Mapping[str, torch.Tensor]:
    """The float32 masters in a checkpoint, by name: of adapters, or of weights that are trained in full."""
    if (folder / TRAINED_FOLDER).is_dir():
        return StoredTensors(shard_files(folder / TRAINED_FOLDER))
    return StoredTensors([folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS])


def moments_in(folder: Path, moment: str) -> Mapping[str, torch.Tensor]:
    """One of Adam's moments in a checkpoint, by the names of the masters."""
    return StoredTensors(shard_files(folder, OPTIMIZER_STEM), f"{moment}.")


def load_masters_into(folder: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Give what is trained in a model the values of a checkpoint, before an engine takes the model."""
    tensors = masters_in(folder)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_into_engine(folder: Path, engine: Engine, state: TrainerState) -> None:
    """Give an engine the masters, moments, schedule and random state of a checkpoint. Every rank must call this."""
    moments = {moment: moments_in(folder, moment) for moment in MOMENTS}
    engine.restore(masters_in(folder), moments, state.step - len(state.skipped))
    engine.restore_schedule(state.scheduler)
    states = load_file(folder / RNG_FILE)
    if f"{rank()}.cpu" in states:
        torch.set_rng_state(states[f"{rank()}.cpu"])
    if torch.cuda.is_available() and f"{rank()}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{rank()}.cuda"])


def _rng_state() -> dict[str, torch.Tensor]:
    """This rank's generators, which dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
