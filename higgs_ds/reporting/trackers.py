"""Destinations of a run's metrics beside `metrics.jsonl`: TensorBoard files, Weights & Biases. Rank 0 only."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from higgs_ds.common.files import saving, write_json
from higgs_ds.options.fields import TENSORBOARD, WANDB

TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb_run.json"  # the id of the output folder's W&B run, for --resume


class Tracker(Protocol):
    """Receives the metrics of a step."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, output_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hide what an earlier run wrote for later steps.
        self.writer = SummaryWriter(str(output_dir / TENSORBOARD_FOLDER), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    """Uses W&B's own settings (WANDB_PROJECT, WANDB_MODE, its login); without a network, set WANDB_MODE=offline."""

    def __init__(self, output_dir: Path, first_step: int, settings: dict[str, Any]) -> None:
        import wandb

        path = output_dir / WANDB_FILE
        if first_step == 0 or not path.is_file():
            write_json(path, {"id": uuid.uuid4().hex[:12]})
        identity = json.loads(path.read_text(encoding="utf-8"))["id"]
        self.run = wandb.init(
            dir=str(output_dir),
            id=identity,
            resume="allow",
            name=output_dir.name,
            config=settings,
            settings=wandb.Settings(silent=True),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def open_trackers(names: Sequence[str], output_dir: Path, first_step: int, settings: dict[str, Any]) -> list[Tracker]:
    """Open the named trackers for a run that starts, or resumes, after `first_step`. Raises SaveError."""
    makers: dict[str, Callable[[], Tracker]] = {
        TENSORBOARD: lambda: _TensorBoard(output_dir, first_step),
        WANDB: lambda: _Wandb(output_dir, first_step, settings),
    }
    with saving(output_dir):
        return [makers[name]() for name in names]
