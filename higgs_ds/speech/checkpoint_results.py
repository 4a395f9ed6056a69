"""The evaluations of several checkpoints beside each other: a table, `checkpoints.json`, a page with their sounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from higgs_ds.common.files import saving, write_json, write_text
from higgs_ds.data.audio import as_ogg_url
from higgs_ds.speech.best_checkpoint import (
    NOTHING_BETTER,
    RULE,
    Choice,
    Measured,
    choose,
    error_rate_of,
    is_by_sound,
)
from higgs_ds.speech.evaluation_results import CHECKPOINTS_FILE, RESULTS_FILE
from higgs_ds.speech.held_out import REFERENCE

PAGE_FILE = "checkpoints.html"
SOUND_BYTES = 8_000_000  # of Ogg Vorbis in the page, where base64 makes it a third larger


@dataclass(frozen=True)
class Evaluated:
    """A checkpoint's adapter at a strength, whose evaluation is in the folder of this name."""

    label: str
    step: int
    averaged: bool
    strength: float
    adapter: Path
    folder_name: str


@dataclass(frozen=True)
class Row:
    """One of them, with the content of its evaluation.json."""

    of: Evaluated
    results: Mapping[str, Any]
    measured: Measured

    @property
    def silent(self) -> int:
        """How many samples have nothing that can be heard."""
        return sum(item["not_measured"] is not None for item in self.results["items"])


# Columns of the table, and the value of a row. One in which no row has a value is left out.
COLUMNS: dict[str, Callable[[Row], float | None]] = {
    "stop rate": lambda row: row.results["stop_rate"],
    "silent samples": lambda row: row.silent or None,
    "error rate": lambda row: row.measured.error_rate,
    "speaker similarity": lambda row: row.measured.similarity,
    "mos": lambda row: row.measured.mos,
    "mel distance db": lambda row: row.measured.mel_distance_db,
    "length ratio": lambda row: row.results["length_ratio"],
}


def write_comparison(output_dir: Path, run: Path, evaluated: Sequence[Evaluated], skipped: Sequence[str]) -> str:
    """Compare the evaluations in a folder, write CHECKPOINTS_FILE and PAGE_FILE into it, and return what to print.

    Args:
        skipped: a line for each checkpoint that could not be evaluated.

    Raises:
        SaveError: a file cannot be written.
    """
    rows = []
    for one in evaluated:
        results = json.loads((output_dir / one.folder_name / RESULTS_FILE).read_text(encoding="utf-8"))
        rows.append(Row(one, results, Measured.of(one.label, one.step, one.averaged, one.strength, results)))
    choice = choose([row.measured for row in rows])
    columns = _columns(rows)
    note = NOTHING_BETTER if is_by_sound([row.measured for row in rows]) else None
    best = next(row.of for row in rows if row.of.label == choice.best.label)
    with saving(output_dir):
        page = _page(output_dir, run.resolve().name, rows, columns, choice, skipped, note)
        write_text(output_dir / PAGE_FILE, page)
        write_json(output_dir / CHECKPOINTS_FILE, _as_json(rows, columns, choice, best, skipped))
    lines = [*_table(rows, columns, choice), *([note] if note else []), f"best: {best.label}: {choice.reason}"]
    scale = f" --lora_scale {best.strength:g}" if best.strength != 1 else ""
    return "\n".join([*lines, f"its adapter: --lora_adapter_path {best.adapter}{scale}"])


def _columns(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Return the values of all rows by the titles of the columns."""
    name = error_rate_of(item["words"] for item in rows[0].results["items"]).replace("_", " ")
    found = {name if title == "error rate" else title: [value(row) for row in rows] for title, value in COLUMNS.items()}
    return {title: values for title, values in found.items() if any(value is not None for value in values)}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(rows: Sequence[Row], columns: Mapping[str, Sequence[float | None]], choice: Choice) -> list[str]:
    cells = [["", *(row.of.label for row in rows)]]
    cells += [[title, *map(_shown, values)] for title, values in columns.items()]
    cells.append(["verdict", *(choice.verdict(row.of.label) for row in rows)])
    widths = [max(map(len, column)) for column in cells]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*cells, strict=True)
    ]


def _as_json(
    rows: Sequence[Row],
    columns: Mapping[str, Sequence[float | None]],
    choice: Choice,
    best: Evaluated,
    skipped: Sequence[str],
) -> dict[str, Any]:
    return {
        "best": best.label,
        "reason": choice.reason,
        "adapter": str(best.adapter),
        "lora_scale": best.strength,
        "rule": RULE,
        "checkpoints": [
            {
                "checkpoint": row.of.label, "step": row.of.step, "averaged": row.of.averaged,
                "strength": row.of.strength,
                "adapter": str(row.of.adapter), "folder": row.of.folder_name,
                **{title.replace(" ", "_"): values[number] for title, values in columns.items()},
                "verdict": choice.verdict(row.of.label),
            }
            for number, row in enumerate(rows)
        ],
        "skipped": list(skipped),
    }  # fmt: skip


class _Sounds:
    """Sounds of the page: in it, up to SOUND_BYTES; the others by a link to their WAV file."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.left, self.num_linked = output_dir, SOUND_BYTES, 0

    def source(self, folder: str, number: int) -> str | None:
        """Return the source of an audio element; None if there is no file, as nothing was spoken."""
        path = self.output_dir / folder / f"{number}.wav"
        if not path.is_file():
            return None
        if self.left <= 0:
            self.num_linked += 1
            return f"{folder}/{number}.wav"
        url = as_ogg_url(path)
        self.left -= len(url) * 3 // 4
        return url


def _page(
    output_dir: Path,
    name: str,
    rows: Sequence[Row],
    columns: Mapping[str, Sequence[float | None]],
    choice: Choice,
    skipped: Sequence[str],
    note: str | None,
) -> str:
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("higgs_ds.speech").joinpath("checkpoints.html.j2").read_text(encoding="utf-8")
    )
    sounds = _Sounds(output_dir)
    samples = [
        {
            "words": item["words"],
            "reference": sounds.source(REFERENCE, number),
            "spoken": [
                {
                    "label": row.of.label,
                    "is_best": row.of.label == choice.best.label,
                    "source": sounds.source(row.of.folder_name, number),
                    "remarks": _remarks(row.results["items"][number]),
                }
                for row in rows
            ],
        }
        for number, item in enumerate(rows[0].results["items"])
    ]
    return template.render(
        name=name,
        best=choice.best.label,
        reason=choice.reason,
        rule=RULE,
        note=note,
        skipped=skipped,
        titles=list(columns),
        rows=[
            {
                "label": row.of.label,
                "is_best": row.of.label == choice.best.label,
                "cells": [_shown(values[number]) for values in columns.values()],
                "verdict": choice.verdict(row.of.label),
            }
            for number, row in enumerate(rows)
        ],
        samples=samples,
        num_linked=sounds.num_linked,
    )


def _remarks(item: Mapping[str, Any]) -> list[str]:
    """Say what is notable of one sample of a checkpoint."""
    remarks = [] if item["stopped"] else ["cut off"]
    if item["not_measured"] is not None:
        remarks.append(item["not_measured"])
    if item["heard"] is not None:
        remarks.append(f"heard: {' '.join(item['heard'])}")
    return remarks
