"""Each format of subtitles, as its own documentation shows it, and what is no speech of one speaker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from higgs_ds.common.errors import InputError
from higgs_ds.slicing.cues import (
    MUSIC_MARK,
    NO_DURATION,
    NO_SPEECH,
    OUTSIDE,
    OVERLAP,
    TWO_SPEAKERS,
    Cue,
    Word,
    join_texts,
    reasons_against,
)
from higgs_ds.slicing.subtitles import check_subtitles, read_subtitles


def read(folder: Path, name: str, text: str, tiers: tuple[str, ...] | None = None) -> list[Cue]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    assert check_subtitles(path) == []
    return read_subtitles(path, tiers)


def test_srt(tmp_path: Path) -> None:
    text = (
        "\ufeff1\n00:02:16,612 --> 00:02:19,376\nSenator, we're making\nour <i>final</i> approach into 19\n\n"
        "2\n00:02:19,482 --> 00:02:21,609 X1:201 X2:516\n{\\an8}Very good, Lieutenant.\n\n"
        "00:03:00,000 --> 00:03:01,000\nThe year is\n1984\n\n"
        "00:03:13,336 --> 00:03:15,167\n- Yes.\n- No.\n\n"
        "9\n01:00:00,000 --> 01:00:02,500\n- Room &amp; board\n\n10\n01:00:03,000 --> 01:00:04,000\nRoom\n5"
    )
    assert read(tmp_path, "a.srt", text) == [
        Cue(136.612, 139.376, "Senator, we're making our final approach into 19"),
        Cue(139.482, 141.609, "Very good, Lieutenant."),
        Cue(180, 181, "The year is 1984"),
        Cue(193.336, 195.167, "Yes. - No.", several_speakers=True),
        Cue(3600, 3602.5, "Room & board"),
        Cue(3603, 3604, "Room 5"),
    ]


def test_vtt(tmp_path: Path) -> None:
    text = """WEBVTT - This file has cues.

NOTE A comment
of two lines

STYLE
::cue { color: lime }

14
00:01:14.815 --> 00:01:18.114 position:10%,line-left align:left size:35%
<v.first.loud Roger Bingham>We are in <b>New York City</b> &amp; more</v>
1984

00:20.000 --> 00:22.000
<v Anna>Yes.</v>
<v Ben>No.</v>

NOTE the end
"""
    assert read(tmp_path, "a.vtt", text) == [
        Cue(20, 22, "Yes. No.", "Anna", several_speakers=True),
        Cue(74.815, 78.114, "We are in New York City & more 1984", "Roger Bingham"),
    ]


def test_vtt_of_youtube(tmp_path: Path) -> None:
    """Its own captions repeat each line above the next one, and have the times of words."""
    text = """WEBVTT
Kind: captions
Language: en

00:00:00.160 --> 00:00:02.389 align:start position:0%
 
hello<00:00:00.480><c> and</c><00:00:00.720><c> welcome</c>

00:00:02.389 --> 00:00:02.399 align:start position:0%
hello and welcome
 

00:00:02.399 --> 00:00:04.470 align:start position:0%
hello and welcome
to<00:00:02.639><c> the</c>
"""  # noqa: W293
    assert read(tmp_path, "a.vtt", text) == [
        Cue(
            0.16, 2.389, "hello and welcome",
            words=(Word(0.16, 0.48, "hello"), Word(0.48, 0.72, " and"), Word(0.72, 2.389, " welcome")),
        ),
        Cue(2.399, 4.47, "to the", words=(Word(2.399, 2.639, "to"), Word(2.639, 4.47, " the"))),
    ]  # fmt: skip


def test_whisper(tmp_path: Path) -> None:
    """`whisper --word_timestamps True --output_format json`."""
    words = [
        {"word": " Hello", "start": 0.0, "end": 0.42, "probability": 0.9},
        {"word": " there.", "start": 0.42, "end": 0.9, "probability": 0.8},
    ]
    segment = {
        "id": 0, "seek": 0, "start": 0.0, "end": 0.9, "text": " Hello there.", "tokens": [50364, 2425],
        "temperature": 0.0, "avg_logprob": -0.3, "compression_ratio": 0.7, "no_speech_prob": 0.01,
    }  # fmt: skip
    content = {"text": " Hello there. Bye.", "segments": [segment | {"words": words}], "language": "en"}
    content["segments"].append({"id": 1, "start": 4, "end": 5, "text": " Bye."})
    assert read(tmp_path, "a.json", json.dumps(content)) == [
        Cue(0, 0.9, "Hello there.", words=(Word(0, 0.42, " Hello"), Word(0.42, 0.9, " there."))),
        Cue(4, 5, "Bye."),
    ]


def test_whisperx(tmp_path: Path) -> None:
    """Words of two speakers divide a segment; a number has no times of its own."""
    words = [
        {"word": "At", "start": 1.0, "end": 1.2, "score": 0.9, "speaker": "SPEAKER_00"},
        {"word": "9.30"},
        {"word": "then?", "start": 2.0, "end": 2.3, "score": 0.9, "speaker": "SPEAKER_00"},
        {"word": "Yes.", "start": 2.9, "end": 3.2, "score": 0.9, "speaker": "SPEAKER_01"},
    ]
    segments = [{"start": 1.0, "end": 3.2, "text": " At 9.30 then? Yes.", "words": words, "speaker": "SPEAKER_00"}]
    first, second = read(tmp_path, "a.json", json.dumps({"segments": segments, "word_segments": words}))
    assert (first.start_s, first.end_s, first.text, first.speaker) == (1.0, 2.3, "At 9.30 then?", "SPEAKER_00")
    assert (second.start_s, second.end_s, second.text, second.speaker) == (2.9, 3.2, "Yes.", "SPEAKER_01")


def test_audacity(tmp_path: Path) -> None:
    text = "0.500000\t2.250000\tGood morning.\n\\\t100.0\t3000.0\n3.000000\t4.000000\tGood evening.\n"
    assert read(tmp_path, "a.txt", text) == [Cue(0.5, 2.25, "Good morning."), Cue(3, 4, "Good evening.")]


LONG_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 5
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "Mary"
        xmin = 0
        xmax = 5
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 1.5
            text = ""
        intervals [2]:
            xmin = 1.5
            xmax = 3
            text = "She said ""hi""."
        intervals [3]:
            xmin = 3
            xmax = 5
            text = ""
    item [2]:
        class = "TextTier"
        name = "bell"
        xmin = 0
        xmax = 5
        points: size = 1
        points [1]:
            number = 4
            mark = "ding"
"""
ALIGNED_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
5
<exists>
2
"IntervalTier"
"John - words"
0
5
5
0
1
""
1
1.4
"good"
1.4
2
"morning"
2
4
""
4
5
"yes"
"IntervalTier"
"John - phones"
0
5
1
1
1.2
"g"
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_textgrid(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.TextGrid"
    path.write_text(LONG_GRID, encoding=encoding)
    assert read_subtitles(path) == [Cue(1.5, 3, 'She said "hi".', "Mary")]
    with pytest.raises(InputError, match="--tiers Max: it has the interval tiers Mary"):
        read_subtitles(path, ["Max"])


def test_textgrid_of_an_aligner(tmp_path: Path) -> None:
    first, second = read(tmp_path, "a.TextGrid", ALIGNED_GRID)
    assert (first.start_s, first.end_s, first.text, first.speaker) == (1, 2, "good morning", "John")
    assert first.words == (Word(1, 1.4, "good"), Word(1.4, 2, "morning"))
    assert (second.start_s, second.end_s, second.text) == (4, 5, "yes")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.srt", "no times", "has no subtitles"),
        ("a.srt", "1\n00:00:01,000 --> 00:00:02,000\na\n\n2\n00:00:03,000 --> soon\nb\n", "has a time that cannot be"),
        ("a.vtt", "00:01.000 --> 00:02.000\na\n", "is not WebVTT"),
        ("a.vtt", "WEBVTT\n\n00:01.000 --> 2\na\n", "is not WebVTT"),
        ("a.json", "[", "is not JSON"),
        ("a.json", '{"text": "a"}', "has no list of segments"),
        ("a.json", '[{"start": 1, "text": "a"}]', "has segments without start, end and text"),
        ("a.json", '[{"start": 1, "end": NaN, "text": "a"}]', "not finite"),
        ("a.txt", "1.0\t2.0\ta\n\nno label\n", "a.txt:3: is not a label of Audacity"),
        ("a.TextGrid", "no grid", "is not a TextGrid"),
    ],
)
def test_what_is_not_what_its_suffix_says(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, name, text)


def test_names(tmp_path: Path) -> None:
    (tmp_path / "a.doc").touch()
    assert check_subtitles(tmp_path / "a.doc")[0].endswith("must be one of .srt, .vtt, .json, .txt, .textgrid")
    assert check_subtitles(tmp_path / "b.srt")[0].endswith("no such file")
    (tmp_path / "latin.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\nfür\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"is not UTF-8 \(byte 33\)"):
        read_subtitles(tmp_path / "latin.srt")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("♪ la la ♪", MUSIC_MARK),
        ("[upbeat music]", MUSIC_MARK),
        ("(Musik spielt) Hallo", MUSIC_MARK),
        ("Music is what I like.", None),
        ("[Applause]", NO_SPEECH),
        ("...", NO_SPEECH),
        ("sil", NO_SPEECH),
        ("<p:>", NO_SPEECH),
        ("[laughs] Oh no.", None),
        ("Пока.", None),
        ("7", None),
    ],
)
def test_what_is_no_speech(text: str, reason: str | None) -> None:
    assert reasons_against([Cue(1, 2, text)], 10) == [reason]


def test_overlap_and_times() -> None:
    cues = [
        Cue(0, 2, "a"), Cue(1.9, 3, "b"), Cue(2.5, 4, "c"), Cue(5, 9, "d"), Cue(6, 7, "e"), Cue(8, 9.5, "f"),
        Cue(9.4, 9.4, "g"), Cue(9.6, 9.7, "h", several_speakers=True), Cue(10, 11, "i"),
    ]  # fmt: skip
    none, both = None, OVERLAP
    assert reasons_against(cues, 10) == [none, both, both, both, both, both, NO_DURATION, TWO_SPEAKERS, OUTSIDE]


def test_scripts_without_spaces() -> None:
    assert join_texts(["你好。", "再见。", "Hello.", "안녕.", "네."]) == "你好。再见。Hello. 안녕. 네."
