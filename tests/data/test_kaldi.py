"""Data folders of Kaldi: samples, speakers and segments; commands are never run; damaged files give faults."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from test_corpora import write_tree
from test_flat import damaged
from test_formats import expect_faults, plain, samples

from higgs_ds.data.formats import keyed_lines
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.data.formats.recognition import recognize
from higgs_ds.model.sample import AudioClip
from higgs_ds.options.train import DataOptions

SEGMENTED = {
    "wav.scp": "rec_1 clips/rec 1.wav\nrec_2 /data/rec_2.flac\n",
    "text": "anna-rec_1-1 GOOD MORNING\nanna-rec_1-2 早上 好\nben-rec_2-1 YES\n",
    "segments": "anna-rec_1-1 rec_1 0.50 2.25\nanna-rec_1-2 rec_1 3 4.5\nben-rec_2-1 rec_2 1e1 -1\n",
    "utt2spk": "anna-rec_1-1 anna\nanna-rec_1-2 anna\nben-rec_2-1 ben\n",
    "utt2lang": "anna-rec_1-1 en\nanna-rec_1-2 zh\nben-rec_2-1 en\n",
    "spk2utt": "anna anna-rec_1-1 anna-rec_1-2\nben ben-rec_2-1\n",
}


def test_segments(tmp_path: Path) -> None:
    write_tree(tmp_path, SEGMENTED)
    assert recognize(tmp_path) == "kaldi"
    first, second = tmp_path / "clips" / "rec 1.wav", Path("/data/rec_2.flac")
    assert samples(tmp_path) == [
        plain(f"{tmp_path}/text:1", AudioClip(first, 0.5, 1.75), "GOOD MORNING", "anna", "en"),
        plain(f"{tmp_path}/text:2", AudioClip(first, 3.0, 1.5), "早上 好", "anna", "zh"),
        plain(f"{tmp_path}/text:3", AudioClip(second, 10.0), "YES", "ben", "en"),
    ]


def test_without_segments(tmp_path: Path) -> None:
    """As CosyVoice prepares LibriTTS; in any order, with tabs, Windows line ends and a mark of the byte order."""
    files = {"wav.scp": "b\tb.wav\r\na  a.wav\r\n", "text": "\ufeffa One.\n\nb\tTwo. \n", "utt2spk": "b 7\na 8\n"}
    root = write_tree(tmp_path, files)
    assert samples(root) == [
        plain(f"{root}/text:1", root / "a.wav", "One.", "8"),
        plain(f"{root}/text:3", root / "b.wav", "Two.", "7"),
    ]
    (root / "utt2spk").unlink()
    assert [sample.speaker for sample in samples(root)] == [None, None]


def test_commands_are_refused_and_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "it ran"
    commands = [f"touch '{ran}' |", f"|touch '{ran}'", "raw/feats.ark:17", "-", "s3://b/a.wav", ""]
    root = write_tree(
        tmp_path / "data",
        {
            "wav.scp": "".join(f"u{i} {command}\n" for i, command in enumerate(commands)),
            "text": "".join(f"u{i} Hi.\n" for i in range(len(commands))),
        },
    )
    expected = [
        "is a command, and none is run; write its output to a file and name that",
        "is a command, and none is run; write its output to a file and name that",
        "'raw/feats.ark:17' is a place in an archive; name an audio file",
        "is the standard input; name a file",
        "'s3://b/a.wav' is a URL, not a local file",
        "has nothing after the ID",
    ]
    found = [entry.faults for entry in read_entries(root, DataOptions())]
    assert len(found) == len(expected)
    for i, ((fault,), end) in enumerate(zip(found, expected, strict=True), start=1):
        assert fault.startswith(f"wav.scp:{i}: ")
        assert end in fault
    assert not ran.exists()


def test_faults(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "wav.scp": "r1 r1.wav\nr2 r2.wav\nr1 other.wav\n",
            "text": "u1 One.\nu2\nu3 Three.\nu4 Four.\nu5 Five.\nu6 Six.\nu1 Again.\nu7 Seven.\nu8 Eight.\n",
            "segments": "u1 r1 0 1\nu2 r1 0 1\nu3 r3 0 1\nu4 r1 2 1\nu5 r1 x 1\nu6 r1 0 1 2\n"
            "u8 r1 0 1e999\nu9 r1 0 1\n",
            "utt2spk": "".join(f"u{i} anna\n" for i in (1, 2, 3, 4, 5, 6, 7)) + "u1 ben\n",
        },
    )
    expected = [
        "/text:2: text: is empty or blank",
        "/text:3: wav.scp: has no line for 'r3'",
        "/text:4: segments:4: must start at 0 or later and end after that, but is from 2 to 1",
        "/text:5: segments:5: start and end must be seconds, but are 'x 1'",
        "/text:6: segments:6: must have a recording, a start and an end, but has 'r1 0 1 2'; a channel is not sup",
        "/text:7: line: 'u1' is given twice, first in line 1",
        "/text:8: segments: has no line for 'u7'",
        "/text:9: segments:7: must start at 0 or later and end after that, but is from 0 to 1e999",
        "/text:9: utt2spk: has no line for 'u8'",
        "/wav.scp:2: line: no segment with a text is of recording 'r2'",
        "/wav.scp:3: line: 'r1' is given twice, first in line 1",
        "/segments:8: line: text has no line for 'u9'",
        "/utt2spk:8: line: 'u1' is given twice, first in line 1",
    ]
    expect_faults(root, expected)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"wav.scp": "a a.wav\nb b.wav\n", "text": ""})
    (root / "text").write_bytes("a Grüße.\nb Hi.\n".encode("latin-1"))
    expect_faults(root, ["/text:1: line: b'a Gr\\xfc\\xdfe.\\n' is not UTF-8; save the file as UTF-8"])


def test_lines_that_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed_lines, "LONGEST_LINE", 64)
    long = "x" * 200
    root = write_tree(tmp_path, {"wav.scp": "a a.wav\nb b.wav\nc c.wav\n", "text": f"a {long}\nb Hi.\n{long}\nc Ho."})
    expected = ["/text:1: line: the line is longer than 64 bytes", "/text:3: line: the line is longer than 64 bytes"]
    expected.append("/text:3: wav.scp: has no line for")
    expect_faults(root, expected)


def test_mutations(tmp_path: Path) -> None:
    """A thousand damaged folders give samples or faults, with a line, and never an exception."""
    draw, root = random.Random(0), tmp_path / "data"
    write_tree(root, SEGMENTED)
    num_samples = num_faults = 0
    for _ in range(1000):
        name = draw.choice(["wav.scp", "text", "segments", "utt2spk", "utt2lang"])
        (root / name).write_bytes(damaged(SEGMENTED[name].encode(), draw))
        for entry in read_entries(root, DataOptions()):
            assert (entry.sample is None) == bool(entry.faults)
            assert entry.source.startswith(str(root))
            "".join(entry.faults).encode()
            num_samples += entry.sample is not None
            num_faults += bool(entry.faults)
        (root / name).write_text(SEGMENTED[name])
    assert min(num_samples, num_faults) > 500
