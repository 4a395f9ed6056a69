"""What a run prints of its metrics: lines of at most LINE_WIDTH characters. `metrics.jsonl` has everything."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta

from higgs_ds.common.words import shortened

LINE_WIDTH = 100
DAY_S = 24 * 3600
EVALUATIONS = {"eval": "evaluation", "eval_ema": "evaluation, averaged weights"}
# What a line shows of an evaluation beside the stop rate, where it was measured.
SHOWN = {
    "word_error_rate": "word error rate", "speaker_similarity": "speaker similarity", "mos": "mos",
    "length_ratio": "length ratio", "mel_distance_db": "mel distance",
}  # fmt: skip
VALIDATIONS = {"val": "validation", "val_ema": "validation, averaged weights"}


def losses_of_manifests(keys: Iterable[str], kind: str = "val") -> dict[str, str]:
    """Return the keys of the losses of single manifests, each with the name of its manifest."""
    found = (re.fullmatch(rf"{kind}/(.+)/loss", key) for key in dict.fromkeys(keys))
    return {match[0]: match[1] for match in found if match}


def log_lines(step: int, total_steps: int, values: Mapping[str, float], left_s: float | None = None) -> list[str]:
    """Return the lines of some metrics of a step.

    Args:
        values: of training, of a validation, of an evaluation or of samples, by the keys of `metrics.jsonl`.
        left_s: seconds until the last step, where they are known.
    """
    start = f"step {step}/{total_steps}: "
    lines = []
    if "train/loss" in values or "lr" in values:
        lines.append(_training_line(start, values, left_s))
    for kind, name in VALIDATIONS.items():
        if f"{kind}/loss" in values:
            lines.append(_joined(f"{start}{name}: {_losses(kind, values)}", *_accuracies(kind, values)))
    for key, name in losses_of_manifests(values).items():
        loss = f": loss {_loss(values[key])}"
        lines.append(f"{start}{shortened(f'validation of {name}', LINE_WIDTH - len(start) - len(loss))}{loss}")
    for kind, name in EVALUATIONS.items():
        if f"{kind}/stop_rate" in values:
            shown = [f"{words} {values[key]:.3g}" for key, words in _shown(kind).items() if key in values]
            lines.append(_joined(f"{start}{name}: {_stop_rate(values[f'{kind}/stop_rate'])}", *shown))
    if "sample/stop_rate" in values:
        lines.append(_samples_line(start, values))
    return lines


def _training_line(start: str, values: Mapping[str, float], left_s: float | None) -> str:
    losses = _losses("train", values) if "train/loss" in values else "no step was applied"
    speed = values.get("tokens_per_s")
    parts = _accuracies("train", values) if "train/rewards/margins" in values else []
    parts += [f"lr {values['lr']:.3g}"] if "lr" in values else []
    parts += [] if speed is None else [f"{speed:.0f} tok/s" if speed < 9999.5 else f"{speed / 1000:.0f}k tok/s"]
    parts += [f"{_duration(left_s)} left"] if left_s else []
    parts += [f"{int(values['skipped_steps'])} skipped"] if "skipped_steps" in values else []
    return _joined(f"{start}{losses}", *parts)


def _joined(*parts: str) -> str:
    """Join parts with commas. The last ones are left out if a line would be too long."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) <= LINE_WIDTH:
            line += f", {part}"
    return line


def _losses(kind: str, values: Mapping[str, float]) -> str:
    """Return the total loss, and the losses of the parts that have targets."""
    named = {name: values.get(f"{kind}/{name}_loss", math.nan) for name in ("text", "audio")}
    parts = " ".join(f"{name} {_loss(loss)}" for name, loss in named.items() if not math.isnan(loss))
    return f"loss {_loss(values[f'{kind}/loss'])}" + (f" ({parts})" if parts else "")


def _accuracies(kind: str, values: Mapping[str, float]) -> list[str]:
    if f"{kind}/rewards/margins" in values:
        margin, right = (values[f"{kind}/rewards/{name}"] for name in ("margins", "accuracies"))
        return [f"reward margin {margin:.3g}", f"of the right sign in {right:.1%}"]
    names = {"audio": "audio_accuracy", "end": "eos_accuracy"}
    found = [f"{name} {values[f'{kind}/{key}']:.3f}" for name, key in names.items() if f"{kind}/{key}" in values]
    return [f"accuracy: {' '.join(found)}"] if found else []


def _samples_line(start: str, values: Mapping[str, float]) -> str:
    length = values.get("sample/length_ratio")
    parts = [] if length is None else [f"length {length:.3g} of the references'"]
    return _joined(f"{start}samples: {_stop_rate(values['sample/stop_rate'])}", *parts)


def _shown(kind: str) -> dict[str, str]:
    return {f"{kind}/{name}": words for name, words in SHOWN.items()}


def _stop_rate(rate: float) -> str:
    return f"stop rate {rate:.3g}{' (bad: none ended on its own)' if rate == 0 else ''}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if 0.001 <= abs(value) < 100 or value == 0 else f"{value:.1e}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds < DAY_S else f"{seconds / DAY_S:.1f} d"
