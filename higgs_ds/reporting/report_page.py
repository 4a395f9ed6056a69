"""`report.html`: a run on one self-contained page, made from the files in its output folder."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

from higgs_ds.checkpoints.folder import find_checkpoints
from higgs_ds.common.console import say
from higgs_ds.common.distributed import on_main
from higgs_ds.common.files import write_text
from higgs_ds.common.run_files import (
    ADAPTER_FOLDER,
    AVERAGED_ADAPTER_FOLDER,
    DROPPED_FILE,
    FLAGGED_FILE,
    METRICS_FILE,
    PROMPTS_FILE,
    REFERENCE_FOLDER,
    SAMPLES_FOLDER,
    SETTINGS_FILE,
    STATE_FILE,
    SUMMARY_FILE,
)
from higgs_ds.data.audio import as_ogg
from higgs_ds.options.fields import FULL
from higgs_ds.options.train import TrainOptions
from higgs_ds.reporting.log_lines import losses_of_manifests
from higgs_ds.reporting.metrics_log import last_values, read_metrics
from higgs_ds.reporting.optional import OptionalOutput

REPORT_FILE = "report.html"
EVERY_S = 60.0
SOUND_BYTES = 2_500_000  # of Ogg Vorbis in the page, where base64 makes it a third larger
MOST_POINTS = 1000  # per curve; of more points, every n-th is drawn


@dataclass(frozen=True)
class Curve:
    """A plot of metrics over steps: their keys, and the label of each."""

    title: str
    keys: dict[str, str]
    logarithmic: bool = False


class Reporter:
    """Writes a run's page, during the run at most once in EVERY_S. Every rank must call its methods."""

    def __init__(self, output_dir: Path, wanted: bool) -> None:
        self.output_dir, self.wanted = output_dir, wanted
        self.output = OptionalOutput(f"writing {REPORT_FILE}", "the page is tried again at a later validation")
        self.tried_at = -EVERY_S

    def write(self, at_end: bool = False) -> None:
        """Write the page, if it is due. A failure is reported once, and does not end the run."""

        def write() -> None:
            if at_end or time.monotonic() - self.tried_at > EVERY_S:
                self.output.attempt(lambda: write_report(self.output_dir))
                self.tried_at = time.monotonic()

        if self.wanted:
            on_main(write)

    def report_path(self) -> None:
        """Print where the page is, unless it could not be written."""
        if self.wanted and not self.output.failed:
            say(f"report: {self.output_dir / REPORT_FILE}")


TRAIN_AND_VAL = {"train": "training", "val": "validation", "val_ema": "validation, averaged weights"}


def _train_and_val_curve(title: str, name: str) -> Curve:
    return Curve(title, {f"{kind}/{name}": shown for kind, shown in TRAIN_AND_VAL.items()})


def _by_codebook(kind: str, shown: str, num_codebooks: int) -> Curve:
    return Curve(f"audio loss by codebook, {shown}", {f"{kind}/audio_loss/cb{k}": str(k) for k in range(num_codebooks)})


def _curves(num_codebooks: int, groups: Sequence[str], keys: Collection[str]) -> list[Curve]:
    return [
        _train_and_val_curve("loss", "loss"),
        *(
            Curve(f"loss by manifest, {shown}", losses_of_manifests(keys, kind))
            for kind, shown in TRAIN_AND_VAL.items()
        ),
        _train_and_val_curve("text loss", "text_loss"),
        _train_and_val_curve("audio loss", "audio_loss"),
        *(_by_codebook(kind, shown, num_codebooks) for kind, shown in TRAIN_AND_VAL.items()),
        _train_and_val_curve("text accuracy", "text_accuracy"),
        _train_and_val_curve("audio accuracy", "audio_accuracy"),
        _train_and_val_curve("accuracy of the end-of-stream code", "eos_accuracy"),
        Curve("learning rate", {"lr": "--lr" if groups else ""} | {f"lr/{group}": group for group in groups}),
        Curve("gradient norm", {"grad_norm": ""}, logarithmic=True),
        Curve("tokens per second", {"tokens_per_s": ""}),
        Curve("peak memory, GiB", {"peak_memory_gib": ""}),
        Curve("share of positions that are padding", {"padding": ""}),
        Curve("share of samples that stopped on their own", {"sample/stop_rate": ""}),
        Curve("length of samples relative to the reference", {"sample/length_ratio": ""}),
    ]


def write_report(output_dir: Path) -> Path:
    """Write the page from a run's metrics, state and settings; return its path. Raises OSError."""
    lines = read_metrics(output_dir)
    settings = json.loads((output_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
    state_file, summary = output_dir / STATE_FILE, output_dir / SUMMARY_FILE
    state = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {}
    last = lines[-1] if lines else {"step": 0, "epoch": 0.0}
    num_codebooks = len({key for line in lines for key in line if re.fullmatch(r"train/audio_loss/cb\d+", key)})
    groups = sorted({key.removeprefix("lr/") for line in lines for key in line if key.startswith("lr/")})
    keys = dict.fromkeys(key for line in lines for key in line)
    drawn = [(curve, _points(lines, curve)) for curve in _curves(num_codebooks, groups, keys)]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("higgs_ds.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        name=output_dir.resolve().name,
        status="finished" if state.get("finished") and state.get("step") == last["step"] else "running or interrupted",
        step=last["step"],
        epoch=last["epoch"],
        total_steps=state.get("total_steps", "?"),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        numbers=_numbers(lines),
        curves=[{"title": curve.title, "svg": draw(curve, points)} for curve, points in drawn if points],
        spoken=_spoken(output_dir / SAMPLES_FOLDER),
        data_summary=summary.read_text(encoding="utf-8") if summary.is_file() else "",
        outputs=_outputs(output_dir, settings.get("finetune") == FULL),
        settings=_settings(settings),
    )
    write_text(output_dir / REPORT_FILE, page)
    return output_dir / REPORT_FILE


def _points(lines: Sequence[dict[str, Any]], curve: Curve) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and values of each of a curve's metrics that has values."""
    found = {}
    for key, label in curve.keys.items():
        at = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if at:
            every = -(-len(at) // MOST_POINTS)
            kept = [*at[:-1:every], at[-1]]
            found[label] = ([step for step, _ in kept], [value for _, value in kept])
    return found


def draw(curve: Curve, points: dict[str, tuple[list[int], list[float]]]) -> str:
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


def _numbers(lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the last value of each metric that training and validation share, and of some others."""
    last = last_values(lines)

    def shown(key: str) -> str:
        return f"{last[key]:.4g}" if key in last else ""

    shared = ("loss", "text_loss", "audio_loss", "text_accuracy", "audio_accuracy", "eos_accuracy")
    alone = ("lr", "grad_norm", "tokens_per_s", "samples_per_s", "peak_memory_gib", "padding")
    rows = [{"name": name, "train": shown(f"train/{name}"), "val": shown(f"val/{name}")} for name in shared]
    by_manifest = losses_of_manifests(last)
    rows += [{"name": f"loss, {name}", "train": "", "val": shown(key)} for key, name in by_manifest.items()]
    return rows + [{"name": name, "train": shown(name), "val": ""} for name in alone]


def _spoken(folder: Path) -> list[dict[str, Any]]:
    """Return the text of each prompt, its reference and its samples by step, newest first, as audio for the page.

    If they exceed SOUND_BYTES, the oldest samples are left out of the page; their files remain.
    """
    if not (folder / PROMPTS_FILE).is_file():
        return []
    words = json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))
    steps = sorted((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), reverse=True)
    left = SOUND_BYTES
    sounds: list[dict[str, str]] = [{} for _ in words]
    for name in (REFERENCE_FOLDER, *(f"step-{step}" for step in steps)):
        for number, sounds_of_prompt in enumerate(sounds):
            path = folder / name / f"{number}.wav"
            sound = as_ogg(path) if left > 0 and path.is_file() else b""
            left -= len(sound)
            if sound:
                sounds_of_prompt[name] = f"data:audio/ogg;base64,{base64.b64encode(sound).decode()}"
    return [{"words": text, "sounds": of_prompt} for text, of_prompt in zip(words, sounds, strict=True)]


def _outputs(output_dir: Path, is_full_finetuning: bool) -> list[dict[str, str]]:
    known = {
        **({"final_model": "the complete model"} if is_full_finetuning else {}),
        ADAPTER_FOLDER: "the adapter of the last checkpoint",
        AVERAGED_ADAPTER_FOLDER: "the adapter of the weights averaged over the steps",
        "merged_model": "the base model with the adapter merged into it",
        METRICS_FILE: "all metrics of this page",
        SETTINGS_FILE: "all options, in the format of --config",
        SAMPLES_FOLDER: "the generated samples, as WAV files",
        DROPPED_FILE: "samples that were left out for their length",
        FLAGGED_FILE: "samples that may be bad, which were not left out",
    }
    outputs = [{"href": name, "what": what} for name, what in known.items() if (output_dir / name).exists()]
    checkpoints = reversed(find_checkpoints(output_dir))
    return outputs + [{"href": path.name, "what": "a checkpoint, for --resume"} for path in checkpoints]


def _settings(settings: dict[str, Any]) -> list[dict[str, Any]]:
    defaults = json.loads(json.dumps(TrainOptions().flat()))
    return [
        {"name": name, "value": " ".join(map(str, value)) if isinstance(value, list) else value,
         "changed": value != defaults.get(name)}
        for name, value in settings.items() if value not in (None, False, [])
    ]  # fmt: skip
