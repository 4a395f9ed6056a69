"""What is bad in the metrics of a run, in words. The report page marks it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from higgs_ds.common.words import counted

RISE = 0.02  # of a loss above its lowest value, which is more than noise
LEAST_POINTS = 4  # of a training loss, before its trend is judged

Line = Mapping[str, Any]


def bad_signs(lines: Sequence[Line]) -> dict[str, str]:
    """Return what is bad, by the metric in which it shows, in the order of importance.

    Args:
        lines: those of `metrics.jsonl`; a total loss of None was not finite.
    """
    found = {key: text for key in ("train/loss", "val/loss") if (text := _not_finite(lines, key))}
    skipped = _last(lines, "skipped_steps")
    if skipped:
        found["skipped_steps"] = f"{counted(int(skipped), 'step')} skipped: a loss or a gradient was not finite"
    for key, judge in (("train/loss", _rising_training), ("val/loss", _rising_validation)):
        text = judge(_points(lines, key))
        if text and key not in found:
            found[key] = text
    rate, ratio = _last(lines, "sample/stop_rate"), _last(lines, "sample/length_ratio")
    if rate == 0:
        found["sample/stop_rate"] = "stop rate 0: none of the last samples ended on its own"
    if ratio is not None and not 0.5 <= ratio <= 2:
        found["sample/length_ratio"] = f"the last samples have {ratio:.3g} times the length of their references"
    varying, loss = (_last(lines, f"train/audio_loss{name}") for name in ("_varying", ""))
    if varying is not None and loss is not None:
        found["train/audio_loss"] = (
            f"the audio loss of {loss:.4f} looks small: some codebooks have the same code in all the data; without "
            f"them, it is {varying:.4f}"
        )
    return found


def _points(lines: Sequence[Line], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _last(lines: Sequence[Line], key: str) -> float | None:
    points = _points(lines, key)
    return points[-1][1] if points else None


def _not_finite(lines: Sequence[Line], key: str) -> str:
    steps = [line["step"] for line in lines if key in line and line[key] is None]
    what = "training" if key == "train/loss" else "validation"
    return f"the {what} loss was not finite at step {steps[0]}" if steps else ""


def _rising_training(points: Sequence[tuple[int, float]]) -> str:
    """Compare the mean of the last quarter with that of the quarter with the lowest."""
    size = len(points) // 4
    if len(points) < LEAST_POINTS:
        return ""
    quarters = [points[i * size : (i + 1) * size] for i in range(3)] + [points[3 * size :]]
    means = [math.fsum(loss for _, loss in quarter) / len(quarter) for quarter in quarters]
    if means[-1] <= min(means) + RISE * abs(min(means)):
        return ""
    lowest = quarters[means.index(min(means))]
    return (
        f"the training loss rises: {min(means):.4f} on average in steps {lowest[0][0]} to {lowest[-1][0]}, "
        f"{means[-1]:.4f} in steps {quarters[-1][0][0]} to {quarters[-1][-1][0]}; a lower --lr may help"
    )


def _rising_validation(points: Sequence[tuple[int, float]]) -> str:
    if not points:
        return ""
    (step, lowest), (last_step, last) = min(points, key=lambda point: point[1]), points[-1]
    if last <= lowest + RISE * abs(lowest):
        return ""
    return (
        f"the validation loss rises: {lowest:.4f} at step {step}, {last:.4f} at step {last_step}; a checkpoint near "
        f"step {step} is likely to be better"
    )
