"""The curves of a run's page: which metrics are drawn together, their points, and the drawings."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from higgs_ds.reporting.log_lines import losses_of_manifests

MOST_POINTS = 1000  # per curve; of more points, every n-th is drawn
Points = dict[str, tuple[list[int], list[float]]]  # steps and values of each metric of a curve, by its label


@dataclass(frozen=True)
class Curve:
    """A plot of metrics over steps: their keys, and the label of each."""

    title: str
    keys: dict[str, str]
    logarithmic: bool = False


EVALUATED = {"eval": "weights", "eval_ema": "averaged weights"}
TRAIN_AND_VAL = {"train": "training", "val": "validation", "val_ema": "validation, averaged weights"}


def _train_and_val_curve(title: str, name: str) -> Curve:
    return Curve(title, {f"{kind}/{name}": shown for kind, shown in TRAIN_AND_VAL.items()})


def _by_codebook(kind: str, shown: str, num_codebooks: int) -> Curve:
    return Curve(f"audio loss by codebook, {shown}", {f"{kind}/audio_loss/cb{k}": str(k) for k in range(num_codebooks)})


def _evaluation_curve(title: str, name: str, keys: Sequence[str]) -> Curve:
    averaged = f"eval_ema/{name}" in keys
    labels = {f"{kind}/{name}": shown for kind, shown in EVALUATED.items()} if averaged else {f"eval/{name}": ""}
    return Curve(f"evaluation: {title}", labels)


def _rewards(kind: str, shown: str) -> Curve:
    names = ("chosen", "rejected", "margins")
    return Curve(f"rewards of pairs, {shown}", {f"{kind}/rewards/{name}": name for name in names})


def curves_of(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Curve, Points]]:
    """Return the curves that have values in lines of `metrics.jsonl`, with their points."""
    keys = dict.fromkeys(key for line in lines for key in line)
    num_codebooks = sum(re.fullmatch(r"train/audio_loss/cb\d+", key) is not None for key in keys)
    groups = sorted(key.removeprefix("lr/") for key in keys if key.startswith("lr/"))
    found = [(curve, _points(lines, curve)) for curve in _curves(num_codebooks, groups, list(keys))]
    return [(curve, points) for curve, points in found if points]


def is_flat(points: Points) -> bool:
    """Return whether a curve says nothing: each of its metrics has one value only."""
    return all(len(set(values)) == 1 for _, values in points.values())


def _curves(num_codebooks: int, groups: Sequence[str], keys: Sequence[str]) -> list[Curve]:
    return [
        _train_and_val_curve("loss", "loss"),
        *(
            Curve(f"loss by manifest, {shown}", losses_of_manifests(keys, kind))
            for kind, shown in TRAIN_AND_VAL.items()
        ),
        _train_and_val_curve("text loss", "text_loss"),
        _train_and_val_curve("audio loss", "audio_loss"),
        _train_and_val_curve("audio loss without constant codebooks", "audio_loss_varying"),
        *(_by_codebook(kind, shown, num_codebooks) for kind, shown in TRAIN_AND_VAL.items()),
        _train_and_val_curve("text accuracy", "text_accuracy"),
        _train_and_val_curve("audio accuracy", "audio_accuracy"),
        _train_and_val_curve("accuracy of the end-of-stream code", "eos_accuracy"),
        *(_rewards(kind, shown) for kind, shown in TRAIN_AND_VAL.items()),
        _train_and_val_curve("share of pairs whose chosen sample has the higher reward", "rewards/accuracies"),
        *(
            _evaluation_curve(title, name, keys)
            for title, name in (
                ("share of samples that stopped on their own", "stop_rate"),
                ("word error rate", "word_error_rate"),
                ("character error rate", "character_error_rate"),
                ("speaker similarity", "speaker_similarity"),
                ("mos", "mos"),
                ("mel distance, dB", "mel_distance_db"),
                ("length relative to the reference", "length_ratio"),
                ("median pitch, Hz", "median_pitch_hz"),
            )
        ),
        Curve("learning rate", {"lr": "--lr" if groups else ""} | {f"lr/{group}": group for group in groups}),
        Curve("gradient norm", {"grad_norm": ""}, logarithmic=True),
        Curve("tokens per second", {"tokens_per_s": ""}),
        Curve("peak memory, GiB", {"peak_memory_gib": ""}),
        Curve("share of positions that are padding", {"padding": ""}),
        Curve("share of samples that stopped on their own", {"sample/stop_rate": ""}),
        Curve("length of samples relative to the reference", {"sample/length_ratio": ""}),
    ]


def _points(lines: Sequence[Mapping[str, Any]], curve: Curve) -> Points:
    """Return steps and values of each of a curve's metrics that has values."""
    found = {}
    for key, label in curve.keys.items():
        at = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if at:
            every = -(-len(at) // MOST_POINTS)
            kept = [*at[:-1:every], at[-1]]
            found[label] = ([step for step, _ in kept], [value for _, value in kept])
    return found


def draw(curve: Curve, points: Points) -> str:
    """Draw a curve as SVG, with matplotlib."""
    mpl = _import_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": curve.title, "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.8))
        axes = figure.add_axes((0.13, 0.1, 0.84, 0.79))
        for label, (steps, values) in points.items():
            axes.plot(steps, values, label=label, linewidth=1.2, marker="." if len(steps) < 30 else None)
        axes.set_title(curve.title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        numbers = [value for _, values in points.values() for value in values]
        if curve.logarithmic and min(numbers) > 0 and max(numbers) > 10 * min(numbers):
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        if len(points) > 1 or "" not in points:
            axes.legend(fontsize=7, ncols=2)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()[content.getvalue().index("<svg") :]


def _import_matplotlib() -> ModuleType:
    """Import matplotlib, whatever backend MPLBACKEND names: an image file needs none.

    Notebooks hand the variable down to their commands, and the import fails if that backend is not installed there.
    Other code of this process gets the backend as usual.
    """
    first = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if first and backend:
        with contextlib.suppress(ValueError):  # it is not installed
            mpl.rcParams["backend"] = backend
    return mpl
