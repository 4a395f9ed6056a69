"""Means of an evaluation: error rates are jiwer's, intervals cover the truth, and what a difference needs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
from scipy.stats import ttest_rel

from higgs_ds.common.errors import InputError
from higgs_ds.speech.evaluation_results import Item, needed_items, read_results, summary, table, write_results
from higgs_ds.speech.intervals import interval, items_needed, share_interval
from higgs_ds.speech.measures import word_errors
from higgs_ds.speech.word_measures import WordErrors

VOCABULARY = "zero one two three four five six seven eight nine".split()


def item(words: str = "", heard: Sequence[str] | None = None, **values: Any) -> Item:
    measured = {
        "source": "x:1", "stopped": True, "length_ratio": 1.0, "exact": False, "agreement": [0.5], "pitch_hz": 100.0,
        "reference_pitch_hz": 100.0, "mel_distance_db": 1.0,
    }  # fmt: skip
    return Item(words=words, heard=None if heard is None else list(heard), **(measured | values))


def spoiled(words: list[str], draw: random.Random) -> list[str]:
    heard = [draw.choice(VOCABULARY) if draw.random() < 0.2 else word for word in words if draw.random() > 0.1]
    return [word for word in heard for _ in range(1 + (draw.random() < 0.1))]


def test_error_rates_are_those_of_jiwer() -> None:
    draw = random.Random(0)
    said = [draw.choices(VOCABULARY, k=draw.randrange(1, 9)) for _ in range(200)]
    heard = [spoiled(words, draw) for words in said]
    for words, found in zip(said, heard, strict=True):
        errors = WordErrors.of(words, found)
        assert errors.word_errors == word_errors(words, found)  # by torchaudio
        assert errors.character_errors == word_errors(list("".join(words)), list("".join(found)))
    results = summary([item(" ".join(words), found) for words, found in zip(said, heard, strict=True)])
    texts, heard_texts = [" ".join(words) for words in said], [" ".join(words) for words in heard]
    assert results["word_error_rate"] == pytest.approx(jiwer.wer(texts, heard_texts))
    in_letters = ["".join(words) for words in said], ["".join(words) for words in heard]
    assert results["character_error_rate"] == pytest.approx(jiwer.cer(*in_letters))
    low, high = results["intervals"]["word_error_rate"]
    assert low < results["word_error_rate"] < high


@pytest.mark.parametrize(
    ("said", "heard", "missing", "repeated"),
    [
        ("one two three", "one two three", 0, 0),
        ("one two three", "one three", 1, 0),
        ("one two three", "one two two three", 0, 1),
        ("one two three", "one two one two three", 0, 2),
        ("one two three", "one two three four", 0, 0),
        ("one one two", "one one two", 0, 0),
        ("one two", "", 2, 0),
    ],
)
def test_missing_and_repeated_words(said: str, heard: str, missing: int, repeated: int) -> None:
    errors = WordErrors.of(said.split(), heard.split())
    assert (errors.missing, errors.repeated) == (missing, repeated)


def test_without_a_text() -> None:
    assert WordErrors.of([], ["one"]) == WordErrors(0, 1, 0, 0, 0, 3)
    assert summary([item("", ["one"])] * 4)["word_error_rate"] == 4


DRAWS: dict[str, Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray | None]]] = {
    "similarities": lambda rng: (rng.beta(8, 2, 60), None),
    "differences in dB": lambda rng: (rng.gamma(4, 1, 60), None),
    "word errors": lambda rng: (lambda words: (rng.binomial(words, 0.15), words))(rng.integers(5, 20, 60)),
}
TRUTHS = {"similarities": 0.8, "differences in dB": 4.0, "word errors": 0.15}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAWS)
def test_intervals_cover_the_truth(kind: str) -> None:
    """In 93 to 97 % of 1,000 evaluations of 60 items."""
    covered = 0
    for number in range(1000):
        found = interval(*DRAWS[kind](np.random.default_rng(number)))
        assert found is not None
        covered += found[0] <= TRUTHS[kind] <= found[1]
    assert 930 <= covered <= 970


def test_intervals_of_few_or_equal_items() -> None:
    assert interval([1.0, 2.0]) is None
    assert interval([1.0] * 10) == (1, 1)
    assert share_interval([1.0] * 10) == pytest.approx((1 / (1 + 1.959964**2 / 10), 1))
    assert interval([0.5] * 9) == (0.5, 0.5)
    assert interval([3, 6, 9], [1, 2, 3]) == (3, 3)


def test_table_of_equal_items() -> None:
    """Shares have an interval even so; other means do not. Titles are apart from their values."""
    results = summary([item("one", ["one"], heard_in_reference=["one"])] * 4)
    rows = dict(re.split(r"\s{2,}|\s(?=[\d-])", line, maxsplit=1) for line in table(results).splitlines())
    assert rows["stop rate"] == "1 (0.5101 to 1)"
    assert rows["length ratio"] == "1"
    assert rows["reference character error rate"] == "0"


def test_items_that_a_difference_needs() -> None:
    """That many items find the difference in about 80 % of 400 evaluations (paired t-test of scipy)."""
    rng = np.random.default_rng(0)
    needed = items_needed((rng.normal(0.1, 0.3, 100_000)).tolist())
    assert needed is not None
    found = [ttest_rel(rng.normal(0.1, 0.3, needed), np.zeros(needed)).pvalue < 0.05 for _ in range(400)]
    assert 0.74 < np.mean(found) < 0.86
    assert items_needed([0.0] * 9) is None
    before = summary([item(str(n), source=str(n), length_ratio=1 + n % 3 / 10) for n in range(9)])
    after = summary([item(str(n), source=str(n), length_ratio=1.1 + n % 2 / 10) for n in range(9)])
    assert set(needed_items(after, before)) == {"length_ratio"}
    head, *rows = table(after, before).splitlines()
    assert head.split() == ["current", "compared", "with", "items", "needed"]
    assert any(
        row.startswith("length ratio") and row.endswith(f"{needed_items(after, before)['length_ratio']}")
        for row in rows
    )


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda results: results["items"][1].pop("source"), "items[1] has no text for source"),
        (lambda results: results["items"][0].update(words=3), "items[0] has no text for words"),
        (lambda results: results.update(items={}), "items is {}, not a list"),
        (lambda results: results.update(items=[1]), "items[0] has no text for source and words"),
        (lambda results: results.update(stop_rate="all"), "stop_rate is 'all', not a number"),
        (lambda results: results.update(code_agreement=[0.1, "x"]), "code_agreement is [0.1, 'x'], not a number"),
        (lambda results: results["intervals"].update(mos=[1]), "the interval of mos is [1], not two numbers"),
        (lambda results: results.update(intervals=3), "intervals is 3, not a JSON object"),
    ],
)
def test_edited_results_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], problem: str) -> None:
    write_results(tmp_path, summary([item("one", ["one"], source=f"x:{n}") for n in range(3)]))
    path = tmp_path / "evaluation.json"
    results = json.loads(path.read_text())
    assert read_results(path) == results
    edit(results)
    path.write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"--compare_with .*; give the file as launch/evaluate.py wrote it") as caught:
        read_results(path)
    assert problem in str(caught.value)
