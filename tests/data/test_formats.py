"""Every format gives the expected samples, is detected from its content, and reports faults with their location."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pyarrow
import pyarrow.parquet
import pytest
from conftest import PROJECT

from higgs_ds.common.errors import InputError
from higgs_ds.data.formats import jsonio, lists
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.data.formats.recognition import recognize
from higgs_ds.data.kept_indexes import identity_of
from higgs_ds.model.sample import AudioClip, Entry, Message, Sample
from higgs_ds.model.v2.prompt import AUDIO_IN, AUDIO_OUT, render
from higgs_ds.options.fields import FORMATS
from higgs_ds.options.train import DataOptions

QUIET = "Audio is recorded from a quiet room."
WORDS = "Good morning."


def system(scene: str = QUIET, instruction: str = "Generate audio following instruction.") -> Message:
    return Message("system", (f"{instruction}\n\n<|scene_desc_start|>\n{scene}\n<|scene_desc_end|>",))


def user(*parts: str | AudioClip) -> Message:
    return Message("user", parts)


def spoken(*clips: Path | AudioClip) -> Message:
    return Message("assistant", tuple(AudioClip(clip) if isinstance(clip, Path) else clip for clip in clips))


def plain(
    source: str,
    clip: Path | AudioClip,
    words: str = WORDS,
    speaker: str | None = None,
    language: str | None = None,
    text_files: tuple[Path, ...] = (),
) -> Sample:
    """The sample of a recording without a reference."""
    return Sample((system(), user(words), spoken(clip)), 1, speaker, source, language, text_files)


def read(path: Path, **options: Any) -> list[Entry]:
    entries = list(read_entries(path, DataOptions(**options)))
    assert entries == list(read_entries(path, DataOptions(**options)))
    return entries


def samples(path: Path, **options: Any) -> list[Sample]:
    entries = read(path, **options)
    assert [entry.faults for entry in entries if entry.faults] == []
    assert all(entry.sample is not None and entry.sample.source == entry.source for entry in entries)
    return [entry.sample for entry in entries if entry.sample is not None]


def faults(path: Path, **options: Any) -> list[str]:
    return [f"{entry.source}: {fault}" for entry in read(path, **options) for fault in entry.faults]


def write_lines(path: Path, *values: Any) -> Path:
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path


def expect_faults(path: Path, expected: list[str], **options: Any) -> None:
    found = faults(path, **options)
    assert len(found) == len(expected), found
    for fault, beginning in zip(found, expected, strict=True):
        assert fault.startswith(f"{path}{beginning}"), found


def turn(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


# Native (d)

NATIVE = [
    {
        "messages": [
            turn("system", words("Generate audio following instruction.")),
            turn("scene", words(QUIET), words("\n\nSPEAKER0: "), {"type": "audio", "url": "r.wav"}),
            turn("user", words("Good "), words("morning.")),
            turn("assistant", {"type": "audio", "path": "sub/a.wav"}),
        ],
        "start_index": 2,
        "speaker": "anna",
        "misc": {"language": "en"},
    },
    {
        "messages": [
            turn("scene", words("A street.")),
            {"role": "user", "content": WORDS},
            turn("assistant", {"type": "audio", "audio": "a.wav"}),
            turn("assistant", {"type": "audio", "url": "b.wav"}),
        ]
    },
    {
        "messages": [
            turn("user", words(WORDS), {"type": "audio", "url": "r.wav"}),
            turn("assistant", {"type": "audio", "url": "a.wav"}),
        ]
    },
]


@pytest.mark.parametrize("is_array", [False, True])
def test_native(tmp_path: Path, is_array: bool) -> None:
    path = write_lines(tmp_path / "native.json", *([NATIVE] if is_array else NATIVE))
    sources = [f"{path}:{1 if is_array else line}" for line in (1, 2, 3)]
    a, b, r = (tmp_path / name for name in ("a.wav", "b.wav", "r.wav"))
    head = f"Generate audio following instruction.\n\n<|scene_desc_start|>\n{QUIET}\n\nSPEAKER0: "
    scene = Message("system", (head, AudioClip(r), "\n<|scene_desc_end|>"))
    street = Message("system", ("<|scene_desc_start|>\nA street.\n<|scene_desc_end|>",))
    assert samples(path) == [
        Sample((scene, user(WORDS), spoken(tmp_path / "sub/a.wav")), 1, "anna", sources[0], "en"),
        Sample((street, user(WORDS), spoken(a), spoken(b)), 0, None, sources[1]),
        Sample((user(WORDS, AudioClip(r)), spoken(a)), 0, None, sources[2]),
    ]


@pytest.mark.parametrize("value", NATIVE, ids=["scene with audio", "scene first", "audio in a user turn"])
def test_native_is_what_the_chat_template_renders(tmp_path: Path, value: dict[str, Any]) -> None:
    """The prompts that this project renders equal those of the chat template that inference uses."""
    template = (PROJECT / "higgs_ds" / "bases" / "assets" / "chat_template.jinja").read_text(encoding="utf-8")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(template).render(messages=value["messages"], add_generation_prompt=False)
    (sample,) = samples(write_lines(tmp_path / "native.jsonl", value), format="native")
    text = "".join(segment.text for segment in render(sample.messages, sample.start_index))
    assert text.replace(AUDIO_IN, AUDIO_OUT) == rendered
    # The text of the template is tokenized as a whole, so no two adjacent texts may remain.
    for message in sample.messages:
        assert not any(isinstance(a, str) and isinstance(b, str) for a, b in zip(message.parts, message.parts[1:]))  # noqa: B905


@pytest.mark.parametrize(("index", "expected"), [(None, 0), (0, 0), (1, 1), (2, 1), (3, 2)])
def test_native_start_index_counts_the_scene(tmp_path: Path, index: int | None, expected: int) -> None:
    path = write_lines(tmp_path / "native.jsonl", NATIVE[0] | {"start_index": index})
    assert samples(path)[0].start_index == expected


def test_native_faults(tmp_path: Path) -> None:
    ask, answer = turn("user", words(WORDS)), turn("assistant", {"type": "audio", "url": "a.wav"})
    scene = turn("scene", words(QUIET))
    path = write_lines(
        tmp_path / "native.jsonl",
        {"messages": [ask, scene, answer]},
        {"messages": [turn("system", "Speak."), scene, scene, ask, answer]},
        {"messages": [ask, turn("assistant", {"type": "audio", "url": "a.wav", "path": "b.wav"})]},
        {"messages": [ask, turn("assistant", {"type": "audio"})]},
        {"messages": [ask, turn("assistant", {"type": "audio", "audio": [0.1, 0.2]})]},
        {"messages": [ask, turn("assistant", {"type": "audio", "audio_url": "a.wav"})]},
        {"messages": [turn("scene", words("<|scene_desc_end|>")), ask, answer]},
        {"messages": [ask, answer | {"recipient": "anna"}]},
        "{",
    )
    expected = [
        ":1: messages[1].role: a scene must come first or directly after a system message",
        ":2: messages[2].role: a scene must come first or directly after a system message",
        ":3: messages[1].content[0]: must give an audio file in exactly one of url, path, audio, but has url, path",
        ":4: messages[1].content[0]: must give an audio file in exactly one of url, path, audio, but has none",
        ":5: messages[1].content[0].audio: must be the path of an audio file, but is [0.1, 0.2]",
        (
            ":6: messages[1].content[0]: must give an audio file in exactly one of url, path, audio, but has "
            "audio_url, which belongs to the chatml format"
        ),
        ":7: messages[0].content[0].text: contains <|scene_desc_end|>",
        ":8: messages: the native format has no recipient",
        ":9: not JSON: ",
    ]
    expect_faults(path, expected, format="native")


# ms-swift (e)


def swift(*messages: tuple[str, str], audios: Any = ("/x.wav",), **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in messages], "audios": audios, **more}


def test_swift(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "swift.jsonl",
        swift(("assistant", f"<audio>{WORDS}")),
        swift(("user", "<audio> /translate"), ("assistant", f"<audio>{WORDS}"), audios=["a.wav"]),
        swift(("user", f"Say: good\nMorning. {WORDS}"), ("assistant", f"<audio>{WORDS}"), system="Be brief."),
        swift(("user", "Voice: <audio> Go."), ("assistant", "<audio>"), audios=["r.wav", "a.wav"]),
        swift(("user", "Like <audio>."), ("assistant", f"<audio>{WORDS}"), audios=["r.wav", "a.wav"], system="S"),
        swift(("system", "S"), ("user", "Hi"), ("assistant", "<audio>One. <audio> Two."), audios=["a.wav", "b.wav"]),
        swift(("user", "Hi."), ("assistant", "<audio>Hi."), ("assistant", "<audio>Ho."), audios=["a.wav", "b.wav"]),
        swift(("user", WORDS), ("assistant", "<audio>"), audios=None, audio="a.wav", speaker="anna", language="de"),
    )
    a, b, r, x = (tmp_path / name for name in ("a.wav", "b.wav", "r.wav", "/x.wav"))
    brief, short = Message("system", ("Be brief.",)), Message("system", ("S",))
    conversations = [
        (system(), user(WORDS), spoken(x)),
        (system(), user(WORDS), spoken(a)),
        (brief, user(f"Say: good\nMorning. {WORDS}"), spoken(x)),
        (user("Voice: ", AudioClip(r), " Go."), spoken(a)),
        (short, user(AudioClip(r), WORDS), spoken(a)),
        (short, user("One. Two."), spoken(a, b)),
        (user("Hi."), spoken(a), user("Ho."), spoken(b)),
        (user(WORDS), spoken(a)),
    ]
    read_samples = samples(path)
    assert [sample.messages for sample in read_samples] == conversations
    assert read_samples == [
        Sample(messages, 0, "anna" if line == 8 else None, f"{path}:{line}", "de" if line == 8 else None)
        for line, messages in enumerate(conversations, start=1)
    ]


def test_swift_text_targets(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "swift.jsonl", swift(("user", "<audio> What is said?"), ("assistant", "Hello.")))
    expect_faults(path, [":1: messages: no target audio"])
    messages = (user(AudioClip(Path("/x.wav")), " What is said?"), Message("assistant", ("Hello.",)))
    assert samples(path, allow_text_targets=True) == [Sample(messages, 0, None, f"{path}:1")]


def test_swift_faults(tmp_path: Path) -> None:
    good = (("user", "Hi."), ("assistant", "<audio>"))
    path = write_lines(
        tmp_path / "swift.jsonl",
        swift(*good, audios=["a.wav", "b.wav"]),
        swift(*good, audios=[]),
        swift(("user", "<audio> /translate"), ("assistant", "<audio>"), audios=["a.wav"]),
        swift(("user", "<audio> Go."), ("user", "Hi."), ("assistant", "<audio>Hi."), audios=["a.wav"]),
        swift(*good, audios=[7]),
        swift(*good, audios={"a": 1}),
        swift(*good, audio="a.wav"),
        swift(("system", "S"), *good, system="T"),
        swift(*good, start_index=1),
        swift(("assistant", "<audio>")),
        swift(("user", ""), ("tool", "<audio>Hi."), audios=["s3://b/a.wav"]),
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "<audio>", "loss": False}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}], "audios": []},
    )
    expected = [
        ":1: audios: has 2 files for 1 <audio> tags; give one file for each tag",
        ":2: audios: has 0 files for 1 <audio> tags",
        ":3: audios: has 1 files for 2 <audio> tags",
        ":4: audios: has 1 files for 2 <audio> tags",
        ":5: audios[0]: must be the path of a file, but is 7",
        ":6: audios: must be a list of audio files, but is an object",
        ":7: audio: is given in addition to 'audios'; remove one of them",
        ":8: system: is given in addition to a system message in 'messages'",
        ":9: start_index: is not part of the swift format",
        ":10: messages[0]: is speech without its transcript",
        ":11: messages[0].content: is empty or blank",
        ":11: messages[1].role: 'tool' is not a role; allowed: system, user, assistant",
        ":11: audios[0]: 's3://b/a.wav' is a URL, not a local file",
        ":12: messages[1].loss: must not be false",
        ":13: messages[0].content: must be a string, but is a list",
    ]
    expect_faults(path, expected)


# metadata.json (a)

TWO = "[SPEAKER0] Hello. [SPEAKER1] Hi."


def write_metadata(folder: Path, *entries: Any, indent: int | None = 1) -> Path:
    (folder / "metadata.json").write_text(
        json.dumps({"dataset_info": {"n": [1, "]"]}, "samples": entries}, indent=indent)
    )
    return folder


METADATA = [
    {
        "id": "s_0", "audio_file": "s_0.wav", "transcript_file": "s_0.txt", "duration": 3.86, "speaker_id": "s",
        "speaker_name": "S", "scene": "phone_call", "emotion": "neutral", "language": "zh", "gender": "unknown",
        "quality_score": 1.0, "original_audio_path": "x.wav", "user_instruction": "<audio> /translate",
        "task_type": "audio_generation",
    },
    {"audio_file": "b.wav", "text": " Inline. ", "speaker_id": 7, "ref_audio_file": "r.wav", "ref_transcript": "Ref."},
    {
        "audio_file": "c.wav", "transcript": TWO, "task_type": "multi_speaker_voice_cloning",
        "ref_speakers": [
            {"speaker_tag": "[SPEAKER0]", "speaker_id": "s", "ref_audio_file": "r0.wav", "ref_transcript": "Zero."},
            {"speaker_tag": "[SPEAKER1]", "ref_audio_file": "r1.wav", "ref_transcript": "One.", "gender": "Female"},
        ],
    },
    {"audio_file": "d.wav", "text": TWO, "ref_speakers": [{"gender": "male"}, {"description": "old"}]},
    {"audio_file": "e.wav", "text": "<audio>Good <audio>morning."},
]  # fmt: skip
SPEAKERS = (
    "You are an AI assistant designed to convert text into speech.\nIf the user's message includes a [SPEAKER*] tag, "
    "do not read out the tag and generate speech for the following text, using the specified voice.\nIf no speaker tag "
    "is present, select a suitable voice on your own."
)


@pytest.mark.parametrize("reference", ["context", "system", "none"])
@pytest.mark.parametrize("indent", [None, 1])
def test_metadata(tmp_path: Path, reference: str, indent: int | None) -> None:
    folder = write_metadata(tmp_path, *METADATA, indent=indent)
    (folder / "s_0.txt").write_text("\ufeff Good morning. \n", encoding="utf-8")
    a, b, c, d, e, r, r0, r1 = (folder / f"{name}.wav" for name in ("s_0", "b", "c", "d", "e", "r", "r0", "r1"))
    first = (system("Audio is recorded from phone call."), user(WORDS), spoken(a))
    single, double = (user("Inline."), spoken(b)), (user(TWO), spoken(c))
    described = system(f"{QUIET}\n\nSPEAKER0: masculine\nSPEAKER1: old", SPEAKERS)
    described_only = system(f"{QUIET}\n\nSPEAKER1: feminine", SPEAKERS)  # without the reference clips
    head = f"Generate audio following instruction.\n\n<|scene_desc_start|>\n{QUIET}\n\nSPEAKER0: "
    tail = "\n<|scene_desc_end|>"
    second, third = {
        "context": (
            (system(), user("Ref."), spoken(r), *single),
            (system(), user("[SPEAKER0] Zero."), spoken(r0), user("[SPEAKER1] One."), spoken(r1), *double),
        ),
        "system": (
            (Message("system", (head, AudioClip(r), tail)), *single),
            (Message("system", (head, AudioClip(r0), "\nSPEAKER1: ", AudioClip(r1), tail)), *double),
        ),
        "none": ((system(), *single), (described_only, *double)),
    }[reference]
    lines = (folder / "metadata.json").read_text().split("\n")
    starts = [i for i, line in enumerate(lines, start=1) if line == "  {"] if indent else [1] * 5
    sources = [f"{folder / 'metadata.json'}:{line}" for line in starts]
    expected = [
        Sample(first, 1, "s", sources[0], "zh", (folder / "s_0.txt",)),
        Sample(second, len(second) - 2, "7", sources[1]),
        Sample(third, len(third) - 2, None, sources[2], plain_system=None if reference == "none" else described_only),
        Sample((described, user(TWO), spoken(d)), 1, None, sources[3]),
        Sample((system(), user("Good  morning."), spoken(e)), 1, None, sources[4]),
    ]
    assert samples(folder, reference=reference) == expected
    assert samples(folder / "metadata.json", reference=reference) == expected
    assert samples(folder, format="metadata", reference=reference) == expected


def test_metadata_as_a_bare_list(tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps([{"audio_file": "a.wav", "text": WORDS}] * 2))
    assert samples(tmp_path) == [plain(f"{path}:1", tmp_path / "a.wav")] * 2


def test_metadata_normalized(tmp_path: Path) -> None:
    entry = {"audio_file": "a.wav", "text": "Ha [laugh]", "scene": "a (b)", "ref_audio_file": "r.wav"}
    folder = write_metadata(tmp_path, entry | {"ref_transcript": "Good (old) days"})
    (sample,) = samples(folder, normalize_text=True)
    assert [message.parts[0] for message in sample.messages if message.role != "assistant"] == [
        *system("Audio is recorded from a (b).").parts,
        "Good old days.",
        "Ha <SE>[Laughter]</SE>",
    ]


def test_metadata_faults(tmp_path: Path) -> None:
    good, man = {"audio_file": "a.wav", "text": WORDS}, {"gender": "male"}
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "long.txt").write_text("a" * (1 << 21))
    values: list[tuple[Any, list[str]]] = [
        (7, ["sample: must be an object with 'audio_file', but is a number"]),
        ({"text": WORDS}, ["audio_file: must be the path of a file, but is None"]),
        ({"audio_file": "a.wav"}, ["transcript_file: is missing, and so are 'transcript' and 'text'; give"]),
        (good | {"transcript_file": "no.txt"}, ["transcript_file: no.txt cannot be read: No such file or directory"]),
        (good | {"transcript_file": "latin.txt"}, ["transcript_file: 'caf\\udce9' is not UTF-8"]),
        (good | {"transcript_file": "blank.txt"}, ["transcript_file: is empty or blank"]),
        (good | {"transcript_file": "long.txt"}, ["transcript_file: long.txt has more than"]),
        (good | {"transcript_file": "a\0"}, ["transcript_file: 'a\\x00' is not a valid file name"]),
        (good | {"text": "<audio>"}, ["transcript: is empty or blank"]),
        (good | {"ref_audio_file": "r.wav"}, ["ref_transcript: is missing: --reference context needs the transcript"]),
        (good | {"ref_audio_fil": "r.wav"}, ["ref_audio_fil: is not a known key; did you mean 'ref_audio_file'?"]),
        (good | {"ref_speakers": {"a": 1}}, ["ref_speakers: must be a list of speakers, but is an object"]),
        (
            good | {"ref_speakers": ["r.wav"]},
            ["ref_speakers[0]: must be an object with 'ref_audio_file', but is a string"],
        ),
        (good | {"ref_speakers": [{"gender": "unknown"}]}, ["ref_speakers[0].ref_audio_file: is missing, and so are"]),
        (
            good | {"ref_speakers": [man | {"speaker_tag": "anna"}, man | {"speaker_tag": "SPEAKER0"}]},
            [
                "ref_speakers[0].speaker_tag: must have the form [SPEAKER0], but is 'anna'",
                "ref_speakers: has a speaker tag more than once: SPEAKER0, SPEAKER0; give each",
            ],
        ),
        (
            {"audio_file": [], "text": "", "speaker_id": {}, "scene": "<|scene_desc_end|>"},
            [
                "audio_file: must be the path of a file, but is []", "text: is empty or blank",
                "speaker_id: must be a string", "scene: contains <|scene_desc",
            ],
        ),
    ]  # fmt: skip
    path = tmp_path / "metadata.json"
    path.write_text('{"samples": [\n' + ",\n".join(json.dumps(value) for value, _ in values) + ",\n{]}")
    expected = [f":{line}: {fault}" for line, (_, found) in enumerate(values, start=2) for fault in found]
    expect_faults(path, [*expected, f":{len(values) + 2}: not JSON: Expecting property name"])


# Pairs (b)


def test_paired(tmp_path: Path) -> None:
    names = ["a10.wav", "a2.WAV", "a1.b.mp3", "z.flac", "sub10/x.ogg", "sub9/x.wav", "sub9/deep/y.wav"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.with_suffix(".txt").write_text(f"\n{name}. \n")
    (tmp_path / "._a2.wav").touch()
    (tmp_path / "notes.md").touch()
    order = ["a1.b.mp3", "a2.WAV", "a10.wav", "z.flac", "sub9/x.wav", "sub9/deep/y.wav", "sub10/x.ogg"]
    assert samples(tmp_path) == [
        plain(str(path), path, f"{name}.", text_files=(path.with_suffix(".txt"),))
        for name, path in ((name, tmp_path / name) for name in order)
    ]
    assert samples(tmp_path, format="paired") == samples(tmp_path)


def test_paired_faults(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav", "c.mp3", "c.wav", "d.wav"):
        (tmp_path / name).touch()
    for name in ("b", "c", "d", "e"):
        (tmp_path / f"{name}.txt").write_bytes(b"\xff" if name == "b" else b"" if name == "d" else b"Hi.")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    expected = [
        "/a.wav: transcript: there is no .txt file of the same name",
        "/b.wav: transcript: '\\udcff' is not UTF-8",
        "/c.mp3: transcript: c.mp3, c.txt, c.wav share a name",
        "/c.wav: transcript: c.mp3, c.txt, c.wav share a name",
        "/d.wav: transcript: is empty or blank",
        "/e.txt: audio: there is no audio file of the same name",
        "/sub/up: folder: is a link to a folder that contains it",
    ]
    expect_faults(tmp_path, expected)


# Lists (f)

LISTS = {
    "two": (["clips/a.wav|Good morning.", "", "b.wav|Hi."], ["a", "b"], [None, None]),
    "vits": (["a.wav|0|Good morning.", "b.wav|12|Hi."], None, ["0", "12"]),
    "vits names": (["a.wav|anna|Good morning.", "b.wav|ben|Hi there."], None, ["anna", "ben"]),
    "speaker last": (["a.wav|Good morning.|p225", "b.wav|Hi.|p226"], None, ["p225", "p226"]),
    "few speakers": ([f"{i}.wav|Anna Lee|早上好{'好' * i}" for i in range(4)], None, ["Anna Lee"] * 4),
    "normalized": (["a.wav|It is 9.|It is nine.", "b.wav|Hi.|Hi."], None, [None, None]),
    "bert": (["a.wav|anna|EN|Good morning.", "b.wav|ben|zh-CN|早上好"], None, ["anna", "ben"]),
}


@pytest.mark.parametrize("name", LISTS)
def test_list(tmp_path: Path, name: str) -> None:
    lines, _, speakers = LISTS[name]
    path = write_lines(tmp_path / "train.txt", *lines)
    rows = [(number, line.split("|")) for number, line in enumerate(lines, start=1) if line]
    place = {"speaker last": 1, "two": 1}.get(name, -1)
    languages = [row[2] if name == "bert" else None for _, row in rows]
    assert samples(path) == [
        plain(f"{path}:{number}", tmp_path / row[0], row[place], speaker, language)
        for (number, row), speaker, language in zip(rows, speakers, languages, strict=True)
    ]
    assert recognize(path) == "list"


@pytest.mark.parametrize("wavs", [False, True])
def test_ljspeech(tmp_path: Path, wavs: bool) -> None:
    path = write_lines(tmp_path / "metadata.csv", 'LJ001-0001|Dr. "A" has 2.|Doctor "A" has two.', "LJ.2|One,|One,")
    if wavs:
        (tmp_path / "wavs").mkdir()
    clips = [tmp_path / "wavs" / f"{name}.wav" if wavs else tmp_path / f"{name}.wav" for name in ("LJ001-0001", "LJ.2")]
    expected = [plain(f"{path}:1", clips[0], 'Doctor "A" has two.'), plain(f"{path}:2", clips[1], "One,")]
    assert samples(path) == expected
    assert samples(tmp_path) == expected


def test_list_faults(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"a.wav|Good morning.\nb.wav|Hi.|anna\nc.wav|\nd.wav|caf\xe9\n|Hi.\nHi\n")
    expected = [
        ":2: line: has 3 fields, but the first lines of the file have 2 (path|text)",
        ":3: text: is empty or blank",
        ":4: line: not UTF-8 at byte 10 of the line",
        ":5: path: must be the path of a file, but is ''",
        ":6: line: has 1 fields",
    ]
    expect_faults(path, expected)


@pytest.mark.parametrize(
    "lines", [["a.wav|yes|anna", "b.wav|no|ben"], ["a.wav|1|2"], ["a.wav|b|c d|e"], ["a.wav|b|c|d|e"], ["a b|c d|e f"]]
)
def test_list_with_undetectable_layout(tmp_path: Path, lines: list[str]) -> None:
    path = write_lines(tmp_path / "list.txt", *lines)
    expect_faults(path, [f": fields: cannot detect what the {lines[0].count('|') + 1} fields between '|' mean; make"])


def test_a_stray_line_does_not_change_the_layout() -> None:
    rows = [[f"{i}.wav", f"Some words, {i}.", "anna"] for i in range(20)]
    assert lists.layout_of([*rows, ["x.wav", "Hello.", "Anna Lee"]]) == ("path", "text", "speaker")
    assert lists.layout_of([*rows, ["x.wav", "anna"]]) == ("path", "text", "speaker")


# CSV (f)

CSV = [
    "wav_filename,speaker,duration,transcript\na.wav,anna,1.5,Good morning.\n\n"
    "b.wav,,2,\"Say \"\"hi\"\",\nthen go.\"\n",
    "Path\tClient_ID\tSentence\tlocale\na.wav\tanna\tGood morning.\t\nb.wav\t\t\"Hi\", he said.\tde\n",
    "audio_file|text|speaker_name\na.wav|Good morning.|anna\nb.wav|\"Hi\", he said.|\n",
    "\ufeff\"file_name\";\"transcription\";\"speaker\"\r\na.wav;Good morning.;anna\r\nb.wav;\"One; two.\";\r\n",
]  # fmt: skip
CSV_WORDS = ['Say "hi",\nthen go.', '"Hi", he said.', '"Hi", he said.', "One; two."]


@pytest.mark.parametrize("index", range(len(CSV)), ids=["csv", "tsv", "bars", "semicolons"])
def test_csv(tmp_path: Path, index: int) -> None:
    path = tmp_path / "metadata.csv"
    path.write_text(CSV[index], encoding="utf-8", newline="")
    second = plain(
        f"{path}:{4 if index == 0 else 3}", tmp_path / "b.wav", CSV_WORDS[index], None, "de" if index == 1 else None
    )
    assert samples(path) == [plain(f"{path}:2", tmp_path / "a.wav", WORDS, "anna"), second]
    assert samples(tmp_path) == samples(path, format="csv") == samples(path)
    assert recognize(tmp_path) == "csv"


def test_csv_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'audio,text,speaker\na.wav,Hi.\nb.wav,"Hi" you,x\n,,\nc.wav,caf\xe9,x\nd.wav,,x\ne.wav,Hi.,x\n"f.wav,Hi.,x\n'
    )
    expected = [
        ":2: row: has 2 fields, but the header has 3",
        ":3: row: ',' expected after '\"'",
        ":5: row: not UTF-8",
        ":6: text: is empty or blank",
        ":8: row: unexpected end of data",
    ]
    expect_faults(path, expected)
    assert [entry.source for entry in read(path) if entry.sample] == [f"{path}:7"]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("a,b", ":1: header: no audio column (accepted names: audio, wav_filename"),
        ("audio,b", ":1: header: no text column (accepted names: transcript, "),
        ("audio,text,text", ":1: header: has column 'text' more than once"),
        ('audio,"te"xt', ":1: row: ',' expected"),
    ],
)
def test_csv_header(tmp_path: Path, header: str, expected: str) -> None:
    path = write_lines(tmp_path / "a.csv", header, "a.wav,Hi.")
    expect_faults(path, [expected], format="csv")


# Tables (f)

ROWS: dict[str, list[Any]] = {
    "audio": [{"bytes": b"RIFF", "path": "a.wav"}, {"bytes": None, "path": "sub/b.wav"}],
    "text": [WORDS, "Hi."],
    "speaker_id": [7, None],
    "language": ["en", None],
    "other": [1.5, 2.5],
}


def write_parquet(path: Path, rows: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return path


def expected_rows(file: Path, num: int = 1) -> list[Sample]:
    rows = [
        plain("", AudioClip(file, data=b"RIFF"), WORDS, "7", "en"),
        plain("", file.parent / "sub/b.wav", "Hi."),
    ] * num
    return [Sample(r.messages, 1, r.speaker, f"{file}:row {i}", r.language) for i, r in enumerate(rows, start=1)]


def test_parquet(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "data.parquet", {name: column * 20 for name, column in ROWS.items()})
    assert samples(file) == samples(tmp_path) == expected_rows(file, 20)
    assert recognize(file) == recognize(tmp_path) == "table"


def test_parquet_with_paths_and_with_bare_bytes(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"file_name": ["a.wav"], "sentence": ["Hi."]})
    assert samples(file) == [plain(f"{file}:row 1", tmp_path / "a.wav", "Hi.")]
    file = write_parquet(tmp_path / "b.parquet", {"audio": [b"RIFF"], "path": ["x"], "sentence": ["Hi."]})
    assert samples(file) == [plain(f"{file}:row 1", AudioClip(file, data=b"RIFF"), "Hi.")]


def test_folder_of_parquet_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    files = [tmp_path / "data" / f"train-0000{i}-of-00002.parquet" for i in (0, 1)]
    for file in reversed(files):
        write_parquet(file, ROWS)
    assert samples(tmp_path) == expected_rows(files[0]) + expected_rows(files[1])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS)
    expect_faults(
        tmp_path, [": folder: contains files of several splits (test, train); give a file or a folder of one s"]
    )
    assert samples(files[0]) == expected_rows(files[0])


def test_parquet_with_chatml_rows(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": WORDS, "audio_url": None, "raw_audio": None}]},
        {"role": "assistant", "content": [{"type": "audio", "text": None, "audio_url": None, "raw_audio": b"RIFF"}]},
    ]
    rows = {"messages": [messages, messages], "speaker": ["anna", None], "start_index": [1, 5], "id": [1, 2]}
    file = write_parquet(tmp_path / "chat.parquet", rows)
    good, bad = read(file)
    assert good.sample == Sample((user(WORDS), spoken(AudioClip(file, data=b"RIFF"))), 1, "anna", f"{file}:row 1")
    assert bad.source == f"{file}:row 2"
    assert bad.faults[0] == "start_index: must be the index of a message, from 0 to 1, but is 5"


def saved_dataset(times: int = 1) -> Any:
    """A dataset with the bytes of its audio inside, built by the `datasets` library."""
    import datasets

    rows = ROWS | {"audio": [{"bytes": b"RIFF", "path": "a.wav"}, {"bytes": b"fLaC", "path": "b.flac"}]}
    data = datasets.Dataset.from_dict({name: column * times for name, column in rows.items()})
    return data.cast_column("audio", datasets.Audio(decode=False))


def expected_saved(file: Path, times: int = 1) -> list[Sample]:
    clips = [AudioClip(file, data=data) for data in (b"RIFF", b"fLaC")] * times
    return [
        replace(sample, messages=(*sample.messages[:-1], spoken(clip)))
        for sample, clip in zip(expected_rows(file, times), clips, strict=True)
    ]


def test_saved_dataset(tmp_path: Path) -> None:
    saved_dataset(6).save_to_disk(tmp_path / "saved", num_shards=2)
    files = sorted((tmp_path / "saved").glob("*.arrow"))
    assert len(files) == 2
    assert samples(tmp_path / "saved") == expected_saved(files[0], 3) + expected_saved(files[1], 3)
    assert recognize(tmp_path / "saved") == "table"


def test_saved_dataset_of_chosen_rows(tmp_path: Path) -> None:
    saved_dataset().select([1, 0]).save_to_disk(tmp_path / "saved")
    assert [sample.speaker for sample in samples(tmp_path / "saved")] == [None, "7"]


def test_saved_splits(tmp_path: Path) -> None:
    import datasets

    data = saved_dataset()
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "one")
    assert samples(tmp_path / "one") == expected_saved(next((tmp_path / "one" / "train").glob("*.arrow")))
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    expect_faults(
        tmp_path / "two", [": folder: must contain one split of a dataset, but contains test, train; give the folder"]
    )
    assert len(samples(tmp_path / "two" / "test")) == 2


def test_parquet_faults(tmp_path: Path) -> None:
    clips = [{"bytes": None, "path": None}, {"bytes": b"", "path": ""}, None, {"bytes": b"R", "path": "a"}]
    file = write_parquet(tmp_path / "a.parquet", {"audio": clips, "text": [WORDS, None, "", "<|AUDIO|>"]})
    expected = [
        ":row 1: audio.path: must be the path of a file, but is None",
        ":row 2: audio.path: must be the path of a file, but is ''",
        ":row 2: text: must be a string, but is missing",
        ":row 3: audio: must be a path, an audio file's bytes, or an object with 'bytes' and 'path', but is missing",
        ":row 3: text: is empty or blank",
        ":row 4: text: contains <|AUDIO|>",
    ]
    expect_faults(file, expected)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"a": [1]}, ": columns: no audio column (accepted names: audio, "),
        ({"audio": ["a.wav"]}, ": columns: no text column (accepted names: transcript, "),
        ({"audio": [[0.1]], "text": ["Hi."]}, ":row 1: audio: must be a path, an audio file's bytes, or an object wi"),
        ({"audio": [{"array": [0.1]}], "text": ["Hi."]}, ":row 1: audio: must be a path, an audio file's bytes, or an"),
        (
            {"audio": pyarrow.array([], pyarrow.string()), "text": pyarrow.array([], pyarrow.string())},
            ": contains no samples",
        ),
    ],
)
def test_parquet_columns(tmp_path: Path, rows: dict[str, Any], expected: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", rows)
    assert [fault[:60] for fault in faults(file) if fault.startswith(f"{file}{expected}"[: len(fault)])]


@pytest.mark.parametrize("cut", [4, 5, 100, 0.3, 0.6, 0.99])
def test_truncated_tables(tmp_path: Path, cut: float) -> None:
    """A file cut off anywhere is reported as one fault, and so is an empty file."""
    saved_dataset(40).save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    parquet = write_parquet(tmp_path / "a.parquet", ROWS)
    for path in (parquet, arrow):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(cut if cut > 1 else cut * len(whole))])
        found = faults(path, format="table")
        assert len(found) == 1
        assert ": table: cannot be read after row " in found[0]
        path.write_bytes(b"")
        assert len(faults(path, format="table")) == 1


def test_column_name_that_is_not_utf8(tmp_path: Path) -> None:
    saved_dataset().save_to_disk(tmp_path / "saved")
    path = next((tmp_path / "saved").glob("*.arrow"))
    path.write_bytes(path.read_bytes().replace(b"speaker_id", b"speaker_\xffd"))
    expect_faults(path, [": table: cannot be read after row 0: 'utf-8' codec can't decode"])


def test_tables_with_wrong_bytes(tmp_path: Path) -> None:
    """A flipped bit anywhere gives samples or printable faults, never an exception."""
    saved_dataset(40).save_to_disk(tmp_path / "saved")
    num_bad = 0
    for path in (next((tmp_path / "saved").glob("*.arrow")), write_parquet(tmp_path / "a.parquet", ROWS)):
        whole = path.read_bytes()
        for seed in range(100):
            choose, damaged = random.Random(seed), bytearray(whole)
            damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
            path.write_bytes(damaged)
            entries = list(read_entries(path, DataOptions(format="table")))
            assert all((entry.sample is None) == bool(entry.faults) for entry in entries)
            "".join(fault for entry in entries for fault in entry.faults).encode()
            num_bad += any(entry.faults for entry in entries)
    assert num_bad > 50


def test_damaged_state(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"_data_files": 7}', '{"_data_files": [{"filename": "../x.arrow"}]}'):
        (tmp_path / "state.json").write_text(text)
        assert len(faults(tmp_path)) == 1
        assert faults(tmp_path)[0].startswith(f"{tmp_path}: state.json: ")


# Links in a folder

OUTSIDE = "folder: is a link to {neighbour}, outside of the given folder; replace the link by a copy"
CONTAINS = "folder: is a link to a folder that contains it; remove the link"
BROKEN = "link: leads to {target}, which cannot be found; correct or remove the link"
# A link in `folder_of_clips`, what it leads to, and the fault that names it: no fault if its clips are read anyway.
LINKS = {
    "upwards": ("self", "..", CONTAINS),
    "to the given folder": ("a/cycle", "..", CONTAINS),
    "to a folder around it": ("b/deep/up", "..", CONTAINS),
    "to its own folder": ("b/here", ".", CONTAINS),
    "up and down again": ("other", "../neighbour", OUTSIDE),
    "outside": ("b/other", "{neighbour}", OUTSIDE),
    "chain that leaves": ("first", ".hidden/leaves", OUTSIDE),
    "named like a clip": ("clip.wav", "../neighbour", OUTSIDE),
    "named like a table": ("clip.parquet", "../neighbour", OUTSIDE),
    "broken": ("gone", "../none", BROKEN),
    "loop": ("loop", "loop", BROKEN),
    "to a sibling": ("b/again", "../a", ""),
    "before its target": ("0", "b", ""),
    "absolute, inside": ("again", "{neighbour}/../data/b/deep", ""),
    "chain that stays": ("first", ".hidden/stays", ""),
    "name with a dot": (".other", "../neighbour", ""),
    "to a file": ("notes", "../notes.md", ""),
}


def write_pair(folder: Path) -> None:
    (folder / "x.wav").touch()
    (folder / "x.txt").write_text(WORDS)


def write_small_table(folder: Path) -> None:
    write_parquet(folder / "x.parquet", {"audio": ["x.wav"], "text": [WORDS]})


def folder_of_clips(root: Path, write: Callable[[Path], None]) -> Path:
    """Make a folder with one clip in each of `a`, `b` and `b/deep`, next to the folder `neighbour` with a clip."""
    for name in ("data/a", "data/b", "data/b/deep", "data/.hidden", "neighbour"):
        (root / name).mkdir(parents=True)
        if name != "data/.hidden":
            write(root / name)
    (root / "notes.md").touch()
    (root / "data" / ".hidden" / "leaves").symlink_to("../../neighbour")
    (root / "data" / ".hidden" / "stays").symlink_to("../b/deep")
    return root / "data"


def folders_read(path: Path) -> list[str]:
    clips = [clip.path for entry in read(path) if entry.sample for clip in entry.sample.clips]
    return sorted(clip.parent.relative_to(path).as_posix() for clip in clips)


@pytest.mark.parametrize("write", [write_pair, write_small_table], ids=["paired", "table"])
@pytest.mark.parametrize("name", LINKS)
def test_links_in_a_folder(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    """Every folder below the given one is read once, and no other; a link that asks for another is named."""
    data = folder_of_clips(tmp_path, write)
    assert folders_read(data) == ["a", "b", "b/deep"]
    assert faults(data) == []
    link, target, fault = LINKS[name]
    neighbour = tmp_path / "neighbour"
    (data / link).symlink_to(target.format(neighbour=neighbour))
    assert folders_read(data) == ["a", "b", "b/deep"]
    expect_faults(data, [f"/{link}: {fault.format(neighbour=neighbour, target=target)}"] if fault else [])


@pytest.mark.parametrize("write", [write_pair, write_small_table], ids=["paired", "table"])
def test_links_that_are_followed(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """Files anywhere, a folder below that is skipped under its own name, and the given folder itself."""
    given, store = tmp_path / "given", tmp_path / "data" / ".store" / "clips"
    store.mkdir(parents=True)
    (tmp_path / "data" / "files").mkdir()
    (tmp_path / "neighbour").mkdir()
    write(store)
    write(tmp_path / "neighbour")
    for file in (tmp_path / "neighbour").iterdir():
        (tmp_path / "data" / "files" / file.name).symlink_to(f"../../neighbour/{file.name}")
    (tmp_path / "data" / "c").symlink_to(".store/clips")
    (tmp_path / "data" / "d").symlink_to(".store")
    (tmp_path / "data" / "e").symlink_to("c")
    given.symlink_to("data")
    for path in (tmp_path / "data", given):
        assert folders_read(path) == ["c", "files"]
        assert faults(path) == []


def test_a_folder_of_links_only(tmp_path: Path) -> None:
    """Each link is named, although no format can be detected."""
    folder_of_clips(tmp_path, write_pair)
    (tmp_path / "links").mkdir()
    for name in ("one", "two"):
        (tmp_path / "links" / name).symlink_to("../data")
    found = faults(tmp_path / "links")
    assert [fault.split(": ")[0] for fault in found] == [f"{tmp_path}/links/one", f"{tmp_path}/links/two"]


def test_broken_links_to_clips_and_texts(tmp_path: Path) -> None:
    """The clip's is a sample, whose check reports the missing file; the text's is reported here."""
    for name in ("a.wav", "b.txt"):
        (tmp_path / name).symlink_to("none")
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "b.wav").touch()
    first, second = read(tmp_path)
    assert first.sample is not None
    assert first.sample.clips == [AudioClip(tmp_path / "a.wav")]
    assert second.faults == ("transcript: b.txt cannot be read: No such file or directory",)


def test_split_that_is_a_link(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict(train=saved_dataset()).save_to_disk(tmp_path / "data")
    saved_dataset().save_to_disk(tmp_path / "neighbour")
    (tmp_path / "data" / "test").symlink_to("../neighbour")
    (link,) = [entry for entry in read(tmp_path / "data") if entry.faults]
    assert link.source == f"{tmp_path}/data/test"
    assert link.faults[0].startswith(OUTSIDE.format(neighbour=tmp_path / "neighbour"))
    assert len(read(tmp_path / "data")) == 1 + len(expected_saved(tmp_path))


def test_kept_index_depends_on_what_is_read(tmp_path: Path) -> None:
    """It is compared with the files that links lead to and with the links that are refused, not with their clips."""
    data = folder_of_clips(tmp_path, write_pair)
    (data / "c.txt").symlink_to("../c.txt")
    seen: list[Any] = []

    def is_new() -> bool:
        seen.append(identity_of(data)[0])
        return seen[-1] not in seen[:-1]

    assert is_new()
    (tmp_path / "c.txt").write_text(WORDS)
    assert is_new()
    (data / "other").symlink_to("../neighbour")
    assert is_new()
    (tmp_path / "neighbour" / "y.wav").touch()
    assert not is_new()


# Recognition

CONTENTS: dict[str, Callable[[Path], Any]] = {
    "chatml": lambda path: write_lines(
        path, {"messages": [{"role": "assistant", "content": {"type": "audio", "audio_url": "a.wav"}}]}
    ),
    "native": lambda path: write_lines(path, NATIVE[2]),
    "swift": lambda path: write_lines(path, swift(("assistant", "<audio>Hi."))),
    "metadata": lambda path: write_lines(path, {"dataset_info": {}, "samples": [{"audio_file": "a.wav"}]}),
    "list": lambda path: write_lines(path, "a.wav|Hi."),
    "csv": lambda path: write_lines(path, "audio,text", "a.wav,Hi."),
    "flat": lambda path: write_lines(path, {"audio": "a.wav", "text": "Hi."}),
    "table": lambda path: write_parquet(path, ROWS),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_recognized_by_content_not_by_name(tmp_path: Path, name: str) -> None:
    CONTENTS[name](tmp_path / "data")
    assert recognize(tmp_path / "data") == name


def test_plain_conversations_are_chatml(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a", {"messages": [{"role": "user", "content": "Ping"}]}, {"messages": []})
    assert recognize(path) == "chatml"
    assert recognize(write_lines(path, {"messages": [{"role": "user", "content": "Ping"}]}, NATIVE[0])) == "native"
    assert recognize(write_lines(path, '{"messages": [', NATIVE[0])) == "native"
    assert recognize(write_lines(path, '{"messages": [')) == "chatml"


def test_metadata_is_recognized_without_reading_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonio, "CHUNK", 64)
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps({"samples": [{"audio_file": "a.wav"}] * 1000}) + "torn")
    taken: list[Any] = []
    monkeypatch.setattr(jsonio.json, "loads", taken.append)
    assert recognize(path) == "metadata"


GUESSES = [
    ("{}", "found JSON objects with the keys none"),
    ('{"a": 1, "b": 2}', "found JSON objects with the keys 'a', 'b'"),
    ("[1, 2]", "found JSON values such as 1"),
    ('{\n "messages": []\n}', "found one JSON object over several lines (write each sample on one line"),
    ("Hello.\nYou.", "found lines such as 'Hello.', which are not JSON, have no '|'"),
    ("a\0b", "found binary data"),
    (
        json.dumps(NATIVE[2]) + "\n" + json.dumps(swift(("assistant", "<audio>Hi."))),
        "found several formats: native (line 1), swift (line 2)",
    ),
]


@pytest.mark.parametrize(("text", "expected"), GUESSES, ids=range(len(GUESSES)))
def test_undetectable_content(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "data"
    path.write_text(text)
    (fault,) = faults(path)
    assert fault.startswith(f"{path}: format: cannot be detected; {expected}")
    assert fault.endswith(f"; set --format to one of {', '.join(FORMATS)}")
    with pytest.raises(InputError, match="cannot be detected"):
        recognize(path)


def test_undetectable_folders(tmp_path: Path) -> None:
    expect_faults(tmp_path, [": format: cannot be detected; found no audio, Parquet, tar or metadata file"])
    (tmp_path / "a.wav").touch()
    write_parquet(tmp_path / "a.parquet", ROWS)
    assert "found several formats: " in faults(tmp_path)[0]
    assert "paired (a.wav)" in faults(tmp_path)[0]


def test_format_option_overrides_detection(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data", {"messages": [{"role": "user", "content": "<audio> is a tag"}]})
    assert recognize(path) == "swift"
    expect_faults(path, [":1: messages: no assistant message at or after start_index 0"], format="chatml")


def test_format_and_kind_of_path(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data", "a.wav|Hi.")
    for name in ("chatml", "native", "swift"):
        expect_faults(tmp_path, [f": format: {name} needs a file, which this folder is not"], format=name)
    for name in ("list", "csv", "metadata", "flat"):
        expect_faults(tmp_path, [f": format: {name} needs a folder with metadata."], format=name)
    expect_faults(file, [": format: paired needs a folder, but this is a file"], format="paired")
    expect_faults(file, [": format: 'nonsense' is not a known format; allowed: auto, chatml"], format="nonsense")
    expect_faults(tmp_path, [": contains no samples"], format="paired")
    expect_faults(tmp_path, [": contains no samples"], format="table")
    for name in FORMATS:
        assert faults(tmp_path / "none", format=name)[0].startswith(f"{tmp_path / 'none'}: ")
