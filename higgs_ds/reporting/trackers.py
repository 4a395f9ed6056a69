"""Destinations of a run's metrics beside `metrics.jsonl`: TensorBoard files, Weights & Biases. Rank 0 only."""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import write_json
from higgs_ds.common.run_files import METRICS_FILE
from higgs_ds.options.fields import TENSORBOARD, WANDB
from higgs_ds.reporting.optional import OptionalOutput

TENSORBOARD_FOLDER = "tensorboard"
_SHOWN = {TENSORBOARD: "TensorBoard", WANDB: "Weights & Biases"}
WANDB_FILE = "wandb_run.json"  # the id of the output folder's W&B run, for --resume
_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")  # modes of W&B that send nothing


@dataclass(frozen=True)
class Sound:
    """A sample or a reference, as a mono WAV file of 16 bits, with the words of its prompt."""

    name: str
    path: Path
    words: str


class Tracker(Protocol):
    """Receives the metrics and the samples of a step."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def write_sound(self, step: int, sound: Sound) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, output_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _hide_errors_of_writing_threads()
        # Hide what an earlier run wrote for later steps.
        self.writer = SummaryWriter(str(output_dir / TENSORBOARD_FOLDER), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def write_sound(self, step: int, sound: Sound) -> None:
        import soundfile

        waveform, sample_rate = soundfile.read(sound.path, dtype="float32")
        self.writer.add_audio(sound.name, waveform, step, sample_rate)
        self.writer.add_text(sound.name, sound.words, step)

    def close(self) -> None:
        self.writer.close()


@functools.cache
def _hide_errors_of_writing_threads() -> None:
    """From now on, print no traceback of TensorBoard's threads: the next call of the writer raises their error."""
    previous = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        if not type(error.thread).__module__.startswith("tensorboard."):
            previous(error)

    threading.excepthook = hook


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

    def write_sound(self, step: int, sound: Sound) -> None:
        import wandb

        self.run.log({sound.name: wandb.Audio(str(sound.path), caption=sound.words)}, step=step)

    def close(self) -> None:
        self.run.finish()


class _Optional:
    """Passes metrics on to a tracker until it fails: neither a writing thread nor a W&B run recovers from an error."""

    def __init__(self, shown: str, make: Callable[[], Tracker]) -> None:
        self.output = OptionalOutput(
            f"logging to {shown}", f"no more metrics are sent there, but {METRICS_FILE} has all of them"
        )
        self.tracker = self.output.attempt(make)

    def write(self, step: int, values: dict[str, float]) -> None:
        tracker = self.tracker
        if tracker is not None and not self.output.failed:
            self.output.attempt(lambda: tracker.write(step, values))

    def write_sound(self, step: int, sound: Sound) -> None:
        tracker = self.tracker
        if tracker is not None and not self.output.failed:
            self.output.attempt(lambda: tracker.write_sound(step, sound))

    def close(self) -> None:
        if self.tracker is not None:
            self.output.attempt(self.tracker.close)


def check_wandb_login(names: Sequence[str]) -> None:
    """Raise InputError if a W&B run could not start: no login, one that the server rejects, or no connection to it.

    The modes of W&B that send nothing need no login. A package that is not installed is reported elsewhere.
    """
    if WANDB not in names or importlib.util.find_spec("wandb") is None:
        return
    import wandb

    advice = (
        "run `wandb login` or set WANDB_API_KEY; or set WANDB_MODE=offline, and send the run later with `wandb sync`"
    )
    try:
        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        if mode not in _WITHOUT_LOGIN and not wandb.login(prompt=False, verify=True):
            raise InputError(f"--report_to wandb: you are not logged in to Weights & Biases; {advice}")
    except (wandb.Error, ValueError) as error:  # ValueError: of a setting
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"--report_to wandb: the login cannot be verified ({reason}); {advice}") from error
    finally:
        wandb.teardown()  # its service has threads, and this process may still fork


def open_trackers(names: Sequence[str], output_dir: Path, first_step: int, settings: dict[str, Any]) -> list[Tracker]:
    """Open the named trackers for a run that starts, or resumes, after `first_step`.

    The failure of a tracker is reported once, and does not end the run.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        TENSORBOARD: lambda: _TensorBoard(output_dir, first_step),
        WANDB: lambda: _Wandb(output_dir, first_step, settings),
    }
    return [_Optional(_SHOWN[name], makers[name]) for name in names]
