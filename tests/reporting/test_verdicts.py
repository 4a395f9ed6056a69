"""What is said to be bad in the metrics of a run, and that nothing is said of good ones."""

from __future__ import annotations

from typing import Any

import pytest

from higgs_ds.reporting.verdicts import bad_signs


def training(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * (i + 1), "train/loss": loss} for i, loss in enumerate(losses)]


def validation(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": 10 * (i + 1), "val/loss": loss} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        training(3.0),
        training(3.0, 2.5, 2.0, 2.02),
        training(3.0, 4.0, 5.0),  # too few to tell
        validation(3.0, 2.0, 2.03),
        [{"step": 5, "train/loss": 1.0, "train/text_loss": None}],  # without text targets
        [{"step": 5, "sample/stop_rate": 0.0}, {"step": 9, "sample/stop_rate": 0.5, "sample/length_ratio": 1.9}],
    ],
)
def test_nothing_bad(lines: list[dict[str, Any]]) -> None:
    assert bad_signs(lines) == {}


@pytest.mark.parametrize(
    ("lines", "key", "text"),
    [
        (training(3.0, None, None), "train/loss", "the training loss was not finite at step 20"),
        (validation(3.0, None), "val/loss", "the validation loss was not finite at step 20"),
        (
            training(3.0, 2.0, 2.2, 2.5, 2.7, 2.9, 3.0, 3.2),
            "train/loss",
            "the training loss rises: 2.3500 on average in steps 30 to 40, 3.1000 in steps 70 to 80; a lower --lr may "
            "help",
        ),
        (
            validation(3.0, 2.0, 2.5),
            "val/loss",
            "the validation loss rises: 2.0000 at step 20, 2.5000 at step 30; a checkpoint near step 20 is likely to "
            "be better",
        ),
        ([{"step": 5, "skipped_steps": 1}], "skipped_steps", "1 step skipped: a loss or a gradient was not finite"),
        (
            [{"step": 5, "sample/stop_rate": 1.0}, {"step": 9, "sample/stop_rate": 0.0}],
            "sample/stop_rate",
            "stop rate 0: none of the last samples ended on its own",
        ),
        (
            [{"step": 5, "sample/stop_rate": 1.0, "sample/length_ratio": 0.25}],
            "sample/length_ratio",
            "the last samples have 0.25 times the length of their references",
        ),
        (
            [{"step": 5, "train/audio_loss": 1.5, "train/audio_loss_varying": 4.0}],
            "train/audio_loss",
            "the audio loss of 1.5000 looks small: some codebooks have the same code in all the data; without them, it "
            "is 4.0000",
        ),
    ],
)
def test_what_is_bad(lines: list[dict[str, Any]], key: str, text: str) -> None:
    assert bad_signs(lines) == {key: text}
