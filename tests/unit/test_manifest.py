"""Every fault of a manifest is named with file, line and field, all in one pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from higgs_ds.data.manifest import read_manifest
from higgs_ds.data.sample import AudioClip

AUDIO = {"type": "audio", "audio_url": "a.wav"}


def sample(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


GOOD = sample(("user", "Hello."), ("assistant", AUDIO))

FAULTS = [
    ({"start_index": 0}, "messages: must be a list of one or more messages, is missing"),
    (["no", "object"], "sample: must be an object with 'messages', is a list"),
    (sample(("usr", "Hello."), ("assistant", AUDIO)), "messages[0].role: 'usr' is not a role; allowed: system, user, "),
    (sample(("user", " "), ("assistant", AUDIO)), "messages[0].content: is an empty text"),
    (
        sample(("user", ["Hi", {"type": "text", "text": ""}]), ("assistant", AUDIO)),
        "messages[0].content[1].text: is an",
    ),
    (sample(("user", None), ("assistant", AUDIO)), "messages[0].content: must be a text, an object with 'type', or"),
    (sample(("user", []), ("assistant", AUDIO)), "messages[0].content: is empty"),
    (
        sample(("user", "Hi"), ("assistant", {"type": "video"})),
        "messages[1].content.type: 'video' is not a content type",
    ),
    (
        sample(("user", "Hi"), ("assistant", {"type": "audio"})),
        "messages[1].content.audio_url: must name an audio file",
    ),
    (
        sample(("user", "Hi"), ("assistant", AUDIO | {"offset": -1})),
        "messages[1].content.offset: must be seconds, 0 or",
    ),
    (sample(("user", "Hi"), ("assistant", AUDIO | {"duration": 0})), "messages[1].content.duration: is 0 seconds"),
    (
        sample(("user", "Hi"), ("assistant", AUDIO | {"duration": "2 s"})),
        "messages[1].content.duration: must be seconds",
    ),
    (
        sample(("user", "Hi"), ("assistant", AUDIO | {"raw_audio": "UklGRg=="})),
        "messages[1].content.raw_audio: audio insi",
    ),
    (
        sample(("user", "Hi"), ("assistant", "Only words.")),
        "messages: no target audio: no assistant message to be learned",
    ),
    (
        sample(("user", "Hi"), ("assistant", AUDIO), ("user", "Bye"), start_index=2),
        "messages: no assistant message at or",
    ),
    (
        sample(("user", "Hi"), ("assistant", AUDIO), start_index=2),
        "start_index: must be from 0 to 1, the index of a messa",
    ),
    (
        sample(("user", "Hi"), ("assistant", AUDIO), start_indx=1),
        "start_indx: is not a known key; did you mean 'start_ind",
    ),
    (sample(("user", "Hi"), ("assistant", AUDIO), speaker=7), "speaker: must be a string, is a number"),
    (
        sample(("user", "Say <|AUDIO_OUT|>"), ("assistant", AUDIO)),
        "messages[0].content: holds <|AUDIO_OUT|>, which the",
    ),
    ({"messages": ["Hi"]}, "messages[0]: must be an object with 'role' and 'content', is a string"),
]


def test_each_fault_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    entries = [GOOD, *(fault for fault, _ in FAULTS), GOOD]
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + '\n{"messages": [\n')
    samples, problems = read_manifest(path, allow_text_targets=False)
    assert len(samples) == 2
    by_line = {problem.split(": ")[0]: problem for problem in problems}
    assert len(by_line) == len(problems) == len(FAULTS) + 1
    for line, (_, expected) in enumerate(FAULTS, start=2):
        assert by_line[f"{path}:{line}"].startswith(f"{path}:{line}: {expected}")
    assert f"{path}:{len(entries) + 1}: not JSON: " in problems[-1]


def test_array_has_the_lines_of_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    bad = sample(("user", ""), ("assistant", AUDIO))
    path.write_text("[\n" + json.dumps(GOOD) + ",\n" + json.dumps(bad, indent=1) + ",\n\n" + json.dumps(bad) + "\n]")
    samples, problems = read_manifest(path, allow_text_targets=False)
    lines = path.read_text().split("\n")
    last = next(i for i, line in enumerate(lines, start=1) if line == json.dumps(bad))
    assert [s.source for s in samples] == [f"{path}:2"]
    assert [problem.split(": ")[0] for problem in problems] == [f"{path}:3", f"{path}:{last}"]


@pytest.mark.parametrize("text", ["", "\n\n", "[]", "[ \n ]"])
def test_nothing_in_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(text)
    assert read_manifest(path, allow_text_targets=False) == ([], [f"{path}: holds no samples"])


@pytest.mark.parametrize("text", ["[" + json.dumps(GOOD), "[" + json.dumps(GOOD) + " " + json.dumps(GOOD) + "]"])
def test_broken_array(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    samples, problems = read_manifest(path, allow_text_targets=False)
    assert len(samples) == 1
    assert len(problems) == 1
    assert "not JSON" in problems[0]


def test_missing_file(tmp_path: Path) -> None:
    samples, problems = read_manifest(tmp_path / "none.jsonl", allow_text_targets=False)
    assert samples == []
    assert "cannot be read" in problems[0]


def test_content_forms_and_speaker(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    entry = sample(
        ("system", {"type": "text", "text": "Be brief."}),
        ("user", ["Say ", {"type": "text", "text": "this."}]),
        ("assistant", [{"type": "audio", "audio_url": "sub/a.wav", "offset": 1, "duration": 2.5}]),
        misc={"speaker": "s1"},
        id="mine",
    )
    path.write_text(json.dumps(entry))
    (read,), problems = read_manifest(path, allow_text_targets=False)
    assert problems == []
    assert [message.parts for message in read.messages[:2]] == [("Be brief.",), ("Say ", "this.")]
    assert read.clips == [AudioClip(tmp_path / "sub/a.wav", 1.0, 2.5)]
    assert read.speaker == "s1"


def test_text_targets_where_allowed(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(sample(("user", AUDIO), ("assistant", "A transcript."))))
    assert len(read_manifest(path, allow_text_targets=True)[0]) == 1
    assert len(read_manifest(path, allow_text_targets=False)[1]) == 1
