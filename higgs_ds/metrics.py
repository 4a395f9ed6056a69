"""What a run tells: `metrics.jsonl` first, then the console. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from higgs_ds.data.collate import Batch
from higgs_ds.distributed import is_main, rank, sum_over_ranks, world_size
from higgs_ds.engine import Step
from higgs_ds.errors import NotFiniteError
from higgs_ds.files import saving, write_text
from higgs_ds.loss import LossWeights, accuracies, mean_losses
from higgs_ds.report_to import Sink

METRICS_FILE, SETTINGS_FILE, SUMMARY_FILE = "metrics.jsonl", "settings.json", "data_summary.txt"
DROPPED_FILE = "dropped_samples.txt"
SAMPLES_FOLDER, PROMPTS_FILE, REFERENCE_FOLDER = "samples", "prompts.json", "reference"
# What the progress bar shows beside the remaining time, and how it is called there.
_ON_THE_BAR = {
    "train/text_loss": "text", "train/audio_loss": "audio", "lr": "lr", "grad_norm": "grad", "tokens_per_s": "tok/s",
    "peak_memory_gib": "GiB",
}  # fmt: skip


_quiet = False


def be_quiet() -> None:
    """Have `say` print nothing, and show no progress bar, in this process."""
    global _quiet
    _quiet = True


def say(text: str) -> None:
    """Print a line on rank 0, above the progress bar where there is one; nothing with --quiet."""
    if not _quiet:
        warn(text)


def warn(text: str) -> None:
    """Print a line on rank 0 in any case."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()  # into a file, too, where lines would wait for each other


class Meter:
    """Sums and counts of the steps since the last log line; reduced over ranks and divided only when asked."""

    def __init__(self, weights: LossWeights, device: torch.device) -> None:
        self.weights = weights
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.sums = torch.zeros(1 + len(self.weights.codebooks), dtype=torch.float64, device=self.device)
        self.counts = torch.zeros_like(self.sums)
        self.hits = self.sums.new_zeros(len(self.sums) + 2)
        self.num_samples = 0
        self.num_tokens = 0
        self.num_positions = 0  # with padding
        self.started_at = time.perf_counter()

    def add(self, step: Step, batches: Sequence[Batch]) -> None:
        """Add one step, of which only the time counts where it was not taken."""
        self.steps += 1
        if step.taken:
            self.sums += step.sums.sum(0)
            self.counts += step.counts
            self.hits += step.hits
        self.num_samples += sum(batch.num_samples for batch in batches)
        self.num_tokens += sum(batch.num_tokens for batch in batches)
        self.num_positions += sum(batch.places.numel() for batch in batches)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block, which is not training, out of the speed."""
        paused_at = time.perf_counter()
        yield
        self.started_at += time.perf_counter() - paused_at

    def state(self) -> dict[str, Any]:
        """What this rank has added since the last log line, as JSON values."""
        added = {"sums": self.sums.tolist(), "counts": self.counts.tolist(), "hits": self.hits.tolist()}
        return added | {name: getattr(self, name) for name in ("num_samples", "num_tokens", "num_positions", "steps")}

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Go on from the `state` of every rank of an earlier run; of another number of ranks, rank 0 takes all."""
        if not states:
            return
        mine = states if len(states) != world_size() else [states[rank()]]
        if len(states) == world_size() or is_main():
            for name in ("sums", "hits"):
                of_all = torch.tensor([state[name] for state in mine], dtype=torch.float64).sum(0)
                setattr(self, name, getattr(self, name) + of_all.to(self.device))
            for name in ("num_samples", "num_tokens", "num_positions"):
                setattr(self, name, getattr(self, name) + sum(state[name] for state in mine))
        self.counts += torch.tensor(states[0]["counts"], dtype=torch.float64).to(self.device)
        self.steps += states[0]["steps"]

    def read(self) -> dict[str, float]:
        """Mean losses, accuracies, padding and speed since the last reset, over all ranks; no losses where no step was
        taken.

        Every rank must call this.
        """
        own = [self.num_samples, self.num_tokens, self.num_positions]
        sizes = torch.tensor(own, dtype=torch.float64, device=self.device)
        num_samples, num_tokens, num_positions = sum_over_ranks(sizes).tolist()
        losses = mean_losses(sum_over_ranks(self.sums), self.counts, self.weights)
        hits = sum_over_ranks(self.hits)
        means = losses.metrics("train") | accuracies(hits, self.counts, "train") if self.counts.any() else {}
        seconds = time.perf_counter() - self.started_at
        speed = {
            "samples_per_s": num_samples / seconds,
            "tokens_per_s": num_tokens / seconds,
            "step_time_s": seconds / self.steps,
        }
        return means | {"padding": 1 - num_tokens / num_positions} | speed


class MetricsLog:
    """`metrics.jsonl` and the progress bar. On resume, lines behind the checkpoint's step are cut off first."""

    def __init__(
        self,
        output_dir: Path,
        first_step: int,
        total_steps: int,
        validation_due: bool = False,
        seconds_left: float | None = None,
        open_sinks: Callable[[], list[Sink]] = list,
    ) -> None:
        """Begin, or go on behind `first_step`.

        Args:
            validation_due: that of `first_step` is still to be done; its line, if there is one, is cut too.
            seconds_left: until a time limit ends the run.
            open_sinks: where numbers go besides, opened on rank 0 alone.
        """
        self.path = output_dir / METRICS_FILE
        self.total_steps = total_steps
        self.ends_at = None if seconds_left is None else time.monotonic() + seconds_left
        self.sinks: list[Sink] = []
        if is_main():
            _cut(self.path, first_step, validation_due)
            self.sinks = open_sinks()
        # None: no bar where stderr is a file, which log lines are enough for.
        disable = None if is_main() and not _quiet else True
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="training", unit="step", disable=disable, dynamic_ncols=True
        )

    def close(self) -> None:
        self.bar.close()
        for sink in self.sinks:
            sink.close()

    def advance(self) -> None:
        self.bar.update()

    def write(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Append one line, in which the loss of a part without targets is null, and print what matters in it.

        Raises NotFiniteError, behind that, where the total loss is not finite.
        """
        values = values | {"peak_memory_gib": peak_memory_gib()}
        line = {"step": step, "epoch": round(epoch, 4), **values}
        if is_main():
            clean = {key: value if math.isfinite(value) else None for key, value in line.items()}
            with saving(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
            for sink in self.sinks:
                sink.write(step, {key: value for key, value in clean.items() if value is not None and key != "step"})
        shown = {key: value for key, value in values.items() if "/cb" not in key}
        self.bar.set_postfix({short: f"{values[key]:.4g}" for key, short in _ON_THE_BAR.items() if key in values})
        step_time_s = values.get("step_time_s")
        left_s = (self.total_steps - step) * (step_time_s or 0)
        left = f", {timedelta(seconds=round(left_s))} left" if left_s else ""
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        say(f"step {step} (epoch {epoch:.2f}{left}): {numbers}")
        self._compare_with_limit(step, step_time_s)
        for key in ("train/loss", "val/loss"):
            if not math.isfinite(values.get(key, 0.0)):
                error = NotFiniteError(f"{key} is {values[key]} at step {step}; see {self.path}. Lower --lr")
                error.on_all_ranks = True
                raise error

    def _compare_with_limit(self, step: int, step_time_s: float | None) -> None:
        """Say once, behind the first log line, where the steps will take longer than there is time."""
        if self.ends_at is None or step_time_s is None:
            return
        needed_s, left_s = (self.total_steps - step) * step_time_s, self.ends_at - time.monotonic()
        self.ends_at = None
        if needed_s > left_s:
            say(
                f"note: the steps to come take {needed_s / 3600:.1f} h or more, and the job's time limit is in "
                f"{left_s / 3600:.1f} h. It goes on from a checkpoint when it is started again, which "
                "launch/slurm/train.sbatch sees to"
            )


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; none before the first is written."""
    path = output_dir / METRICS_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def last_values(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The last of each number in lines of `metrics.jsonl`."""
    last: dict[str, Any] = {}
    for line in lines:
        last |= {key: value for key, value in line.items() if value is not None}
    return last


def peak_memory_gib() -> float:
    """This rank's peak so far, in GiB: allocated on its GPU, or resident where it has none."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def _cut(path: Path, last_step: int, validation_due: bool) -> None:
    """Drop the lines of later steps, and a line that was cut short when the run was killed."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            if values["step"] > last_step or (validation_due and values["step"] == last_step and "val/loss" in values):
                continue
        except ValueError:
            continue
        kept.append(line + "\n")
    write_text(path, "".join(kept))
