"""ChatML: one pass reports every fault with file, line and field, and no input raises an exception."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_ds.data.formats import jsonio
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.model.sample import AudioClip, Entry, Message, Sample
from higgs_ds.options.train import DataOptions

AUDIO = {"type": "audio", "audio_url": "a.wav"}
OPTIONS = DataOptions(format="chatml")


def sample(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


def answer(**more: Any) -> dict[str, Any]:
    return sample(("user", "Hi"), ("assistant", AUDIO | more))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


GOOD = sample(("user", "Hello."), ("assistant", AUDIO))

FAULTS = [
    ({"start_index": 0}, "messages: must be a list of one or more messages, but is missing"),
    ({"messages": {}}, "messages: must be a list of one or more messages, but is empty"),
    (["no", "object"], "sample: must be an object with 'messages', but is a list"),
    (None, "sample: must be an object with 'messages', but is missing"),
    (sample(("usr", "Hello."), ("assistant", AUDIO)), "messages[0].role: 'usr' is not a role; allowed: system, user, "),
    ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages[0].role: ['user'] is not a role"),
    (sample(("user", " "), ("assistant", AUDIO)), "messages[0].content: is empty or blank"),
    (
        sample(("user", ["Hi", {"type": "text", "text": ""}]), ("assistant", AUDIO)),
        "messages[0].content[1].text: is empty or blank",
    ),
    (sample(("user", None), ("assistant", AUDIO)), "messages[0].content: must be a string, an object with 'type'"),
    (sample(("user", []), ("assistant", AUDIO)), "messages[0].content: is an empty list"),
    (sample(("user", "Hi"), ("assistant", {"type": "video"})), "messages[1].content.type: 'video' is not a content ty"),
    (sample(("user", "Hi"), ("assistant", {"type": ["audio"]})), "messages[1].content.type: ['audio'] is not a conte"),
    (sample(("user", "Hi"), ("assistant", {"type": "audio"})), "messages[1].content.audio_url: must be the path of a "),
    (answer(audio_url="a\0.wav"), "messages[1].content.audio_url: 'a\\x00.wav' is not a valid file name"),
    (
        answer(audio_url="https://x/a.wav"),
        "messages[1].content.audio_url: 'https://x/a.wav' is a URL, not a local file; download it",
    ),
    (answer(audio_url=None, url="a.wav"), "messages[1].content.url: belongs to the native format"),
    (answer(offset=-1), "messages[1].content.offset: must be a number of seconds, 0 or more, but is -1"),
    (answer(offset=float("nan")), "messages[1].content.offset: must be a number of seconds, 0 or more, but is nan"),
    (answer(offset=10**400), "messages[1].content.offset: must be a number of seconds, 0 or more, but is inf"),
    (answer(offset=True), "messages[1].content.offset: must be a number of seconds, 0 or more, but is True"),
    (answer(duration=0), "messages[1].content.duration: is 0 seconds"),
    (answer(duration="2 s"), "messages[1].content.duration: must be a number of seconds"),
    (answer(audio_url="", raw_audio="U$klGRg=="), "messages[1].content.raw_audio: 'U$klGRg==' is not base64"),
    (answer(audio_url="", raw_audio="ä"), "messages[1].content.raw_audio: 'ä' is not base64"),
    (
        answer(audio_url="", raw_audio=7),
        "messages[1].content.raw_audio: must be an audio file in base64, but is a number",
    ),
    (answer(audio_url="", raw_audio=" "), "messages[1].content.raw_audio: contains no data"),
    (sample(("user", "Hi"), ("assistant", "Only words.")), "messages: no target audio: none of the assistant messages"),
    (
        sample(("user", "Hi"), ("assistant", AUDIO), ("user", "Bye"), start_index=2),
        "messages: no assistant message at or",
    ),
    (answer() | {"start_index": 2}, "start_index: must be the index of a message, from 0 to 1, but is 2"),
    (answer() | {"start_index": 0.5}, "start_index: must be the index of a message, from 0 to 1, but is 0.5"),
    (answer() | {"start_index": True}, "start_index: must be the index of a message, from 0 to 1, but is True"),
    (
        answer() | {"start_index": nested(300)},
        "start_index: must be the index of a message, from 0 to 1, but is [[[...]]]",
    ),
    (answer() | {"start_indx": 1}, "start_indx: is not a known key; did you mean 'start_index'?"),
    (answer(ofset=1), "messages[1].content.ofset: is not a known key; did you mean 'offset'?"),
    ({"messages": [{"role": "user", "contents": "Hi"}]}, "messages[0].contents: is not a known key; did you mean 'con"),
    (answer() | {"speaker": 7}, "speaker: must be a string, but is a number"),
    (answer() | {"misc": {"language": {}}}, "language: must be a string, but is empty"),
    (answer() | {"misc": "anna"}, "misc: must be an object, but is a string"),
    (answer() | {"audios": ["a.wav"]}, "audios: belongs to the swift format"),
    (sample(("user", "Say <|AUDIO_OUT|>"), ("assistant", AUDIO)), "messages[0].content: contains <|AUDIO_OUT|>, which"),
    (sample(("user", "Say \ud800"), ("assistant", AUDIO)), "messages[0].content: 'Say \\ud800' is not UTF-8"),
    ({"messages": ["Hi"]}, "messages[0]: must be an object with 'role' and 'content', but is a string"),
    (
        {"messages": [{"role": "user", "content": "Hi", "recipient": "anna"}, *answer()["messages"][1:]]},
        "messages[0].recipient: must be a string in an assistant message, but is 'anna' in a 'user' message",
    ),
]  # fmt: skip


def read(path: Path, options: DataOptions = OPTIONS) -> tuple[list[Sample], list[str]]:
    """Return the good samples, and the faults with their sources."""
    entries = list(read_entries(path, options))
    assert all((entry.sample is None) == bool(entry.faults) for entry in entries)
    samples = [entry.sample for entry in entries if entry.sample is not None]
    return samples, [f"{entry.source}: {fault}" for entry in entries for fault in entry.faults]


@pytest.mark.parametrize("is_array", [False, True], ids=["lines", "array"])
def test_each_fault_with_its_line(tmp_path: Path, is_array: bool) -> None:
    path = tmp_path / "manifest"
    lines = [json.dumps(entry) for entry in (GOOD, *(fault for fault, _ in FAULTS), GOOD)]
    path.write_text(f"[{','.join(line + chr(10) for line in lines)}]" if is_array else "\n".join(lines))
    samples, problems = read(path)
    assert [sample.source for sample in samples] == [f"{path}:1", f"{path}:{len(FAULTS) + 2}"]
    by_line: dict[str, str] = {}
    for problem in problems:
        by_line.setdefault(problem.removeprefix(f"{path}:").split(": ")[0], problem)
    assert list(by_line) == [str(line) for line in range(2, len(FAULTS) + 2)]
    for line, (_, expected) in enumerate(FAULTS, start=2):
        assert by_line[str(line)].startswith(f"{path}:{line}: {expected}")
    json.dumps(problems, ensure_ascii=False).encode()  # every message can be printed


def test_all_faults_of_a_sample_at_once(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    bad = sample(("usr", ""), ("assistant", {"type": "audio", "offset": -1, "duration": 0}), start_index=9, speaker=[])
    path.write_text(json.dumps(bad))
    fields = [problem.split(": ")[1] for problem in read(path)[1]]
    place = "messages[1].content"
    assert fields == [
        "messages[0].role", "messages[0].content", f"{place}.audio_url", f"{place}.offset", f"{place}.duration",
        "start_index", "speaker",
    ]  # fmt: skip


def test_array_entries_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    bad = sample(("user", ""), ("assistant", AUDIO))
    path.write_text("[\n" + json.dumps(GOOD) + ",\n" + json.dumps(bad, indent=1) + ",\n\n" + json.dumps(bad) + "\n]")
    samples, problems = read(path)
    lines = path.read_text().split("\n")
    last = next(i for i, line in enumerate(lines, start=1) if line == json.dumps(bad))
    assert [s.source for s in samples] == [f"{path}:2"]
    assert [problem.split(": ")[0] for problem in problems] == [f"{path}:3", f"{path}:{last}"]


@pytest.mark.parametrize("format_name", ["auto", "chatml"])
@pytest.mark.parametrize("text", ["", "\n\n", "[]", "[ \n ]", "\ufeff"])
def test_empty_file(tmp_path: Path, text: str, format_name: str) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(text)
    assert read(path, DataOptions(format=format_name)) == ([], [f"{path}: contains no samples"])


ONE = json.dumps(GOOD)
INVALID_ARRAYS = [
    ("[" + ONE, "expected ',' or ']', found the end of the file"),
    (f"[{ONE}\n {ONE}]", "expected ',' or ']', found '{'"),
    (f"[{ONE},]", "Expecting value in line 1"),
    (f"[{ONE},\n{ONE[:-9]}", "Unterminated string"),
    (f"[{ONE},\n\n[nul]]", "Expecting value in line 3"),
    (f"[{ONE}]\n[{ONE}]", "more text after the end of the list or object"),
    (f"[{ONE}, {'[' * 100_000}]", "nested too deeply"),
]


@pytest.mark.parametrize(("text", "expected"), INVALID_ARRAYS, ids=[expected for _, expected in INVALID_ARRAYS])
@pytest.mark.parametrize("chunk", [1, 7, jsonio.CHUNK])
def test_invalid_array(tmp_path: Path, text: str, expected: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonio, "CHUNK", chunk)
    path = tmp_path / "manifest.json"
    path.write_text(text)
    samples, problems = read(path, DataOptions())
    assert len(samples) == 1
    assert len(problems) == 1
    assert (
        f"{path}:{text[: text.rfind(ONE[:20]) if 'Unterm' in expected else None].count(chr(10)) + 1}: not JSON: "
        in (problems[0])
    )
    assert expected in problems[0]
    assert problems[0].endswith("; the rest of the file was not read")


def test_one_bad_line_does_not_hide_the_next(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    bad = [b'{"messages": [', ONE.encode().replace(b"Hello", b"Hell\xff"), b"[" * 100_000, ONE.encode() + b","]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\r\n".join([ONE.encode(), *bad, ONE.encode()]))
    samples, problems = read(path, DataOptions())
    assert [s.source for s in samples] == [f"{path}:1", f"{path}:11"]
    for line, problem, expected in zip(
        (3, 5, 7, 9), problems, ("Expecting", "not UTF-8 at", "nested", "Extra"), strict=True
    ):
        assert problem.startswith(f"{path}:{line}: not JSON: ")
        assert expected in problem


def test_bad_bytes_in_an_array_make_one_entry_bad(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(f"[{ONE},\n".encode() + ONE.encode().replace(b"Hello", b"Hell\xff") + f",\n{ONE}]".encode())
    samples, problems = read(path, DataOptions())
    assert [s.source for s in samples] == [f"{path}:1", f"{path}:3"]
    assert problems == [f"{path}:2: not JSON: not UTF-8; save the file as UTF-8"]


def test_line_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonio, "LONGEST", 1 << 20)
    long = json.dumps(sample(("user", "a" * (3 << 20)), ("assistant", AUDIO)))
    path = tmp_path / "manifest.jsonl"
    path.write_text(f"{ONE}\n{long}\n{ONE}\n")
    assert [s.source for s in read(path)[0]] == [f"{path}:1", f"{path}:3"]
    assert read(path)[1] == [f"{path}:2: not JSON: the line is longer than the limit of 1 MiB"]
    path.write_text(f"[{ONE},\n{long}\n]")
    assert [s.source for s in read(path)[0]] == [f"{path}:1"]
    assert "the value is longer than the limit of 1 MiB; the rest of the file was not read" in read(path)[1][0]


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    for options in (OPTIONS, DataOptions()):
        assert read(path, options) == ([], [f"{path}: cannot be read: No such file or directory"])


def test_content_forms_speaker_and_language(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    entry = sample(
        ("system", {"type": "text", "text": "Be brief."}),
        ("user", ["Say ", {"type": "text", "text": "this."}]),
        ("assistant", [{"type": "audio", "audio_url": "sub/a.wav", "offset": 1, "duration": 2.5}]),
        start_index=1,
        speaker=None,
        misc={"speaker": "s1", "language": "en"},
        id="mine",
    )
    other = sample(("user", "Hi."), ("assistant", AUDIO), speaker="s2", language="de", misc={"speaker": "s1"})
    path.write_text(json.dumps(entry) + "\n" + json.dumps(other))
    messages = (
        Message("system", ("Be brief.",)),
        Message("user", ("Say ", "this.")),
        Message("assistant", (AudioClip(tmp_path / "sub/a.wav", 1.0, 2.5),)),
    )
    plain = (Message("user", ("Hi.",)), Message("assistant", (AudioClip(tmp_path / "a.wav"),)))
    expected = [Sample(messages, 1, "s1", f"{path}:1", "en"), Sample(plain, 0, "s2", f"{path}:2", "de")]
    assert read(path) == (expected, [])


@pytest.mark.parametrize("url", [None, "", "placeholder"])
def test_audio_inside_the_manifest(tmp_path: Path, url: str | None) -> None:
    path = tmp_path / "manifest.jsonl"
    encoded = base64.encodebytes(b"RIFF" * 30).decode()  # with line breaks
    path.write_text(json.dumps(answer(audio_url=url, raw_audio=encoded, offset=0.5)))
    (read_sample,), problems = read(path, DataOptions())
    assert problems == []
    assert read_sample.clips == [AudioClip(path, 0.5, None, b"RIFF" * 30)]


def test_audio_url_has_priority_over_raw_audio(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(answer(raw_audio="UklGRg==")))
    assert read(path)[0][0].clips == [AudioClip(tmp_path / "a.wav")]


def test_text_targets_only_if_allowed(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(sample(("user", AUDIO), ("assistant", "A transcript."))))
    assert len(read(path, DataOptions(allow_text_targets=True))[0]) == 1
    assert len(read(path)[1]) == 1


def test_only_spoken_texts_are_normalized(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    turns = [
        ("system", "Be (brief)"), ("user", ["Ha ", "[laugh]", AUDIO, "(well)"]), ("assistant", ["Yes (so)", AUDIO]),
        ("user", "Why (not)"), ("assistant", "Because (so)"), ("user", "()"),
    ]  # fmt: skip
    path.write_text(json.dumps(sample(*turns)) + "\n" + json.dumps(sample(("user", "()"), ("assistant", AUDIO))))
    samples, problems = read(path, DataOptions(normalize_text=True))
    clip = AudioClip(tmp_path / "a.wav")
    assert [message.parts for message in samples[0].messages] == [
        ("Be (brief)",), ("Ha <SE>[Laughter]</SE>", clip, "well."), ("Yes (so)", clip),
        ("Why (not)",), ("Because (so)",), ("()",),
    ]  # fmt: skip
    assert problems == [
        f"{path}:2: messages[0]: has a text that is empty after --normalize_text; change the text or remove the sample"
    ]


def test_reading_twice_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(fault) for fault, _ in FAULTS) + "\n" + ONE)
    assert list(read_entries(path, OPTIONS)) == list(read_entries(path, OPTIONS))


# Any value in any place and any bytes anywhere give entries, never an exception.

VALUES: list[Any] = [
    None, True, 0, -1, 10**400, 1e308, float("nan"), float("-inf"), "", " ", "a\0b", "\ud800", "<|AUDIO|>", "audio",
    "text", "user", "assistant", "scene", [], {}, [[]], {"": {}}, nested(400), {"type": "audio"}, {"samples": []},
    "x" * 500,
]  # fmt: skip
BASES: dict[str, list[Any]] = {
    "chatml": [
        sample(
            ("system", "Be brief."), ("user", ["Hi ", AUDIO]), ("assistant", AUDIO | {"offset": 1, "duration": 2.5})
        ),
        answer(audio_url="", raw_audio="UklGRg==") | {"start_index": 1, "speaker": "s", "misc": {"speaker": "s"}},
        GOOD,
    ],
    "native": [
        sample(
            ("system", [{"type": "text", "text": "Speak."}]),
            ("scene", [{"type": "text", "text": "SPEAKER0: "}, {"type": "audio", "url": "r.wav"}]),
            ("user", [{"type": "text", "text": "Hi."}]),
            ("assistant", [{"type": "audio", "path": "a.wav"}]),
            start_index=2,
        )
    ]
    * 2,
    "swift": [
        sample(("user", "<audio> /translate"), ("assistant", "<audio>Hi."), audios=["a.wav"], system="Speak."),
        sample(("assistant", "<audio>Hi."), audios=["a.wav"]),
    ],
    "metadata": [
        {
            "audio_file": "a.wav",
            "text": "Hi.",
            "scene": "street",
            "ref_speakers": [{"speaker_tag": "[SPEAKER0]", "ref_audio_file": "r.wav", "ref_transcript": "Ho."}],
        },
        {"audio_file": "a.wav", "transcript_file": "none.txt", "ref_audio_file": "r.wav", "ref_transcript": "Ho."},
    ],
}


def places(value: Any, depth: int = 12) -> list[tuple[Any, Any]]:
    """Return every (container, key) in a JSON value, down to a limited depth."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    return found + [place for key in keys if depth for place in places(value[key], depth - 1)]


def change_structure(entries: list[Any], choose: random.Random) -> None:
    container, key = choose.choice(places(entries))
    match choose.randrange(4):
        case 0:
            container[key] = copy.deepcopy(choose.choice(VALUES))
        case 1:
            del container[key]
        case 2 if isinstance(container, dict):
            container[f"{key}s"] = container.pop(key)
        case _:
            container[key] = [container[key], copy.deepcopy(container[key])]


def change_bytes(text: bytes, choose: random.Random) -> bytes:
    begin = choose.randrange(len(text))
    end = min(len(text), begin + choose.choice([0, 1, 1, 5, 200]))
    piece = choose.choice(
        [b"", b"\xff", b"\0", b"\n", b'"', b"[", b"}", b"\\u12", b"\xed\xa0\x80", b"9" * 5000, text[:50]]
    )
    return text[:begin] + piece + text[end:]


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32), is_array=st.booleans(), num_structure=st.integers(0, 4), num_bytes=st.integers(0, 4),
    format_name=st.sampled_from(list(BASES)), is_auto=st.booleans(), normalize=st.booleans(),
    chunk=st.sampled_from([3, 1 << 20]),
)  # fmt: skip
def test_mutated_input(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    is_array: bool,
    num_structure: int,
    num_bytes: int,
    format_name: str,
    is_auto: bool,
    normalize: bool,
    chunk: int,
) -> None:
    choose = random.Random(seed)
    entries: list[Any] = copy.deepcopy(BASES[format_name])
    for _ in range(num_structure):
        if entries:
            change_structure(entries, choose)
    text = json.dumps(entries) if is_array else "\n".join(map(json.dumps, entries))
    raw = text.encode() or b"\n"
    for _ in range(num_bytes):
        raw = change_bytes(raw, choose) or b"\n"
    if format_name == "metadata" and is_array:
        raw = b'{"samples": ' + raw + b"}"
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonio, "CHUNK", chunk)
        options = DataOptions(format="auto" if is_auto else format_name, normalize_text=normalize)
        found = list(read_entries(path, options))
    assert found
    if not num_structure and not num_bytes and not is_auto and (is_array or format_name != "metadata"):
        assert any(entry.sample for entry in found)
    for entry in found:
        assert isinstance(entry, Entry)
        assert (entry.sample is None) == bool(entry.faults)
        "".join((entry.source, *entry.faults)).encode()
        if entry.sample is not None:
            check_types(entry.sample)


def check_types(read_sample: Sample) -> None:
    for message in read_sample.messages:
        assert message.role in ("system", "user", "assistant")
        assert message.parts
        for part in message.parts:
            assert isinstance(part, AudioClip) or part.encode()
    for clip in read_sample.clips:
        assert 0 <= clip.offset_s < float("inf")
        assert clip.duration_s is None or 0 < clip.duration_s < float("inf")
        assert "\0" not in str(clip.path)
    assert 0 <= read_sample.start_index < len(read_sample.messages)
    assert read_sample.has_target_audio
    assert read_sample.speaker is None or read_sample.speaker.encode()


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("dump", [json.dumps, lambda value: json.dumps(value, indent=1, ensure_ascii=False)])
def test_array_read_in_small_pieces(
    tmp_path: Path, chunk: int, dump: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the text is cut, the values are those of the whole text."""
    values = [1234567, -1.5e-7, '\u20ac \U0001f600 \\ " \n', None, True, float("inf"), {"a": [1, {}], "b": ""}, [], 12]
    path = tmp_path / "values.json"
    path.write_text(dump(values), encoding="utf-8")
    monkeypatch.setattr(jsonio, "CHUNK", chunk)
    items = list(jsonio.array_items(path))
    assert [item.value for item in items] == values
    assert [item.fault for item in items] == [None] * len(values)
    text = path.read_text(encoding="utf-8")
    if "\n" in text:
        assert items[-1].line == text.count("\n")
