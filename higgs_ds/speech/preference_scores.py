"""How good a rendering of a text is, as one number, and which two renderings make a pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WORST = -5.0  # of a rendering that cannot be measured; lower than any other score
LARGEST_ERROR_RATE = 2.0
MEL_RANGE_DB = 20.0  # a mel distance that costs as much as all words


@dataclass(frozen=True)
class Measures:
    """The measurements of a rendering; None where one is not possible or not asked for.

    `not_measured`: why the speech cannot be measured at all, such as silence.
    """

    stopped: bool
    word_error_rate: float | None = None
    similarity: float | None = None  # of the voice to the reference's, the cosine of two speaker embeddings
    mos: float | None = None  # from 1 to 5
    mel_distance_db: float | None = None
    not_measured: str | None = None


@dataclass(frozen=True)
class Rendering:
    """A scored rendering: its text's number, its own, its WAV file and the key of its codes, None without frames."""

    prompt: int
    rendering: int
    source: str
    wav: str | None
    key: str | None
    frames: int
    score: float
    measures: Measures


def score_of(measures: Measures) -> float:
    """Return how good a rendering is; higher is better.

    1 - word error rate + similarity + (mos - 1) / 4, each where it was measured, and minus 1 if the model did not stop
    on its own. Without any of the three it is the mel distance, in units of -20 dB, that stands for them.
    """
    if measures.not_measured is not None:
        return WORST
    terms = []
    if measures.word_error_rate is not None:
        terms.append(1 - min(measures.word_error_rate, LARGEST_ERROR_RATE))
    if measures.similarity is not None:
        terms.append(measures.similarity)
    if measures.mos is not None:
        terms.append((measures.mos - 1) / 4)
    if not terms and measures.mel_distance_db is not None:
        terms.append(-measures.mel_distance_db / MEL_RANGE_DB)
    score = sum(terms) - (not measures.stopped)
    return round(max(score, WORST), 6) if math.isfinite(score) else WORST


def choose_pair(renderings: Sequence[Rendering], min_margin: float) -> tuple[Rendering, Rendering] | None:
    """Return the best and the worst rendering of a text, or None if no pair can be made of them.

    Renderings without frames are passed over. There is no pair if the scores are equal or differ by less than
    `min_margin`, or if both have the same codes. Of equal scores, the first rendering is taken.
    """
    usable = [rendering for rendering in renderings if rendering.wav is not None]
    if len(usable) < 2:
        return None
    best, worst = max(usable, key=lambda one: one.score), min(usable, key=lambda one: one.score)
    margin = best.score - worst.score
    return None if margin <= 0 or margin < min_margin or best.key == worst.key else (best, worst)
