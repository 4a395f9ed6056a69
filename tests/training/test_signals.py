"""A signal during a validation interrupts it, and the resumed run repeats it once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from higgs_ds.model.loss import LossWeights
from higgs_ds.reporting.metrics_log import MetricsLog
from higgs_ds.training.signals import StopSignals
from higgs_ds.training.validation import validate


class CountingEngine:
    """Counts every batch as one target with a loss of 1 in each part."""

    weights = LossWeights.of(1, 1, 8, None)

    def __init__(self) -> None:
        self.batches = 0

    def evaluate(self, batches: Iterable[object]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.batches = sum(1 for _ in batches)
        seen = torch.full((11,), float(self.batches))
        return seen[:9], seen[:9], seen


class Samples:
    """Four samples; a signal comes while the second is fetched, if `number` is given."""

    def __init__(self, number: int | None) -> None:
        self.number = number

    def __len__(self) -> int:
        return 4

    def batch(self, indices: list[int]) -> list[int]:
        if self.number and indices == [1]:
            os.kill(os.getpid(), self.number)
        return indices


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_stops_validation_at_the_next_batch(number: int) -> None:
    engine = CountingEngine()
    handler = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.stop_reason() is None
        assert validate(engine, Samples(number), 1, signals) is None
        assert engine.batches == 2
        assert signals.stop_reason() == signal.Signals(number).name
    assert signal.getsignal(number) == handler


def test_validation_without_a_signal_covers_all_samples() -> None:
    with StopSignals() as signals:
        values = validate(CountingEngine(), Samples(None), 1, signals)
    assert values is not None
    assert values["val/audio_loss"] == 1


@pytest.mark.parametrize(("due", "left"), [(False, ["train/loss", "val/loss"]), (True, ["train/loss"])])
def test_a_validation_that_is_due_is_not_written_twice(tmp_path: Path, due: bool, left: list[str]) -> None:
    lines = [{"step": 2, "train/loss": 1.0}, {"step": 2, "val/loss": 1.0}, {"step": 3, "train/loss": 1.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricsLog(tmp_path, 2, 6, due).close()
    assert [list(json.loads(line))[1] for line in path.read_text().splitlines()] == left
