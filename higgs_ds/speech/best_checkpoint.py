"""The rule by which one of several evaluated checkpoints is the best: pure functions of their measures."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# The first words of the Unicode names of letters in scripts that have no spaces between words.
WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "MYANMAR", "KHMER", "TIBETAN"}
WORD_ERRORS, CHARACTER_ERRORS = "word_error_rate", "character_error_rate"
ROUNDING = 1e-9


@dataclass(frozen=True)
class Measured:
    """A checkpoint at a strength, and the measures that the rule compares; None where there is no value.

    `averaged`: whether it has the averages of the weights instead of the weights.
    `stop_rate`: the share of the samples that stopped on their own and in which something can be heard.
    `error_rate`: of words, or of characters in languages without spaces.
    """

    label: str
    step: int
    strength: float = 1.0
    stop_rate: float | None = None
    error_rate: float | None = None
    similarity: float | None = None
    mos: float | None = None
    mel_distance_db: float | None = None
    averaged: bool = False

    @classmethod
    def of(cls, label: str, step: int, averaged: bool, strength: float, results: Mapping[str, Any]) -> Measured:
        """Take the measures from the content of an evaluation.json."""
        items = results["items"]
        speaks = [bool(item["stopped"]) and item["not_measured"] is None for item in items]
        errors = results.get(error_rate_of(item["words"] for item in items))
        return cls(
            label, step, strength, sum(speaks) / len(speaks) if speaks else None, errors,
            results.get("speaker_similarity"), results.get("mos"), results.get("mel_distance_db"), averaged,
        )  # fmt: skip


@dataclass(frozen=True)
class Criterion:
    """One step of the rule: of the checkpoints that are left, those within `margin` of the best value stay."""

    value: str  # name of a field of `Measured`
    title: str
    is_highest_best: bool
    margin: float = 0.0

    @property
    def best(self) -> str:
        return "highest" if self.is_highest_best else "lowest"

    def of(self, measured: Measured) -> float:
        """Return the value, higher being better; -inf for none."""
        value = getattr(measured, self.value)
        if value is None or not math.isfinite(value):
            return -math.inf
        return value if self.is_highest_best else -value

    def shown(self, measured: Measured) -> str:
        return f"{self.title} {getattr(measured, self.value):.3g}"

    def why_dropped(self, measured: Measured, best: Measured) -> str:
        if self.of(measured) == -math.inf:
            return f"no {self.title} could be measured"
        side = "below" if self.is_highest_best else "above"
        by = f"more than {self.margin:g} {side}" if self.margin else side
        return f"{self.shown(measured)}, {by} the {self.best}, {getattr(best, self.value):.3g} of {best.label}"


STOP_RATE = Criterion("stop_rate", "stop rate", True, 0.1)
ERROR_RATE = Criterion("error_rate", "error rate", False, 0.05)
SIMILARITY = Criterion("similarity", "speaker similarity", True, 0.01)
MOS = Criterion("mos", "mos", True, 0.05)
LOWEST_ERROR_RATE = Criterion("error_rate", "error rate", False)
MEL_DISTANCE = Criterion("mel_distance_db", "mel distance in dB", False, 0.1)
RULE_IN_FULL = (STOP_RATE, ERROR_RATE, SIMILARITY, MOS, LOWEST_ERROR_RATE)
RULE_BY_SOUND = (STOP_RATE, MEL_DISTANCE, MOS)
RULE = (
    "Checkpoints whose stop rate is more than 0.1 below the highest are dropped; silent samples do not count as "
    "stopped. Of the rest, those whose error rate is more than 0.05 above the lowest. Of the rest, the highest speaker "
    "similarity decides (within 0.01: equal), then the highest mos (within 0.05: equal), then the lowest error rate, "
    "then the earliest checkpoint, then its weights before their averages, then the strength nearest to 1. What is not "
    "measured is left out. The error rate is that of words, or of characters in languages without spaces. With neither "
    "error rate nor similarity, the lowest mel distance decides after the stop rate (within 0.1 dB: equal)."
)
NOTHING_BETTER = (
    "note: the mel distance decides, for want of anything better: it knows neither words nor voices. Give --recognizer "
    "and --measures similarity"
)


@dataclass(frozen=True)
class Choice:
    """The best checkpoint, why, and why each other one was dropped, by label."""

    best: Measured
    reason: str
    dropped: Mapping[str, str] = field(default_factory=dict)

    def verdict(self, label: str) -> str:
        return "best" if label == self.best.label else self.dropped[label]


def choose(measured: Sequence[Measured]) -> Choice:
    """Return the best of one or more checkpoints, and why. See `RULE`."""
    left, dropped, used = list(measured), dict[str, str](), list[str]()
    reason = "it is the only one"
    for criterion in criteria(measured):
        best = max(left, key=criterion.of)
        limit = criterion.of(best) - criterion.margin - ROUNDING
        stay = [one for one in left if criterion.of(one) >= limit]
        dropped |= {one.label: criterion.why_dropped(one, best) for one in left if one not in stay}
        if len(stay) == 1 < len(left):
            reason = _deciding(criterion, best, len(left), len(measured), used)
        used += [criterion.title] if len(stay) < len(left) else []
        left = stay
    first, *others = sorted(left, key=_order)
    if others:
        equal = f"{len(left)} checkpoints are equal" if len(left) == len(measured) else f"{len(left)} are left as equal"
        reason = f"{equal} by this rule, and it is {_nearest(first, others)}"
    return Choice(first, reason, dropped | {one.label: f"equal to {first.label}" for one in others})


def is_by_sound(measured: Sequence[Measured]) -> bool:
    """Return whether neither words nor voices were measured, so that the mel distance decides."""
    return not any(_is_measured(criterion, measured) for criterion in (ERROR_RATE, SIMILARITY))


def criteria(measured: Sequence[Measured]) -> list[Criterion]:
    """Return the steps of the rule for which at least one checkpoint has a value."""
    rule = RULE_BY_SOUND if is_by_sound(measured) else RULE_IN_FULL
    return [criterion for criterion in rule if _is_measured(criterion, measured)]


def _is_measured(criterion: Criterion, measured: Iterable[Measured]) -> bool:
    return any(criterion.of(one) > -math.inf for one in measured)


def _deciding(criterion: Criterion, best: Measured, left: int, of_all: int, used: Sequence[str]) -> str:
    """Say which criterion has left one checkpoint."""
    among = f"of all {of_all}" if left == of_all else f"of the {left} that {' and '.join(dict.fromkeys(used))} left"
    by = f", by more than {criterion.margin:g}" if criterion.margin else ""
    return f"its {criterion.shown(best)} is the {criterion.best} {among}{by}"


def _order(measured: Measured) -> tuple[float, ...]:
    """Order equal checkpoints: the earliest first, its weights before averages, then by strength: the nearest to 1."""
    return measured.step, measured.averaged, round(abs(measured.strength - 1), 9), measured.strength


def _nearest(first: Measured, others: Sequence[Measured]) -> str:
    """Say by what the first of equal checkpoints comes before the others."""
    same_step = [one for one in others if one.step == first.step]
    found = {
        "the earliest": len(same_step) < len(others),
        "not averaged": any(one.averaged != first.averaged for one in same_step),
        "at the strength nearest to 1": any(one.averaged == first.averaged for one in same_step),
    }
    return ", ".join(words for words, holds in found.items() if holds)


def error_rate_of(texts: Iterable[str]) -> str:
    """Return the name of the error rate that suits these texts: of characters if most letters are in such scripts."""
    letters = [char for text in texts for char in text if char.isalpha()]
    unspaced = sum(unicodedata.name(char, "").split(" ")[0] in WITHOUT_SPACES for char in letters)
    return CHARACTER_ERRORS if 2 * unspaced > len(letters) else WORD_ERRORS
