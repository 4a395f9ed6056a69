"""Where clips begin and end, on recordings whose pauses are known."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
from long_recording import known_activity, srt_of, write_recording

from higgs_ds.common.errors import collect_problems
from higgs_ds.slicing.cues import Cue, Word
from higgs_ds.slicing.cuts import (
    LONG_PAUSE,
    NO_PAUSE,
    NO_SOUND,
    NO_SUBTITLE,
    TOO_LONG,
    TOO_SHORT,
    Limits,
    plan_cues,
    plan_speech,
)
from higgs_ds.slicing.subtitles import read_subtitles
from higgs_ds.slicing.voice_activity import Activity, Pause

LIMITS = Limits(
    min_clip_s=2.0, max_clip_s=20.0, split_pause_s=0.7, max_pause_s=2.0, max_shift_s=0.5, edge_s=0.2
)  # fmt: skip


def activity(*speech: tuple[float, float], duration_s: float) -> Activity:
    edges = [0.0, *(time for stretch in speech for time in stretch), duration_s]
    pauses = [Pause(start, end, (start + end) / 2) for start, end in list(pairwise(edges))[::2]]
    return Activity(duration_s, pauses)


def spans(clips: list) -> list[tuple[float, float]]:
    return [(clip.start_s, clip.end_s) for clip in clips]


def test_long_pauses_separate_and_short_ones_do_not() -> None:
    plan = plan_speech(activity((1, 3), (3.3, 5), (6, 8.5), (8.8, 11), duration_s=12), LIMITS)
    assert spans(plan.clips) == [(0.8, 5.2), (5.8, 11.2)]
    assert plan.left_out == []


def test_a_cut_in_a_short_pause_is_in_its_middle() -> None:
    plan = plan_speech(activity((1, 13), (13.3, 23), duration_s=24), LIMITS)
    assert spans(plan.clips) == [(0.8, 13.15), (13.15, 23.2)]


def test_what_fits_in_no_clip() -> None:
    found = activity((1, 2), (5, 30), (31, 40), duration_s=41)
    plan = plan_speech(found, LIMITS)
    assert spans(plan.clips) == [(30.8, 40.2)]
    assert [(part.start_s, part.end_s, part.reason) for part in plan.left_out] == [
        (1, 2, TOO_SHORT), (5, 30, TOO_LONG),
    ]  # fmt: skip


def test_times_of_cues_move_to_pauses() -> None:
    found = activity((1, 4), (4.8, 8), duration_s=9)
    plan = plan_cues([Cue(1.3, 4.5, "a"), Cue(4.4, 7.7, "b")], found, LIMITS)
    assert spans(plan.clips) == [(0.8, 4.2), (4.6, 8.2)]
    assert [clip.text for clip in plan.clips] == ["a", "b"]


def test_cues_without_a_pause_between_them_stay_together() -> None:
    found = activity((1, 8), duration_s=9)
    plan = plan_cues([Cue(1, 4, "a"), Cue(4, 8, "b")], found, LIMITS)
    assert [(clip.start_s, clip.end_s, clip.text) for clip in plan.clips] == [(0.8, 8.2, "a b")]
    plan = plan_cues([Cue(1, 4, "a", "anna"), Cue(4, 8, "b", "ben")], found, LIMITS)
    assert plan.clips == []
    assert [part.reason for part in plan.left_out] == [NO_PAUSE, NO_PAUSE]


def test_a_speaker_has_clips_of_their_own() -> None:
    found = activity((1, 2.5), (3, 4.2), (4.6, 7), duration_s=9)
    cues = [Cue(1, 2.5, "a", "anna"), Cue(3, 4.2, "b", "anna"), Cue(4.6, 7, "c", "ben")]
    plan = plan_cues(cues, found, LIMITS)
    assert [(clip.text, clip.speaker) for clip in plan.clips] == [("a b", "anna"), ("c", "ben")]


def test_a_long_cue_is_divided_where_its_words_leave_a_pause() -> None:
    words = (Word(1, 8, "one"), Word(8, 12, "two."), Word(12.5, 18, "three"), Word(18.4, 26, "four."))
    found = activity((1, 12), (12.5, 18), (18.4, 26), duration_s=27)
    plan = plan_cues([Cue(1, 26, "one two. three four.", words=words)], found, LIMITS)
    assert [(*spans([clip])[0], clip.text) for clip in plan.clips] == [
        (0.8, 12.2, "one two."), (12.3, 26.2, "three four."),
    ]  # fmt: skip
    plan = plan_cues([Cue(1, 26, "one two. three four.")], found, LIMITS)
    assert [part.reason for part in plan.left_out] == [TOO_LONG]


def test_nothing_is_joined_across_what_is_left_out() -> None:
    found = activity((1, 4), (5, 7), (8, 11), (13, 16), duration_s=20)
    cues = [Cue(1, 4, "a"), Cue(5, 7, "♪ la ♪"), Cue(8, 11, "b"), Cue(17, 19, "c")]
    plan = plan_cues(cues, found, LIMITS)
    assert [clip.text for clip in plan.clips] == ["a", "b"]
    assert [(part.text, part.reason) for part in plan.left_out] == [
        ("♪ la ♪", "music"), ("", NO_SUBTITLE), ("c", NO_SOUND),
    ]  # fmt: skip


def test_a_long_pause_is_in_no_clip() -> None:
    found = activity((1, 4), (7, 10), (11, 14), duration_s=15)
    plan = plan_cues([Cue(1, 10, "a"), Cue(11, 14, "b")], found, LIMITS)
    assert [clip.text for clip in plan.clips] == ["b"]
    assert [(part.start_s, part.end_s, part.reason) for part in plan.left_out] == [(1, 10, LONG_PAUSE)]
    assert spans(plan_speech(found, LIMITS).clips) == [(0.8, 4.2), (6.8, 10.2), (10.8, 14.2)]


def test_a_word_on_either_side_of_a_pause_stays_with_both() -> None:
    """The time of "b" is nearer to the pause before it, on both sides, but it is spoken after it."""
    found = activity((1, 4), (4.6, 8), duration_s=9)
    plan = plan_cues([Cue(1, 3.9, "a"), Cue(4.4, 4.9, "b"), Cue(5.0, 8, "c")], found, LIMITS)
    assert [(*spans([clip])[0], clip.text) for clip in plan.clips] == [(0.8, 8.2, "a b c")]


def mutated(text: str, random: random.Random) -> bytes:
    """Return a text with some lines or bytes changed, doubled, moved or removed."""
    lines = text.split("\n")
    for _ in range(random.randint(1, 4)):
        i, j = random.randrange(len(lines)), random.randrange(len(lines))
        what = random.randrange(6)
        if what == 0:
            del lines[i]
        elif what == 1:
            lines.insert(i, lines[j])
        elif what == 2:
            lines[i], lines[j] = lines[j], lines[i]
        elif what == 3:
            lines[i] = lines[i].translate({ord(a): b for a, b in zip("0123:,->", "9870;.>-", strict=True)})
        elif what == 4:
            lines[i] = lines[i][: random.randrange(len(lines[i]) + 1)]
        else:
            lines[i] = lines[i].replace(":", random.choice(["", ":9", "-", "99:"]), 1)
        lines = lines or [""]
    content = bytearray("\n".join(lines).encode())
    for _ in range(random.randint(0, 3)):
        content[random.randrange(len(content))] = random.randrange(256)
    return bytes(content)


def test_1000_mutations_of_an_srt(tmp_path: Path) -> None:
    """Each gives clips between pauses, of the wanted length, with text; or a report that names the file."""
    spoken = write_recording(tmp_path / "recording.flac", 20)
    found = known_activity(spoken, spoken[-1].end_s + 1)
    path, text = tmp_path / "a.srt", srt_of(spoken)
    source, reports, planned = random.Random(4), 0, 0
    for _ in range(1000):
        path.write_bytes(mutated(text, source))
        problems: list[str] = []
        cues = collect_problems(problems, lambda: read_subtitles(path))
        assert all(problem.startswith(str(path)) for problem in problems)
        if cues is None:
            reports += 1
            continue
        plan = plan_cues(cues, found, LIMITS)
        planned += len(plan.clips)
        for clip in plan.clips:
            assert 2 <= round(clip.duration_s, 3) <= 20
            assert clip.text
            assert all(
                part.end_s <= clip.start_s
                or part.start_s >= clip.end_s
                or (clip.start_s <= part.start_s and part.end_s <= clip.end_s)
                for part in spoken
            )
        assert all(left.end_s <= right.start_s for left, right in pairwise(plan.clips))
        assert all(part.reason for part in plan.left_out)
    assert 100 < reports < 900
    assert planned > 1000


@pytest.mark.parametrize("off_by_s", [0.0, 0.3])
def test_subtitles_get_their_own_speech(tmp_path: Path, off_by_s: float) -> None:
    spoken = write_recording(tmp_path / "recording.flac")
    (tmp_path / "a.srt").write_text(srt_of(spoken, off_by_s), encoding="utf-8")
    plan = plan_cues(read_subtitles(tmp_path / "a.srt"), known_activity(spoken, spoken[-1].end_s + 1), LIMITS)
    for clip in plan.clips:
        inside = [part.text for part in spoken if clip.start_s < part.start_s and part.end_s < clip.end_s]
        assert clip.text == " ".join(inside)
    assert sum(clip.text.count(" ") + 1 for clip in plan.clips) == sum(part.text.count(" ") + 1 for part in spoken)
