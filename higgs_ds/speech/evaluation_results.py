"""The results of an evaluation: means with intervals over its items, as a table and as `evaluation.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import saving, write_json
from higgs_ds.speech.intervals import interval, items_needed, share_interval
from higgs_ds.speech.measures import words_of
from higgs_ds.speech.word_measures import WordErrors

RESULTS_FILE, CHECKPOINTS_FILE = "evaluation.json", "checkpoints.json"


@dataclass(frozen=True)
class Item:
    """The measurements of one sample; NaN where one is not possible or not asked for."""

    source: str
    words: str
    stopped: bool
    length_ratio: float
    exact: bool  # the first codebook equals the reference's, from the first frame to the last
    agreement: list[float]  # per codebook
    pitch_hz: float
    reference_pitch_hz: float
    mel_distance_db: float
    speaking_rate: float = math.nan
    said: list[str] | None = None  # the words as they are compared with those that were heard
    heard: list[str] | None = None
    heard_in_reference: list[str] | None = None
    similarity: float = math.nan
    similarity_to_speaker: float = math.nan
    mos: float = math.nan
    mos_voice: float = math.nan
    mos_background: float = math.nan
    mos_p808: float = math.nan
    reference_mos: float = math.nan
    not_measured: str | None = None  # why there is neither a similarity nor a rating


# Results that are means over the items, and the value of an item; a measure that no item has is left out.
MEANS: dict[str, Callable[[Item], float]] = {
    "stop_rate": lambda item: item.stopped,
    "length_ratio": lambda item: item.length_ratio,
    "speaking_rate": lambda item: item.speaking_rate,
    "exact_first_codebook": lambda item: item.exact,
    "mel_distance_db": lambda item: item.mel_distance_db,
    "speaker_similarity": lambda item: item.similarity,
    "similarity_to_speaker": lambda item: item.similarity_to_speaker,
    "mos": lambda item: item.mos,
    "mos_voice": lambda item: item.mos_voice,
    "mos_background": lambda item: item.mos_background,
    "mos_p808": lambda item: item.mos_p808,
    "reference_mos": lambda item: item.reference_mos,
}
ALWAYS = ("stop_rate", "length_ratio", "exact_first_codebook", "mel_distance_db")
SHARES = ("stop_rate", "exact_first_codebook")
INTERVALS = "intervals"
IDENTITY = "identity"  # of what was spoken and how it was measured, in evaluations of several checkpoints
NOT_IN_TABLE = ("items", INTERVALS, IDENTITY)


def summary(items: Sequence[Item]) -> dict[str, Any]:
    """Return means over all samples, medians of pitch, and error rates of words and characters.

    The 95 % intervals of the means and rates are under `intervals`, single samples under `items`.
    """
    results: dict[str, Any] = {"samples": len(items)}
    intervals: dict[str, tuple[float, float] | None] = {}
    for name, value in MEANS.items():
        known = [float(value(item)) for item in items if math.isfinite(value(item))]
        if known or name in ALWAYS:
            results[name] = sum(known) / len(known) if known else None
            intervals[name] = (share_interval if name in SHARES else interval)(known) if known else None
    results["code_agreement"] = [
        sum(values) / len(values) for values in zip(*(item.agreement for item in items), strict=True)
    ]
    results["median_pitch_hz"] = _median([item.pitch_hz for item in items])
    results["reference_median_pitch_hz"] = _median([item.reference_pitch_hz for item in items])
    for prefix, heard in (("", [i.heard for i in items]), ("reference_", [i.heard_in_reference for i in items])):
        errors = [
            WordErrors.of(words_of(item.words) if item.said is None else item.said, words)
            for item, words in zip(items, heard, strict=True)
            if words is not None
        ]
        if errors:
            rates, of_rates = _error_rates(errors)
            results |= {f"{prefix}{name}": value for name, value in rates.items()}
            intervals |= {f"{prefix}{name}": value for name, value in of_rates.items()}
    return results | {INTERVALS: intervals, "items": [asdict(item) for item in items]}


def measures_of(results: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation that say something of the model, not of the references; all are finite."""
    return {
        name: float(value)
        for name, value in results.items()
        if name != "samples" and not name.startswith("reference_") and _is_number(value)
    }


def _error_rates(errors: Sequence[WordErrors]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rates over all items, and their intervals: errors, missing and repeated over the number of words."""
    words = [one.words for one in errors]
    counted = {
        "word_error_rate": ([one.word_errors for one in errors], words),
        "character_error_rate": ([one.character_errors for one in errors], [one.characters for one in errors]),
        "missing_words": ([one.missing for one in errors], words),
        "repeated_words": ([one.repeated for one in errors], words),
    }
    rates = {name: sum(counts) / max(1, sum(sizes)) for name, (counts, sizes) in counted.items()}
    enough = sum(size > 0 for size in words) == len(words)
    return rates, {name: interval(*pair) if enough else None for name, pair in counted.items()}


def _median(values: list[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return float(torch.tensor(known).median()) if known else None


def needed_items(results: dict[str, Any], earlier: dict[str, Any]) -> dict[str, int]:
    """Return how many items would show each mean's difference from an earlier evaluation of the same samples."""
    values_before = {(item["source"], item["words"]): item for item in earlier.get("items", [])}
    pairs = [(item, values_before.get((item["source"], item["words"]))) for item in results["items"]]
    needed = {}
    for name, key in PAIRED.items():
        differences = [
            float(now[key]) - float(before[key])
            for now, before in pairs
            if before is not None and _is_number(now.get(key)) and _is_number(before.get(key))
        ]
        if len(differences) == len(pairs) and (count := items_needed(differences)) is not None:
            needed[name] = count
    return needed


# The key of an item's value, for the means that are compared in pairs.
PAIRED = {
    "stop_rate": "stopped", "length_ratio": "length_ratio", "mel_distance_db": "mel_distance_db",
    "speaker_similarity": "similarity", "mos": "mos",
}  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and math.isfinite(value)


def table(results: dict[str, Any], earlier: dict[str, Any] | None = None) -> str:
    """Return the results, without single samples, as lines; those of another evaluation are in a second column.

    A third column has the number of items that would show the difference, where it can be said.
    """
    names = [name for name in results if name not in NOT_IN_TABLE]
    columns = [["", *(_format(results, name) for name in names)]]
    if earlier is not None:
        needed = needed_items(results, earlier)
        columns[0][0] = "current"
        columns.append(["compared with", *(_format(earlier, name) for name in names)])
        if needed:
            columns.append(["items needed", *(f"{needed[name]:,}" if name in needed else "" for name in names)])
    widths = [max(map(len, column)) + 3 for column in columns]
    titles = ["", *(name.replace("_", " ") for name in names)]
    title_width = max(28, *(len(title) + 1 for title in titles))
    lines = [
        f"{title:<{title_width}}"
        + "".join(f"{value:<{width}}" for value, width in zip(values, widths, strict=True)).rstrip()
        for title, *values in zip(titles, *columns, strict=True)
    ]
    return "\n".join(lines if earlier is not None else lines[1:])


def _format(results: dict[str, Any], name: str) -> str:
    value = results.get(name)
    text = " ".join("-" if n is None else f"{n:.4g}" for n in (value if isinstance(value, list) else [value]))
    limits = (results.get(INTERVALS) or {}).get(name)
    return f"{text} ({limits[0]:.4g} to {limits[1]:.4g})" if limits and limits[0] < limits[1] else text


def read_results(path: Path | None) -> dict[str, Any] | None:
    """Return the results of another evaluation. Raises InputError if the file has none."""
    if path is None:
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--compare_with {path}: cannot be read: {error}") from error
    if not isinstance(results, dict) or "stop_rate" not in results:
        raise InputError(f"--compare_with {path}: is not an {RESULTS_FILE} of launch/evaluate.py")
    problems = _wrong_values(results)
    if problems:
        raise InputError(
            [f"--compare_with {path}: {problem}; give the file as launch/evaluate.py wrote it" for problem in problems]
        )
    return results


def _wrong_values(results: dict[str, Any]) -> list[str]:
    """Return what is wrong in results that were read from a file, which may have been edited."""
    problems = []
    for name, value in results.items():
        values = value if isinstance(value, list) else [value]
        if name not in NOT_IN_TABLE and not all(n is None or isinstance(n, int | float) for n in values):
            problems.append(f"{name} is {value!r}, not a number")
    intervals = results.get(INTERVALS) or {}
    if not isinstance(intervals, dict):
        return [*problems, f"{INTERVALS} is {intervals!r}, not a JSON object"]
    for name, limits in intervals.items():
        is_pair = isinstance(limits, list) and len(limits) == 2 and all(isinstance(n, int | float) for n in limits)
        if limits is not None and not is_pair:
            problems.append(f"the interval of {name} is {limits!r}, not two numbers")
    items = results.get("items", [])
    if not isinstance(items, list):
        return [*problems, f"items is {items!r}, not a list"]
    for number, item in enumerate(items):
        texts = [key for key in ("source", "words") if not isinstance(item, dict) or not isinstance(item.get(key), str)]
        if texts:
            problems.append(f"items[{number}] has no text for {' and '.join(texts)}")
    return problems


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `evaluation.json`, with null for values that are not finite. Raises SaveError."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULTS_FILE, clean(results))
