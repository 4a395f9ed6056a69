"""`report.html`: a run on one self-contained page, made from the files in its output folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from higgs_ds.checkpoints.folder import checkpoint_folder, find_checkpoints
from higgs_ds.common.console import say
from higgs_ds.common.distributed import on_main
from higgs_ds.common.files import write_text
from higgs_ds.common.run_files import (
    ADAPTER_FOLDER,
    AVERAGED_ADAPTER_FOLDER,
    DROPPED_FILE,
    EVALUATION_FOLDER,
    FLAGGED_FILE,
    METRICS_FILE,
    PROMPTS_FILE,
    REFERENCE_FOLDER,
    SAMPLES_FOLDER,
    SETTINGS_FILE,
    STATE_FILE,
    SUMMARY_FILE,
)
from higgs_ds.common.words import counted
from higgs_ds.data.audio import as_ogg_url
from higgs_ds.options.fields import FULL
from higgs_ds.options.metrics import METRICS, VAL_LOSS
from higgs_ds.options.train import TrainOptions
from higgs_ds.reporting.curves import Points, curves_of, draw, is_flat
from higgs_ds.reporting.log_lines import losses_of_manifests
from higgs_ds.reporting.metrics_log import last_values, read_metrics
from higgs_ds.reporting.optional import OptionalOutput
from higgs_ds.reporting.verdicts import bad_signs

REPORT_FILE = "report.html"
EVERY_S = 60.0
SHARE = 0.02  # of a run's time that drawing may take
SOUND_BYTES = 2_500_000  # of Ogg Vorbis in the page, where base64 makes it a third larger


@dataclass(frozen=True)
class RunFacts:
    """What a run knows that is not in its files."""

    total_steps: int | None = None
    overruled: Sequence[str] = ()  # options whose value is not what the run does, one line each
    has_builtin_codec: bool = False  # which leaves codebooks unused


NO_FACTS = RunFacts()


class Reporter:
    """Writes a run's page, during the run at most once in EVERY_S. Every rank must call its methods."""

    def __init__(self, output_dir: Path, wanted: bool, facts: RunFacts) -> None:
        self.output_dir, self.wanted, self.facts = output_dir, wanted, facts
        self.output = OptionalOutput(f"writing {REPORT_FILE}", "the page is tried again later")
        self.due_at = -math.inf

    def write(self, at_end: bool = False, reason: str = "") -> None:
        """Write the page, if it is due. A failure is reported once, and does not end the run.

        Args:
            reason: the error that ends the run, if one does.
        """

        def write() -> None:
            started = time.monotonic()
            if at_end or started > self.due_at:
                self.output.attempt(lambda: write_report(self.output_dir, self.facts, not at_end, reason))
                ended = time.monotonic()
                self.due_at = ended + max(EVERY_S, (ended - started) / SHARE)

        if self.wanted:
            on_main(write)

    def report_path(self) -> None:
        """Print where the page is, unless it could not be written."""
        if self.wanted and not self.output.failed:
            say(f"report: {self.output_dir / REPORT_FILE}")


def write_report(output_dir: Path, facts: RunFacts = NO_FACTS, is_running: bool = False, reason: str = "") -> Path:
    """Write the page from a run's metrics, state and settings; return its path. Raises OSError.

    Args:
        is_running: whether the page is to renew itself in the browser, every EVERY_S.
        reason: the error that has ended the run, if one has.
    """
    lines = read_metrics(output_dir)
    settings = json.loads((output_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
    state_file, summary = output_dir / STATE_FILE, output_dir / SUMMARY_FILE
    state = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {}
    last = lines[-1] if lines else {"step": 0, "epoch": 0.0}
    is_finished = state.get("finished") and state.get("step") == last["step"]
    drawn = [(curve, points, is_flat(points)) for curve, points in curves_of(lines)]
    bad = bad_signs(lines)
    if facts.has_builtin_codec:
        bad.pop("train/audio_loss", None)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("higgs_ds.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        name=output_dir.resolve().name,
        status="running" if is_running else "finished" if is_finished else "ended before its last step",
        reload_ms=round(EVERY_S * 1000) if is_running else None,
        step=last["step"],
        epoch=last["epoch"],
        total_steps=facts.total_steps or state.get("total_steps", "?"),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        bad=[*filter(None, [reason]), *bad.values(), *_bad_samples(output_dir)],
        numbers=_numbers(lines, bad),
        best=_best(lines, settings.get("metric_for_best_model", VAL_LOSS), output_dir),
        curves=[{"title": curve.title, "svg": draw(curve, points)} for curve, points, is_flat in drawn if not is_flat],
        not_drawn=[f"{curve.title} ({_flat_values(points)})" for curve, points, is_flat in drawn if is_flat],
        spoken=_spoken(output_dir / SAMPLES_FOLDER),
        data_summary=summary.read_text(encoding="utf-8") if summary.is_file() else "",
        outputs=_outputs(output_dir, settings.get("finetune") == FULL),
        overruled=facts.overruled,
        settings=_settings(settings),
    )
    write_text(output_dir / REPORT_FILE, page)
    return output_dir / REPORT_FILE


def _bad_samples(output_dir: Path) -> list[str]:
    """Say how many samples are listed as possibly bad."""
    path = output_dir / FLAGGED_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    number = len({line.split("\t", 1)[0] for line in lines})
    return [f"{counted(number, 'sample')} of the data may be bad: see {FLAGGED_FILE}"] if number else []


def _flat_values(points: Points) -> str:
    """Return the values of a curve that has one for each of its metrics."""
    values = {f"{values[0]:.4g}" for _, values in points.values()}
    return values.pop() if len(values) == 1 else f"{len(points)} constants"


def _numbers(lines: Sequence[dict[str, Any]], bad: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the last value of each metric that training and validation share, and of some others, if it has any.

    `bad`: the metrics in which something bad shows.
    """
    last = last_values(lines)
    shared = (
        "loss",
        "text_loss",
        "audio_loss",
        "audio_loss_varying",
        "text_accuracy",
        "audio_accuracy",
        "eos_accuracy",
        "rewards/margins",
        "rewards/accuracies",
    )
    alone = ("lr", "grad_norm", "tokens_per_s", "samples_per_s", "peak_memory_gib", "padding", "skipped_steps")
    keys = {name: (f"train/{name}", f"val/{name}") for name in shared}
    keys |= {f"loss, {name}": ("", key) for key, name in losses_of_manifests(last).items()}
    keys |= {name: (name, "") for name in alone}
    keys |= {name: ("", f"sample/{name}") for name in ("stop_rate", "length_ratio")}
    keys |= {f"{key.removeprefix('eval/')}, evaluation": ("", key) for key in sorted(last) if key.startswith("eval/")}
    return [
        {"name": name, "values": [(f"{last[key]:.4g}" if key in last else "", key in bad) for key in pair]}
        for name, pair in keys.items()
        if any(key in last for key in pair)
    ]


def _best(lines: Sequence[dict[str, Any]], name: str, output_dir: Path) -> dict[str, Any] | None:
    """Return the best value of the metric that steps are compared by, and its step; of equal ones the first.

    None if it was not measured after a step.
    """
    metric = METRICS[name]
    sign = -1 if metric.is_highest_best else 1
    measured = [(line["step"], line[name]) for line in lines if line["step"] and line.get(name) is not None]
    if not measured:
        return None
    step, value = min(measured, key=lambda pair: sign * pair[1])
    folder = checkpoint_folder(output_dir, step)
    words = f"{metric.best.capitalize()} {metric.words}: {value:.4g}, at step {step}"
    return {"words": words, "checkpoint": folder.name if folder.is_dir() else None}


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
            if left > 0 and path.is_file():
                sounds_of_prompt[name] = as_ogg_url(path)
                left -= len(sounds_of_prompt[name]) * 3 // 4
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
        EVALUATION_FOLDER: "what was spoken in evaluations, as WAV files, and the measures of each sample",
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
