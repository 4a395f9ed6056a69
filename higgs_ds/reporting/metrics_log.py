"""The metrics that a run reports: first to `metrics.jsonl`, then to the console. Rank 0 only."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from higgs_ds.common.console import is_quiet, say
from higgs_ds.common.distributed import is_main
from higgs_ds.common.errors import NotFiniteError
from higgs_ds.common.files import saving, write_text
from higgs_ds.common.run_files import METRICS_FILE
from higgs_ds.reporting.log_lines import log_lines
from higgs_ds.reporting.trackers import Sound, Tracker

# The metrics that the progress bar shows beside the remaining time, with their short names.
_PROGRESS_BAR_KEYS = {
    "train/text_loss": "text", "train/audio_loss": "audio", "lr": "lr", "grad_norm": "grad", "tokens_per_s": "tok/s",
    "peak_memory_gib": "GiB",
}  # fmt: skip


class MetricsLog:
    """`metrics.jsonl` and the progress bar. On resume, lines after the checkpoint's step are removed first."""

    def __init__(
        self,
        output_dir: Path,
        first_step: int,
        total_steps: int,
        again: Collection[str] = (),
        seconds_left: float | None = None,
        open_trackers: Callable[[], list[Tracker]] = list,
    ) -> None:
        """Start a log, or continue one after `first_step`.

        Args:
            again: metrics that are still to be measured at `first_step`; lines with them, if any, are removed.
            seconds_left: seconds until a time limit ends the run.
            open_trackers: opens further destinations of the metrics; called on rank 0 only.
        """
        self.path = output_dir / METRICS_FILE
        self.total_steps = total_steps
        self.ends_at = None if seconds_left is None else time.monotonic() + seconds_left
        self.first_line: tuple[int, float] | None = None  # the step and time of the first with a speed
        self.trackers: list[Tracker] = []
        if is_main():
            _truncate(self.path, first_step, again)
            self.trackers = open_trackers()
        # None: no bar if stderr is not a terminal; the log lines are enough there.
        disable = None if is_main() and not is_quiet() else True
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="training", unit="step", disable=disable, dynamic_ncols=True
        )

    def close(self) -> None:
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()

    def advance(self) -> None:
        self.bar.update()

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Append one line and print its main values (see `log_lines`). A part without targets has a loss of null.

        Raises:
            NotFiniteError: the total loss is not finite; the line is written first.
        """
        values = values | {"peak_memory_gib": peak_memory_gib()}
        line = {"step": step, "epoch": round(epoch, 4), **values}
        if is_main():
            clean = {key: value if math.isfinite(value) else None for key, value in line.items()}
            with saving(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
            for tracker in self.trackers:
                tracker.write(step, {key: value for key, value in clean.items() if value is not None and key != "step"})
        self.bar.set_postfix(
            {short: f"{values[key]:.4g}" for key, short in _PROGRESS_BAR_KEYS.items() if key in values}
        )
        step_time_s = values.get("step_time_s")
        left_s = None if step_time_s is None else (self.total_steps - step) * self._pace_s(step, step_time_s)
        for text in log_lines(step, self.total_steps, values, left_s):
            say(text)
        self._compare_with_limit(step, step_time_s)
        for key in ("train/loss", "val/loss"):
            if not math.isfinite(values.get(key, 0.0)):
                error = NotFiniteError(f"{key} is {values[key]} at step {step}; see {self.path}. Lower --lr")
                error.on_all_ranks = True
                raise error

    def _pace_s(self, step: int, step_time_s: float) -> float:
        """Return the seconds that a step takes with all that is done between steps, known from the second line on."""
        now = time.monotonic()
        self.first_line = self.first_line or (step, now)
        first_step, first_at = self.first_line
        return max(step_time_s, (now - first_at) / (step - first_step)) if step > first_step else step_time_s

    def write_sounds(self, step: int, sounds: Sequence[Sound]) -> None:
        """Pass samples on to the trackers; `metrics.jsonl` has none."""
        for tracker in self.trackers:
            for sound in sounds:
                tracker.write_sound(step, sound)

    def _compare_with_limit(self, step: int, step_time_s: float | None) -> None:
        """After the first log line, print a note if the steps will take longer than the time limit allows."""
        if self.ends_at is None or step_time_s is None:
            return
        needed_s, left_s = (self.total_steps - step) * step_time_s, self.ends_at - time.monotonic()
        self.ends_at = None
        if needed_s > left_s:
            say(
                f"note: the remaining steps take {needed_s / 3600:.1f} h or more, and the job's time limit is in "
                f"{left_s / 3600:.1f} h. When the job is started again, it resumes from a checkpoint; "
                "launch/slurm/train.sbatch ensures this"
            )


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`; none before the first is written."""
    path = output_dir / METRICS_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def last_values(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the last value of each metric in lines of `metrics.jsonl`."""
    last: dict[str, Any] = {}
    for line in lines:
        last |= {key: value for key, value in line.items() if value is not None}
    return last


def peak_memory_gib() -> float:
    """Return this rank's peak memory so far, in GiB: allocated on its GPU, or resident in host memory without one."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def _truncate(path: Path, last_step: int, again: Collection[str]) -> None:
    """Remove the lines of later steps, those of `again`, and a line that was cut short when the run was killed."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            if last_step == 0 or values["step"] > last_step:  # a run from step 0 does everything again
                continue
            if values["step"] == last_step and any(metric in values for metric in again):
                continue
        except (ValueError, TypeError, KeyError, RecursionError):  # not a line of this project
            continue
        kept.append(line + "\n")
    write_text(path, "".join(kept))
