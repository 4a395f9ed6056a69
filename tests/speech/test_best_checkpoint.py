"""The rule by which a checkpoint is the best: each step alone, ties, and what has no value."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from higgs_ds.speech.best_checkpoint import Measured, choose, error_rate_of, is_by_sound

GOOD = Measured("good", 40, 1.0, stop_rate=1.0, error_rate=0.1, similarity=0.9, mos=3.0, mel_distance_db=2.0)


def other(label: str = "other", step: int = 20, **values: Any) -> Measured:
    return replace(GOOD, label=label, step=step, **values)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"stop_rate": 0.89, "similarity": 1.0}, "stop rate 0.89, more than 0.1 below the highest, 1 of good"),
        ({"error_rate": 0.16, "similarity": 1.0}, "error rate 0.16, more than 0.05 above the lowest, 0.1 of good"),
        ({"similarity": 0.88, "mos": 5.0}, "speaker similarity 0.88, more than 0.01 below the highest, 0.9 of good"),
        ({"mos": 2.9, "error_rate": 0.06}, "mos 2.9, more than 0.05 below the highest, 3 of good"),
        ({"error_rate": 0.11, "mel_distance_db": 0.0}, "error rate 0.11, above the lowest, 0.1 of good"),
        ({"step": 60}, "equal to good"),
        ({"step": 40, "strength": 0.6}, "equal to good"),
    ],
)
def test_each_step(values: dict[str, Any], verdict: str) -> None:
    """One that is better by all later steps is dropped all the same."""
    worse = other(**({"step": 20} | values))
    for both in ([worse, GOOD], [GOOD, worse]):
        choice = choose(both)
        assert choice.best == GOOD
        assert choice.verdict("other") == verdict
        assert choice.verdict("good") == "best"


@pytest.mark.parametrize(
    "values",
    [{"stop_rate": 0.9}, {"error_rate": 0.1}, {"similarity": 0.89}, {"mos": 2.95}, {"mel_distance_db": 9.0}],
)
def test_within_the_margin_is_equal(values: dict[str, Any]) -> None:
    """So that the earlier one is taken; margins are not moved by rounding."""
    assert choose([GOOD, other(**values)]).best.label == "other"


def test_a_later_step_compares_what_is_left() -> None:
    """The lowest error rate is that of a checkpoint that never stops; it is no measure for the others."""
    mute = other("mute", stop_rate=0.0, error_rate=0.0, similarity=1.0)
    choice = choose([mute, GOOD, other("garbled", error_rate=0.3)])
    assert choice.best == GOOD
    assert choice.dropped["garbled"].endswith("0.1 of good")
    assert choice.reason == "its error rate 0.1 is the lowest of the 2 that stop rate left, by more than 0.05"


@pytest.mark.parametrize("none", [None, math.nan])
def test_without_a_value(none: float | None) -> None:
    """A checkpoint without a value that others have is dropped; what nobody has is left out."""
    for name in ("stop_rate", "error_rate", "similarity", "mos"):
        choice = choose([GOOD, other(**{name: none})])
        assert choice.best == GOOD
        assert choice.dropped["other"].startswith("no ")
        assert choose([replace(GOOD, **{name: none}), other(**{name: none})]).best.label == "other"
    nothing = Measured("nothing", 1)
    assert choose([nothing]).best == nothing
    assert choose([nothing, replace(nothing, label="later", step=2)]).best == nothing
    assert choose([GOOD]).reason == "it is the only one"


def test_by_sound_only_without_words_and_voices() -> None:
    plain = {"error_rate": None, "similarity": None}
    near, far = replace(GOOD, **plain), other(**plain, mel_distance_db=2.2)
    assert is_by_sound([near, far])
    assert choose([far, near]).best == near
    assert choose([replace(far, mel_distance_db=2.1), near]).best.label == "other"
    assert choose([replace(far, mel_distance_db=0.0, stop_rate=0.5), near]).best == near
    assert not is_by_sound([replace(near, similarity=0.5), far])
    assert (
        choose([replace(far, mel_distance_db=0.0, step=50, similarity=0.5), replace(near, similarity=0.5)]).best.label
        == "good"
    )


def test_equal_ones() -> None:
    """The earliest, then the strength nearest to 1, of two the lower; in any order."""
    equal = [replace(GOOD, label=f"{step}x{s}", step=step, strength=s) for step in (20, 40) for s in (0.6, 0.8, 1.2)]
    for seed in range(5):
        random.Random(seed).shuffle(equal)
        choice = choose(equal)
        assert choice.best.label == "20x0.8"
        assert (
            choice.reason
            == "6 checkpoints are equal by this rule, and it is the earliest, at the strength nearest to 1"
        )
        assert set(choice.dropped.values()) == {"equal to 20x0.8"}


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([], "not averaged"),
        ([{"strength": 0.5}], "not averaged, at the strength nearest to 1"),
        ([{"step": 50}], "the earliest, not averaged"),
    ],
)
def test_weights_come_before_their_averages(others: list[dict[str, Any]], reason: str) -> None:
    """Of equal ones; an average that is better is chosen."""
    averaged = replace(GOOD, label="averaged", averaged=True)
    equal = [averaged, *(replace(GOOD, label=str(i), **values) for i, values in enumerate(others)), GOOD]
    choice = choose(equal)
    assert choice.best == GOOD
    assert choice.reason == f"{len(equal)} checkpoints are equal by this rule, and it is {reason}"
    better = replace(averaged, similarity=(GOOD.similarity or 0) + 0.02)
    assert choose([GOOD, better]).best == better


def test_any_values_have_one_best() -> None:
    """That no other beats by a step that both have come to."""
    draw = random.Random(0)
    values = [None, math.nan, 0.0, 0.5, 0.95, 1.0]
    for _ in range(300):
        measured = [
            Measured(str(n), n, draw.choice([0.5, 1.0]), *(draw.choice(values) for _ in range(5))) for n in range(6)
        ]
        choice = choose(measured)
        assert {choice.best.label, *choice.dropped} == {str(n) for n in range(6)}
        assert choice.best.label not in choice.dropped
        rates = [one.stop_rate for one in measured if one.stop_rate is not None and math.isfinite(one.stop_rate)]
        if rates:
            assert choice.best.stop_rate is not None
            assert choice.best.stop_rate >= max(rates) - 0.1


def test_silence_does_not_count_as_stopped() -> None:
    items = [
        {"stopped": stopped, "not_measured": silent, "words": "one"}
        for stopped, silent in ((True, None), (True, "no frame"), (False, None), (True, "silence"))
    ]
    measured = Measured.of("x", 1, False, 1.0, {"items": items, "stop_rate": 0.75, "word_error_rate": 0.2})
    assert (measured.stop_rate, measured.error_rate, measured.similarity) == (0.25, 0.2, None)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("good morning", "word"), ("早上好", "character"), ("おはよう ございます", "character"),
        ("안녕하세요 여러분", "word"),
        ("สวัสดี", "character"), ("доброе утро", "word"), ("12 34", "word"), ("OK 好", "word"),
    ],
)  # fmt: skip
def test_error_rate_of_a_language(text: str, name: str) -> None:
    assert error_rate_of([text]) == f"{name}_error_rate"
