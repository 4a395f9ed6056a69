"""Where to cut: cues are placed between pauses, and grouped to clips of the wanted length.

A cut is always in a pause. A subtitle's times are approximate: each is moved to a pause nearby. Where two subtitles
have none between them, they stay in one clip.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from higgs_ds.slicing.cues import SENTENCE_END, Cue, Word, join_texts, part_of, reasons_against
from higgs_ds.slicing.voice_activity import Activity, Pause

NEAR_WORDS_S = 0.1  # between a pause and the times of the words around it
LONG_PAUSE_S = 1.0  # longer ones are all equally good between two subtitles
LENGTH_COUNTS = 0.25  # a pause that is longer by 1 s may be farther away by this
SENTENCE_BONUS_S = 0.3  # a pause after a sentence counts as longer by this
LONGEST_GAIN_S = 2.0
KEPT_COUNTS = 1000.0  # nothing is left out for better cuts

TOO_SHORT = "shorter than --min_clip_s, with no neighbour to join"
TOO_LONG = "longer than --max_clip_s, with no pause to cut in"
NO_PAUSE = "no pause near its beginning or end"
LONG_PAUSE = "has a pause longer than --max_pause_s"
NO_SOUND = "no speech at its time"
NO_SUBTITLE = "speech without a subtitle"


@dataclass(frozen=True)
class Limits:
    """The options that decide where clips begin and end, in seconds."""

    min_clip_s: float
    max_clip_s: float
    split_pause_s: float
    max_pause_s: float
    max_shift_s: float
    edge_s: float


@dataclass(frozen=True)
class Clip:
    """A clip, in seconds of its recording. The text is empty until it is transcribed."""

    start_s: float
    end_s: float
    text: str
    speaker: str | None

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class LeftOut:
    """A part of a recording that is in no clip, and why."""

    start_s: float
    end_s: float
    reason: str
    text: str


@dataclass(frozen=True)
class Plan:
    """The clips of a recording and the rest of its speech, each in order of time."""

    clips: list[Clip]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class Unit:
    """What is not divided: a cue or a stretch of speech, and the numbers of the pauses around it.

    None stands for a boundary without a pause, which the next unit in this direction shares.
    """

    cue: Cue
    before: int | None
    after: int | None


def plan_speech(activity: Activity, limits: Limits) -> Plan:
    """Plan the clips of a recording without subtitles; their texts are empty."""
    units = [
        Unit(Cue(left.end_s, right.start_s, ""), i, i + 1) for i, (left, right) in enumerate(pairwise(activity.pauses))
    ]
    return _plan([units], activity, limits)


def plan_cues(cues: Sequence[Cue], activity: Activity, limits: Limits) -> Plan:
    """Plan the clips of a recording with subtitles, in order of their starts."""
    cues = [part for cue in cues for part in _divide(cue, activity.pauses, limits)]
    cues.sort(key=lambda cue: (cue.start_s, cue.end_s))
    reasons = reasons_against(cues, activity.duration_s)
    left_out = [
        LeftOut(cue.start_s, cue.end_s, reason, cue.text) for cue, reason in zip(cues, reasons, strict=True) if reason
    ]
    runs: list[list[Cue]] = [[]]  # nothing is joined across a cue that is left out
    for cue, reason in zip(cues, reasons, strict=True):
        if reason is None:
            runs[-1].append(cue)
        elif runs[-1]:
            runs.append([])
    placed = [_place(run, activity.pauses, limits) for run in runs if run]
    for left, right in pairwise(placed):
        end, start = left[-1].after, right[0].before
        if end is not None and start is not None and end > start:  # no clips may overlap
            left[-1], right[0] = replace(left[-1], after=None), replace(right[0], before=None)
    plan = _plan(placed, activity, limits)
    left_out += plan.left_out + _speech_without_cues(cues, activity, limits)
    return Plan(plan.clips, sorted(left_out, key=lambda part: (part.start_s, part.end_s)))


def _divide(cue: Cue, pauses: Sequence[Pause], limits: Limits) -> list[Cue]:
    """Divide a cue that is too long for a clip at all pauses between its words, if their times are known."""
    if cue.duration_s <= limits.max_clip_s or len(cue.words) < 2:
        return [cue]
    parts: list[list[Word]] = [[cue.words[0]]]
    for word in cue.words[1:]:
        gap = (parts[-1][-1].end_s, word.start_s)
        near = _nearest(pauses, *gap, NEAR_WORDS_S)
        parts.append([word]) if near is not None else parts[-1].append(word)
    return [part_of(cue, words) for words in parts]


def _nearest(pauses: Sequence[Pause], start_s: float, end_s: float, max_shift_s: float) -> int | None:
    """Return the number of the best pause near an interval: close, and long."""
    start_s, end_s = min(start_s, end_s), max(start_s, end_s)
    first = bisect.bisect_left(pauses, start_s - max_shift_s, key=lambda pause: pause.end_s)
    best, best_cost = None, 0.0
    for number in range(first, len(pauses)):
        pause = pauses[number]
        distance = max(0.0, pause.start_s - end_s, start_s - pause.end_s)
        if pause.start_s > end_s + max_shift_s:
            break
        cost = distance - LENGTH_COUNTS * min(pause.duration_s, LONG_PAUSE_S)
        if best is None or cost < best_cost:
            best, best_cost = number, cost
    return best


def _place(cues: Sequence[Cue], pauses: Sequence[Pause], limits: Limits) -> list[Unit]:
    """Find the pauses around consecutive cues."""
    shift = limits.max_shift_s
    before: list[int | None] = [_nearest(pauses, cues[0].start_s, cues[0].start_s, shift)]
    after: list[int | None] = []
    for left, right in pairwise(cues):
        if right.start_s - left.end_s <= 2 * shift:
            end = start = _nearest(pauses, left.end_s, right.start_s, shift)
        else:
            end = _nearest(pauses, left.end_s, left.end_s, shift)
            start = _nearest(pauses, right.start_s, right.start_s, shift)
            if end is not None and start is not None and start < end:
                end = start
        after.append(end)
        before.append(start)
    after.append(_nearest(pauses, cues[-1].end_s, cues[-1].end_s, shift))
    for i, cue in enumerate(cues):
        start, end = before[i], after[i]
        if start is not None and end is not None and start >= end and not _is_silent(cue, pauses[end]):
            # Its speech is on one side of this pause or the other: all three stay together.
            before[i] = after[i] = None
            after[i - 1 : i] = [None] * len(after[i - 1 : i])
            before[i + 1 : i + 2] = [None] * len(before[i + 1 : i + 2])
    return [Unit(*placed) for placed in zip(cues, before, after, strict=True)]


def _is_silent(cue: Cue, pause: Pause) -> bool:
    """Return whether a cue is in a pause for most of its time."""
    return min(cue.end_s, pause.end_s) - max(cue.start_s, pause.start_s) > cue.duration_s / 2


def _plan(runs: Sequence[Sequence[Unit]], activity: Activity, limits: Limits) -> Plan:
    clips: list[Clip] = []
    left_out: list[LeftOut] = []
    for units in runs:
        of_run = _group(units, activity.pauses, limits)
        clips += of_run.clips
        left_out += of_run.left_out
    return Plan(clips, left_out)


def _group(units: Sequence[Unit], pauses: Sequence[Pause], limits: Limits) -> Plan:
    """Group consecutive units to clips: as much speech as possible is kept, and cuts are in long pauses.

    The best grouping of the first units is extended by each clip that the next units can be.
    """
    best = [0.0] * (len(units) + 1)
    first_of: list[int | None] = [None] * (len(units) + 1)  # of the clip that ends there; None if left out
    for last in range(len(units)):
        best[last + 1] = best[last]
        for first in _possible_firsts(units, last, pauses, limits):
            clip = _clip(units[first : last + 1], pauses, limits)
            if clip is None or clip.duration_s < limits.min_clip_s:
                continue
            score = best[first] + KEPT_COUNTS * _speech_s(units[first], units[last], pauses)
            score += _gain(units[last], pauses, limits)
            if score > best[last + 1]:
                best[last + 1], first_of[last + 1] = score, first
    plan, end = Plan([], []), len(units)
    while end:
        start = first_of[end]
        clip = None if start is None else _clip(units[start:end], pauses, limits)
        if start is None or clip is None:
            plan.left_out.append(_left_out(units[end - 1], pauses, limits))
            end -= 1
        else:
            plan.clips.append(clip)
            end = start
    return Plan(plan.clips[::-1], plan.left_out[::-1])


def _possible_firsts(units: Sequence[Unit], last: int, pauses: Sequence[Pause], limits: Limits) -> list[int]:
    """Return the units from which on all are of one speaker and next to each other, up to the last one."""
    firsts = [last]
    for first in range(last, 0, -1):
        left, right = units[first - 1], units[first]
        if left.after != right.before or left.cue.speaker != right.cue.speaker:
            break
        if units[last].cue.end_s - left.cue.end_s > limits.max_clip_s + 2 * limits.max_shift_s:
            break
        firsts.append(first - 1)
    return firsts


def _clip(units: Sequence[Unit], pauses: Sequence[Pause], limits: Limits) -> Clip | None:
    """Return the clip of consecutive units; None if it is not between two pauses, or is too long."""
    before, after = units[0].before, units[-1].after
    if before is None or after is None or before >= after:
        return None
    if any(unit.before is not None and unit.before == unit.after for unit in units):
        return None  # no speech at its time: the text may belong elsewhere
    if _has_long_pause(before, after, pauses, limits):
        return None
    start_s = max(pauses[before].cut_s, pauses[before].end_s - limits.edge_s)
    end_s = min(pauses[after].cut_s, pauses[after].start_s + limits.edge_s)
    clip = Clip(round(start_s, 3), round(end_s, 3), join_texts(unit.cue.text for unit in units), units[0].cue.speaker)
    return clip if clip.duration_s <= limits.max_clip_s else None


def _has_long_pause(before: int, after: int, pauses: Sequence[Pause], limits: Limits) -> bool:
    return any(pauses[number].duration_s > limits.max_pause_s for number in range(before + 1, after))


def _speech_s(first: Unit, last: Unit, pauses: Sequence[Pause]) -> float:
    assert first.before is not None
    assert last.after is not None
    return sum(pauses[number + 1].start_s - pauses[number].end_s for number in range(first.before, last.after))


def _gain(unit: Unit, pauses: Sequence[Pause], limits: Limits) -> float:
    """Return how good a cut after a unit is: by how much its pause is longer than that which is to separate clips."""
    assert unit.after is not None
    pause_s = min(pauses[unit.after].duration_s, LONGEST_GAIN_S)
    bonus = SENTENCE_BONUS_S if SENTENCE_END.search(unit.cue.text) else 0.0
    return pause_s + bonus - limits.split_pause_s


def _left_out(unit: Unit, pauses: Sequence[Pause], limits: Limits) -> LeftOut:
    start_s = unit.cue.start_s if unit.before is None else pauses[unit.before].end_s
    end_s = unit.cue.end_s if unit.after is None else pauses[unit.after].start_s
    if unit.before is not None and unit.after is not None and unit.before >= unit.after:
        return LeftOut(unit.cue.start_s, unit.cue.end_s, NO_SOUND, unit.cue.text)
    if end_s - start_s > limits.max_clip_s:
        reason = TOO_LONG
    elif unit.before is None or unit.after is None:
        reason = NO_PAUSE
    elif _has_long_pause(unit.before, unit.after, pauses, limits):
        reason = LONG_PAUSE
    else:
        reason = TOO_SHORT
    return LeftOut(round(start_s, 3), round(end_s, 3), reason, unit.cue.text)


def _speech_without_cues(cues: Sequence[Cue], activity: Activity, limits: Limits) -> list[LeftOut]:
    """Return the stretches of speech that no subtitle is near to, also none that is left out."""
    found: list[LeftOut] = []
    latest_s, number = float("-inf"), 0  # when the cues that begin before the end of the stretch have ended
    for left, right in pairwise(activity.pauses):
        while number < len(cues) and cues[number].start_s - limits.max_shift_s < right.start_s:
            latest_s = max(latest_s, cues[number].end_s)
            number += 1
        if latest_s + limits.max_shift_s > left.end_s:
            continue
        if found and left.duration_s <= limits.max_pause_s and found[-1].end_s == round(left.start_s, 3):
            found[-1] = replace(found[-1], end_s=round(right.start_s, 3))
        else:
            found.append(LeftOut(round(left.end_s, 3), round(right.start_s, 3), NO_SUBTITLE, ""))
    return found
