"""--speaker_prompt: samples as if their manifest named the speakers; and the warning where prompts are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SYSTEM, VOICES_MANIFEST, write_manifest
from test_references import Start, all_encoded, assert_forms, recording, same, start, turns

from higgs_ds.common.errors import InputError
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.data.speakers import find_equal_prompts, trained_voices
from higgs_ds.model.sample import Message
from higgs_ds.options.checks import check_data_options
from higgs_ds.options.commands import PrepareOptions
from higgs_ds.options.train import DataOptions, ModelOptions
from higgs_ds.training import prepare

__all__ = ["start"]  # a fixture
QUIET, END = f"{SYSTEM}\n\n<|scene_desc_start|>\nAudio is recorded from a quiet room.", "\n<|scene_desc_end|>"
TAG = DataOptions(speaker_prompt="tag")


def written(folder: Path, name: str, values: Any) -> Path:
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder / name


def first_messages(folder: Path, entry: dict[str, Any], options: DataOptions = TAG) -> tuple[Message, ...]:
    (found,) = read_entries(write_manifest(folder / "one.jsonl", [entry]), options)
    assert found.sample is not None, found.faults
    assert [turn for turn, message in enumerate(found.sample.messages) if found.sample.is_target(turn)] == [
        turn for turn, message in enumerate(found.sample.messages) if message.role == "assistant"
    ]
    return found.sample.messages


@pytest.mark.parametrize(
    ("entry", "system"),
    [
        (recording("anna_0"), f"{QUIET}\n\nSPEAKER0: anna{END}"),
        (recording("anna_0", speaker=" de  la Cruz "), f"{QUIET}\n\nSPEAKER0: de la Cruz{END}"),
        (recording("anna_0", style="slowly"), f"{QUIET}\n\nSPEAKER0: slowly{END}"),
        (recording("anna_0", text="[SPEAKER2] Hi."), f"{QUIET}\n\nSPEAKER2: anna{END}"),
        (recording("anna_0", text="[SPEAKER0] Hi. [SPEAKER1] Ho."), None),
        (recording("anna_0", speaker=None), f"{QUIET}{END}"),
        ({"messages": turns("a"), "speaker": "7"}, f"{SYSTEM}\n\n<|scene_desc_start|>\nSPEAKER0: 7{END}"),
        ({"messages": turns("a", system=f"{QUIET}{END} Go."), "speaker": "7"}, f"{QUIET}\n\nSPEAKER0: 7{END} Go."),
        ({"messages": turns("a", system=None), "speaker": "7"}, f"{SYSTEM}\n\n<|scene_desc_start|>\nSPEAKER0: 7{END}"),
    ],
)  # fmt: skip
def test_line_of_the_system_message(tmp_path: Path, entry: dict[str, Any], system: str | None) -> None:
    """As a description is placed; the rest of a sample stays."""
    messages, plain = (first_messages(tmp_path, entry, options) for options in (TAG, DataOptions()))
    assert system is None or messages[0] == Message("system", (system,))
    assert messages[1:] == plain[plain[0].role == "system" :]
    assert system is not None or messages == plain


def test_same_as_a_manifest_that_describes_them(start: Start, clips: Path, tmp_path: Path) -> None:
    """Descriptions of a file, and the speakers' names, give the samples that descriptions of the manifest give."""
    names = ("anna_0", "ben_1", "ben_2")
    voices = {"anna": "a low,  calm\nvoice", "ben": "an old voice"}
    plain = write_manifest(clips / "plain.jsonl", [recording(name) for name in names])
    file = written(tmp_path, "voices.yaml", json.dumps(voices))
    for options, style in (
        ({"speaker_prompt": "description", "speaker_descriptions": file}, {"anna": "a low, calm voice", **voices}),
        ({"speaker_prompt": "tag"}, {"anna": "anna", "ben": "ben"}),
    ):
        style["anna"] = " ".join(style["anna"].split())
        styled = [recording(name, style=style[name.split("_")[0]]) for name in names]
        expected = all_encoded(start(write_manifest(clips / "styled.jsonl", styled)).train)
        inputs = start(plain, **options)
        assert all(same(*pair) for pair in zip(all_encoded(inputs.train), expected, strict=True))
        assert trained_voices(inputs.train.index, inputs.train.rows, inputs.options.data) == style
    unchanged = start(plain)
    assert not any(same(*pair) for pair in zip(all_encoded(unchanged.train), expected, strict=True))
    assert trained_voices(unchanged.train.index, unchanged.train.rows, unchanged.options.data) == {}
    file.write_text(json.dumps(voices | {"ben": "a young voice"}))  # the index of before is not used
    changed = start(plain, speaker_prompt="description", speaker_descriptions=file).train
    assert "young" in str(changed.sample(1).messages[0])


@pytest.mark.parametrize("placement", ["context", "system"])
def test_line_where_the_reference_is_left_out(start: Start, clips: Path, placement: str) -> None:
    """With its reference a sample is as without the option, and without it as one that has no reference."""
    own = {"ref_audio": "anna_1.wav", "ref_text": "Said."}
    entries = [recording("anna_0", **own), recording("anna_2", style="softly", **own)]
    talks = [{"messages": turns(*names, system=None), "speaker": "ben"} for names in (("ben_1", "ben_0"), ("ben_0",))]
    talks[0]["start_index"] = 2
    recordings = write_manifest(clips / "recordings.jsonl", entries)
    with_own, alone = (write_manifest(clips / f"talk{i}.jsonl", [talk]) for i, talk in enumerate(talks))
    both = {"train_manifest": (recordings, with_own)}
    with_it = all_encoded(start(recordings, reference=placement, **both).train)
    plain = {"reference": "none", "speaker_prompt": "tag", "train_manifest": (recordings, alone)}
    without = all_encoded(start(recordings, **plain).train)
    inputs = start(recordings, reference=placement, reference_dropout=0.5, speaker_prompt="tag", **both)
    assert_forms(inputs.train, with_it, without)
    voices = trained_voices(inputs.train.index, inputs.train.rows, inputs.options.data)
    assert voices == {"anna": "anna", "ben": "ben"}


def test_reference_is_another_name_of_random(start: Start, clips: Path) -> None:
    path = write_manifest(clips / "all.jsonl", [recording(f"{who}_{i}") for who in ("anna", "ben") for i in range(4)])
    one, other = start(path, speaker_prompt="reference"), start(path, reference="random")
    assert one.train.digest() == other.train.digest()
    assert all(same(*pair) for pair in zip(all_encoded(one.train, 1), all_encoded(other.train, 1), strict=True))
    assert trained_voices(one.train.index, one.train.rows, one.options.data) == {"anna": None, "ben": None}
    for inputs in (one, other):
        assert find_equal_prompts(inputs.train.index, inputs.train.rows, inputs.train.references) is None
    lone = write_manifest(clips / "lone.jsonl", [recording("anna_0")])
    with pytest.raises(InputError, match="--speaker_prompt reference: no training sample can get another clip"):
        start(lone, speaker_prompt="reference")


def test_equal_prompts_are_those_of_equal_tokens(start: Start, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where all have the same words, prompts are equal if the tokens and codes before the target are."""
    words, names = "Equal words.", [f"{who}_{i}" for who in ("anna", "ben") for i in range(4)]
    reference = {"ref_audio": "ben_3.wav", "ref_text": "Said."}
    entries = [recording(name, text=words) for name in names]
    entries += [recording(name, text=words, style=style) for name in names for style in ("low", name.split("_")[0])]
    entries += [recording(name, text=words, **reference) for name in ("anna_0", "ben_0", "ben_1")]
    entries += [recording("anna_1", text=words, ref_audio="anna_2.wav", ref_text="Said.")]
    entries += [recording("anna_3", text=words, speaker=None), recording("ben_2", text=words, speaker="carl")]
    entries += [recording("ben_2", text=words, speaker="carl", style="carl's")]
    train = start(write_manifest(clips / "equal.jsonl", entries)).train
    speakers: dict[str, set[str]] = {}
    prompts = []
    for sample, entry in zip(all_encoded(train), entries, strict=True):
        num_codebooks, num_frames = sample.codes[-1].shape
        target = sample.prompt.audio_columns[-(num_frames + num_codebooks + 1)]
        prompts.append(str((sample.prompt.input_ids[:target], [codes.tolist() for codes in sample.codes[:-1]])))
        speakers.setdefault(prompts[-1], set()).update(filter(None, [entry["speaker"]]))
    equal = [e["speaker"] for p, e in zip(prompts, entries, strict=True) if e["speaker"] and len(speakers[p]) > 1]
    found = find_equal_prompts(train.index, train.rows, train.references)
    assert found is not None
    assert found.samples == {name: equal.count(name) for name in ("ben", "anna", "carl")}
    assert found.num_named == len(entries) - 1
    assert (
        f"warning: 3 speakers have the same prompts, in {len(equal)} of {len(entries) - 1} samples, so that the model "
        f"cannot learn whom to speak as: ben ({equal.count('ben')}), anna" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "is_equal"),
    [
        ("{} speaks.", True),
        ("{}: Hi.", False),
        ("[{}] Hi.", False),
        ("<{}> Hi.", False),
        ("{}|Hi.", False),
        ("Hi, says {}.", True),
    ],
)
def test_words_that_begin_with_the_speaker(start: Start, clips: Path, words: str, is_equal: bool) -> None:
    entries = [recording(name, text=words.format(name.split("_")[0])) for name in ("anna_0", "ben_0")]
    train = start(write_manifest(clips / "words.jsonl", entries)).train
    assert (find_equal_prompts(train.index, train.rows, None) is not None) == is_equal


def test_prepare_warns(base: Path, tmp_path: Path, lone_rank: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the sample voices, eight clips of each; two of each have a reference."""
    found = {}
    for kind in ("none", "tag", "reference"):
        options = DataOptions((VOICES_MANIFEST,), speaker_prompt=kind, cache_dir=tmp_path)
        prepare.main(options, ModelOptions(base_ckpt=str(base)), PrepareOptions(check_only=True))
        found[kind] = [line for line in capsys.readouterr().out.splitlines() if "have the same prompts" in line]
    assert found == {
        "none": [
            "warning: 3 speakers have the same prompts, in 18 of 24 samples, so that the model cannot learn whom to "
            "speak as: anna (6), ben (6), carla (6). Tell them apart with --speaker_prompt tag, description or "
            "reference, or train on one speaker"
        ],
        "tag": [],
        "reference": [],
    }


def test_bad_options(tmp_path: Path) -> None:
    file = written(tmp_path, "voices.json", {"anna": "", "ben": 3, "carl": "low <|eot_id|>"})
    bad = DataOptions(speaker_prompt="reference", reference="system", speaker_descriptions=file)
    for expected, found in zip(
        ["--speaker_prompt reference: ", "needs --speaker_prompt description", ": anna: ", ": ben: ", ": carl: "],
        check_data_options(bad),
        strict=True,
    ):
        assert expected in found
    for name, content in {"a.json": "{", "b.yaml": "a: [", "c.json": "[]", "d.yaml": "{}", "e.json": "\x00"}.items():
        options = DataOptions(speaker_prompt="description", speaker_descriptions=written(tmp_path, name, content))
        assert len(check_data_options(options)) == 1
    for path in (tmp_path, tmp_path / "none.json", Path("/dev/zero")):
        assert len(check_data_options(DataOptions(speaker_prompt="description", speaker_descriptions=path))) == 1


def test_speakers_without_a_description(start: Start, clips: Path, tmp_path: Path) -> None:
    """Each of their samples is reported; those with a description, or without a speaker, are not."""
    file = written(tmp_path, "voices.json", {"anna": "a low voice"})
    entries = [
        recording("anna_0"),
        recording("ben_0"),
        recording("ben_1", style="fast"),
        recording("ben_2", speaker=None),
    ]
    path = write_manifest(clips / "some.jsonl", entries)
    with pytest.raises(InputError) as error:
        start(path, speaker_prompt="description", speaker_descriptions=file)
    assert error.value.problems == [
        f"{path}:2: speaker: 'ben' has no description; add it to --speaker_descriptions {file}"
    ]
    nameless = write_manifest(clips / "nameless.jsonl", [recording("anna_0", speaker=None)])
    with pytest.raises(InputError, match="--speaker_prompt tag: no training sample names its speaker"):
        start(nameless, speaker_prompt="tag")
    token = write_manifest(clips / "token.jsonl", [recording("anna_0", speaker="<|scene_desc_end|>")])
    with pytest.raises(InputError, match="token of the prompt layout; rename the speaker"):
        start(token, speaker_prompt="tag")


def test_joined_manifests(start: Start, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Speakers of two manifests are told apart by their names, and equal names are one speaker."""
    paths = [
        write_manifest(clips / f"{who}.jsonl", [recording(f"{who}_{i}") for i in range(2)]) for who in ("anna", "ben")
    ]
    train = start(paths[0], train_manifest=tuple(paths)).train
    found = find_equal_prompts(train.index, np.array([0, 1, 2]), None)
    assert found is not None
    assert found.samples == {"anna": 2, "ben": 1}
    same_name = write_manifest(clips / "same.jsonl", [recording("ben_3", speaker="anna")])
    capsys.readouterr()
    start(paths[0], train_manifest=(paths[0], same_name))
    assert "have the same prompts" not in capsys.readouterr().out
