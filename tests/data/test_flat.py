"""Flat JSON lists of recordings, as the documentation of several trainers shows them: read without an option."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_formats import QUIET, WORDS, expect_faults, faults, plain, read, samples, spoken, system, user, write_lines

from higgs_ds.data.formats.reader import read_entries
from higgs_ds.data.formats.recognition import recognize
from higgs_ds.model.sample import AudioClip, Message, Sample
from higgs_ds.options.train import DataOptions

# Each list: its lines, and the paths, speakers and languages that it gives.
LISTS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str | None, str | None]]]] = {
    "NeMo": (
        [
            {"audio_filepath": "clips/a.wav", "text": WORDS, "duration": 2.13, "speaker": 3},
            {"audio_filepath": "clips/b.wav", "duration": 1.5, "text": WORDS, "speaker": 4, "normalized_text": WORDS},
        ],
        [("clips/a.wav", "3", None), ("clips/b.wav", "4", None)],
    ),
    "AudioFolder": ([{"file_name": "train/a.wav", "transcription": WORDS}], [("train/a.wav", None, None)]),
    "Common Voice": (
        [{"client_id": "x7", "path": "a.mp3", "sentence": WORDS, "locale": "de", "up_votes": 2}],
        [("a.mp3", "x7", "de")],
    ),
    "OmniVoice": (
        [{"id": "s_0", "audio_path": "a.wav", "text": WORDS, "language_id": "en"}],
        [("a.wav", None, "en")],
    ),
    "IndexTTS": (
        [{"id": "s_0", "text": WORDS, "audio": "wavs/a.wav", "speaker": "anna", "language": "zh"}],
        [("wavs/a.wav", "anna", "zh")],
    ),
    "speakers as in Kaldi": (
        [{"utt_id": "a", "wav_file": "a.wav", "raw_transcript": WORDS, "spk": "s1"}],
        [("a.wav", "s1", None)],
    ),
    "datasets": ([{"audio": {"path": "a.wav"}, "text": WORDS, "speaker_id": 12}], [("a.wav", "12", None)]),
    "keys in capitals": ([{"Audio": "a.wav", "Text": WORDS, "Speaker": "anna"}], [("a.wav", "anna", None)]),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("is_array", [False, True])
def test_lists(tmp_path: Path, name: str, is_array: bool) -> None:
    """One object per line, or an array with one object per line."""
    lines, expected = LISTS[name]
    path, first = tmp_path / "data", 1
    if is_array:
        path.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]")
        first = 2
    else:
        write_lines(path, *lines)
    assert recognize(path) == "flat"
    assert samples(path) == [
        plain(f"{path}:{first + i}", tmp_path / clip, speaker=speaker, language=language)
        for i, (clip, speaker, language) in enumerate(expected)
    ]


def test_audio_file_in_an_array_is_metadata(tmp_path: Path) -> None:
    """That form has keys of its own; one object per line has not."""
    entry = {"audio_file": "a.wav", "text": WORDS}
    assert recognize(write_lines(tmp_path / "lines", entry)) == "flat"
    assert recognize(write_lines(tmp_path / "array", json.dumps([entry]))) == "metadata"
    ours, theirs = samples(tmp_path / "lines")[0], samples(tmp_path / "array")[0]
    assert ours.messages == theirs.messages


def test_folder_with_metadata_jsonl(tmp_path: Path) -> None:
    """The clips beside it, also those that it does not name, do not make it a folder of pairs."""
    (tmp_path / "a.wav").touch()
    (tmp_path / "b.wav").touch()
    path = write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.wav", "text": WORDS})
    assert recognize(tmp_path) == "flat"
    assert samples(tmp_path) == [plain(f"{path}:1", tmp_path / "a.wav")]


def test_segments(tmp_path: Path) -> None:
    """With an offset, a part of the file; a duration alone describes the file."""
    entry = {"audio_filepath": "a.wav", "text": WORDS}
    path = write_lines(
        tmp_path / "data", entry | {"offset": 1.5, "duration": 2}, entry | {"offset": 0}, entry | {"duration": 2}
    )
    clips = [AudioClip(tmp_path / "a.wav", 1.5, 2.0), AudioClip(tmp_path / "a.wav"), AudioClip(tmp_path / "a.wav")]
    assert samples(path) == [plain(f"{path}:{i + 1}", clip) for i, clip in enumerate(clips)]


def test_embedded_audio(tmp_path: Path) -> None:
    encoded = base64.b64encode(b"RIFF").decode()
    path = write_lines(tmp_path / "data", {"audio": {"bytes": encoded, "path": "a.wav"}, "text": WORDS})
    assert samples(path) == [plain(f"{path}:1", AudioClip(path, data=b"RIFF"))]


REFERENCES = [
    {"ref_audio": "r.wav", "ref_text": "Said before."},
    {"prompt_audio": {"path": "r.wav"}, "prompt_text": " Said before. "},
    {"reference_audio": "r.wav", "reference_text": "Said before.", "style": ""},
]


@pytest.mark.parametrize("keys", REFERENCES)
def test_references(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = write_lines(tmp_path / "data", {"audio": "a.wav", "text": WORDS} | keys)
    reference, clip = tmp_path / "r.wav", tmp_path / "a.wav"
    context = (system(), user("Said before."), spoken(reference), user(WORDS), spoken(clip))
    assert samples(path) == [Sample(context, 3, None, f"{path}:1")]
    in_system = Message(
        "system",
        (
            f"Generate audio following instruction.\n\n<|scene_desc_start|>\n{QUIET}\n\nSPEAKER0: ",
            AudioClip(reference),
            "\n<|scene_desc_end|>",
        ),
    )
    expected = Sample((in_system, user(WORDS), spoken(clip)), 1, None, f"{path}:1")
    assert samples(path, reference="system") == [expected]
    assert samples(path, reference="none") == [plain(f"{path}:1", clip)]
    # Qwen3-TTS gives no text for the reference.
    write_lines(path, {"audio": "a.wav", "text": WORDS, "ref_audio": "r.wav", "ref_text": ""})
    assert samples(path) == [expected]


@pytest.mark.parametrize("key", ["description", "style", "instruct"])
def test_descriptions(tmp_path: Path, key: str) -> None:
    path = write_lines(tmp_path / "data", {"audio": "a.wav", "text": WORDS, key: "old, slow"})
    described = system(f"{QUIET}\n\nSPEAKER0: old, slow")
    assert samples(path) == [Sample((described, user(WORDS), spoken(tmp_path / "a.wav")), 1, None, f"{path}:1")]


def test_faults(tmp_path: Path) -> None:
    good = {"audio": "a.wav", "text": WORDS}
    cases: list[tuple[Any, list[str]]] = [
        (7, ["sample: must be an object with the path of a recording and its text, but is a number"]),
        ({"text": WORDS}, ["sample: no audio key (accepted names: audio, wav_filename,"]),
        ({"audio": "a.wav", "text": None}, ["sample: no text key (accepted names: transcript,"]),
        (good | {"text": " "}, ["text: is empty or blank"]),
        (good | {"audio": 3}, ["audio: must be the path of a file, but is 3"]),
        (good | {"audio": {"path": None}}, ["audio.path: must be the path of a file, but is None"]),
        (good | {"audio": {"bytes": "?"}}, ["audio.bytes: '?' is not base64"]),
        (good | {"audio": "s3://b/a.wav"}, ["audio: 's3://b/a.wav' is a URL, not a local file"]),
        (good | {"speker": "anna"}, ["speker: is not a known key; did you mean 'speaker'?"]),
        (good | {"offset": -1}, ["offset: must be a number of seconds, 0 or more, but is -1"]),
        (good | {"offset": 1, "duration": "2"}, ["duration: must be a number of seconds, 0 or more, but is '2'"]),
        (good | {"speaker": {}}, ["speaker: must be a string, but is empty"]),
        (good | {"ref_audio": [], "ref_text": 1}, ["ref_audio: must be the path of a file", "ref_text: must be a str"]),
        (good | {"style": "<|scene_desc_end|>"}, ["style: contains <|scene_desc_end|>"]),
    ]
    path = write_lines(tmp_path / "data", good, *(value for value, _ in cases))
    expected = [f":{i + 2}: {fault}" for i, (_, found) in enumerate(cases) for fault in found]
    expect_faults(path, expected)
    write_lines(path, good, "{", good)
    assert [entry.sample is not None for entry in read(path)] == [True, False, True]
    assert faults(path)[0].startswith(f"{path}:2: not JSON")


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Change a few bytes and lines: other bytes, and lines that are left out, repeated, exchanged or cut off."""
    changed = bytearray(content)
    for _ in range(draw.randint(0, 6)):
        at = draw.randrange(len(changed) + 1)
        other = draw.choice([draw.randbytes(draw.randint(0, 3)), b" ", b"\n", b"|", b"-", b'"'])
        changed[at : at + draw.randint(0, 3)] = other
    lines = bytes(changed).splitlines(keepends=True)
    for _ in range(draw.randint(0, 2)):
        at, other_at = draw.randrange(len(lines)), draw.randrange(len(lines))
        lines[at] = draw.choice([b"", 2 * lines[at], lines[other_at], lines[at][: draw.randint(0, len(lines[at]))]])
    return b"".join(lines)


def test_mutations(tmp_path: Path) -> None:
    """A thousand damaged lists give samples or faults, with a line, and never an exception."""
    lines = "".join(json.dumps(line) + "\n" for name in LISTS for line in LISTS[name][0]).encode()
    draw, path = random.Random(0), tmp_path / "data"
    for _ in range(1000):
        path.write_bytes(damaged(lines, draw))
        for entry in read_entries(path, DataOptions()):
            assert (entry.sample is None) == bool(entry.faults)
            assert entry.source.startswith(str(path))
