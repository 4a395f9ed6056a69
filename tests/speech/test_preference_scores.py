"""The score of a rendering, and the pair that is made of several."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from higgs_ds.speech.preference_scores import WORST, Measures, Rendering, choose_pair, score_of

SAID = Measures(stopped=True, word_error_rate=0.0, similarity=0.8, mos=3.0, mel_distance_db=9.0)


def rendering(number: int, score: float, wav: str | None = "w", key: str | None = None) -> Rendering:
    return Rendering(0, number, "list:1", wav, key or f"key {number}", 10, score, SAID)


def test_score_is_the_sum_of_what_was_measured() -> None:
    assert score_of(SAID) == pytest.approx(1 + 0.8 + 0.5)
    assert score_of(replace(SAID, word_error_rate=0.25)) == pytest.approx(score_of(SAID) - 0.25)
    assert score_of(replace(SAID, stopped=False)) == pytest.approx(score_of(SAID) - 1)
    assert score_of(replace(SAID, similarity=None)) == pytest.approx(1 + 0.5)
    assert score_of(replace(SAID, word_error_rate=None, mos=None)) == pytest.approx(0.8)
    assert score_of(replace(SAID, word_error_rate=7.0)) == score_of(replace(SAID, word_error_rate=2.0))


def test_the_mel_distance_stands_for_what_was_not_asked_for() -> None:
    assert score_of(Measures(True, mel_distance_db=5.0)) == -0.25
    assert score_of(Measures(False, mel_distance_db=5.0)) == -1.25
    assert score_of(Measures(True)) == 0


def test_what_cannot_be_measured_is_the_worst() -> None:
    worst_measured = Measures(False, word_error_rate=100.0, similarity=-1.0, mos=1.0, mel_distance_db=1e9)
    assert score_of(replace(SAID, not_measured="silence")) == WORST < score_of(worst_measured)
    for value in (math.nan, math.inf, -math.inf):
        assert score_of(replace(SAID, similarity=value)) == WORST
    assert score_of(Measures(True, mel_distance_db=math.nan)) == WORST
    assert score_of(Measures(True, mel_distance_db=1e9)) == WORST


def test_best_and_worst_with_frames() -> None:
    all_of_them = [rendering(0, 0.5), rendering(1, 0.9), rendering(2, -1.0), rendering(3, WORST, wav=None)]
    assert choose_pair(all_of_them, 0.1) == (all_of_them[1], all_of_them[2])
    first_of_equals = [rendering(0, 1.0), rendering(1, 1.0), rendering(2, 0.0), rendering(3, 0.0)]
    assert choose_pair(first_of_equals, 0.1) == (first_of_equals[0], first_of_equals[2])


@pytest.mark.parametrize(
    "renderings",
    [
        [],
        [rendering(0, 1.0)],
        [rendering(0, 1.0), rendering(1, WORST, wav=None)],
        [rendering(0, 1.0), rendering(1, 0.6)],
        [rendering(0, 1.0), rendering(1, 0.0, key="key 0")],
    ],
    ids=["none", "one", "one with frames", "near", "the same sound"],
)
def test_no_pair(renderings: list[Rendering]) -> None:
    assert choose_pair(renderings, 0.5) is None


def test_equal_scores_are_no_preference() -> None:
    assert choose_pair([rendering(0, 1.0), rendering(1, 1.0)], 0.0) is None
    assert choose_pair([rendering(0, 1.0), rendering(1, 0.5)], 0.5) is not None
