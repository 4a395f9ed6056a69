"""Several manifests as one: their samples, their splits, their references, their indexes, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import write_manifest

from higgs_ds.checkpoints.state import TrainerState, check_same_run
from higgs_ds.common.errors import InputError
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.data import preparation
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.options.checks import check_options
from higgs_ds.options.commands import PrepareOptions
from higgs_ds.options.train import TrainOptions
from higgs_ds.speech.prompts import prompts_of
from higgs_ds.training import prepare
from higgs_ds.training.resume import _training_settings
from higgs_ds.training.run import Inputs
from higgs_ds.training.selection import _hours, describe_manifests, short_names
from higgs_ds.training.startup import _check_and_encode

Start = Callable[..., Inputs]


def manifest(clips: Path, name: str, count: int, voice: str, **more: Any) -> Path:
    """Write a list of `count` recordings of four clips, each with its own words."""
    entries = [{"audio": f"{voice}_{i % 4}.wav", "text": f"{name} {i}."} | more for i in range(count)]
    (clips / name).parent.mkdir(exist_ok=True)
    return write_manifest(clips / name, entries)


@pytest.fixture
def start(base: Path, clips: Path, tmp_path: Path, lone_rank: None) -> Start:
    def start(*manifests: Path, **options: Any) -> Inputs:
        defaults = {
            "base_ckpt": str(base), "cache_dir": clips / "cache", "output_dir": tmp_path / "out", "val_split": 0.0,
        }  # fmt: skip
        values: dict[str, Any] = defaults | {"train_manifest": manifests} | options
        return _check_and_encode(TrainOptions().replace(**values), set(), FolderLock())

    return start


def sources(data: Dataset) -> list[str]:
    return data.sources(range(len(data)))


def encoded(data: Dataset) -> list[tuple[Any, list[Any]]]:
    found = [data.encoded(i) for i in range(len(data))]
    return [(sample.prompt, [codes.tolist() for codes in sample.codes]) for sample in found]


def test_the_same_as_one_manifest_with_all_lines(start: Start, clips: Path) -> None:
    one = manifest(clips, "one.jsonl", 5, "anna", speaker="b", language="en")
    other = manifest(clips, "other.jsonl", 3, "ben", speaker="a")
    both = clips / "both.jsonl"
    both.write_text(one.read_text() + other.read_text() + one.read_text().splitlines()[0])
    more = clips / "more.jsonl"
    more.write_text(one.read_text().splitlines()[0])
    expected, found = start(both).train, start(one, other, more).train
    assert encoded(found) == encoded(expected)
    assert found.lengths == expected.lengths
    assert found.longest == expected.longest
    assert [sample.speaker for sample in map(found.sample, range(9))] == [*"bbbbbaaab"]
    index = found.index
    assert index.digests().tobytes() == expected.index.digests().tobytes()
    assert index.num_frames().tolist() == expected.index.num_frames().tolist()
    assert index.num_frames().sum() == expected.index.clip_frames().sum()
    for name in ("speaker", "language"):
        assert [column.tolist() for column, _ in (index.labels(name),)] == [expected.index.labels(name)[0].tolist()]
        assert index.labels(name)[1] == expected.index.labels(name)[1]
    assert index.voices().tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2]  # b of the third manifest is another speaker
    assert sources(found) == [*(f"{one}:{i}" for i in range(1, 6)), *(f"{other}:{i}" for i in (1, 2, 3)), f"{more}:1"]
    assert found.manifests == {"one.jsonl": range(5), "other.jsonl": range(5, 8), "more.jsonl": range(8, 9)}
    assert (expected.manifests, expected.mix) == ({}, None)
    assert found.index.repeated_rows().tolist() == [8]
    assert (
        f"\n  samples that an earlier manifest has too: 1, for instance {more}:1\n" in start(one, other, more).summary
    )
    assert isinstance(expected.digest(), str)  # as checkpoints of one manifest have it
    assert found.digest() == [start(path).train.digest() for path in (one, other, more)]


def test_each_manifest_is_split_as_it_is_alone(start: Start, clips: Path) -> None:
    one, other = manifest(clips, "s1.jsonl", 12, "anna"), manifest(clips, "s2.jsonl", 6, "ben")
    alone = [start(path, val_split=0.25) for path in (one, other)]
    both = start(one, other, val_split=0.25, mix=(0.5, 2.0))
    assert sources(both.val) == [source for inputs in alone for source in sources(inputs.val)]
    assert sources(both.train) == [source for inputs in alone for source in sources(inputs.train)]
    assert both.val.manifests == {"s1.jsonl": range(3), "s2.jsonl": range(3, 5)}
    turns = [sources(both.val)[i].split(":")[0] for i in both.val.alternating()]
    assert turns == list(map(str, [one, other, one, other, one]))
    assert [prompt.words.split()[0] for prompt in prompts_of(both.val, 2)] == ["s1.jsonl", "s2.jsonl"]
    assert Counter(both.train.samples_in(0)) + Counter(both.train.samples_in(1)) == Counter(
        {i: 1 if i < 9 else 4 for i in range(13)}
    )
    lines = describe_manifests(both.train, both.val)
    assert lines == [
        "s1.jsonl: 9 training samples, 0.00 hours; mix 0.5: 5 samples per epoch, 38.5% of all; 3 validation samples",
        "s2.jsonl: 4 training samples, 0.00 hours; mix 2: 8 samples per epoch, 61.5% of all; 2 validation samples",
    ]
    assert all(f"  {line}\n" in both.summary for line in lines)
    clips_of_it = [json.loads(line)["audio"] for line in one.read_text().splitlines()]
    seconds = sum(soundfile.info(clips / name).duration for name in clips_of_it)
    assert _hours(alone[0].train, range(9)) + _hours(alone[0].val, range(3)) == pytest.approx(seconds / 3600, rel=0.06)


def test_a_speaker_of_two_manifests_is_on_one_side(start: Start, clips: Path) -> None:
    one, other = clips / "p1.jsonl", clips / "p2.jsonl"
    for path, names in ((one, "abcd"), (other, "cdef")):
        write_manifest(path, [{"audio": "anna_0.wav", "text": f"{i}.", "speaker": names[i % 4]} for i in range(12)])
    for seed in range(6):
        inputs = start(one, other, val_split=0.25, split_by="speaker", seed=seed)
        speakers = [{data.sample(i).speaker for i in range(len(data))} for data in (inputs.train, inputs.val)]
        assert speakers[0].isdisjoint(speakers[1])
        assert all(len(samples) in (3, 6) for samples in inputs.val.manifests.values())
    single = [manifest(clips, f"{name}.jsonl", 2, "ben", speaker=name) for name in ("x", "y")]
    with pytest.raises(InputError, match=r"--split_by speaker: each manifest keeps a speaker for training"):
        start(*single, val_split=0.5, split_by="speaker")


def test_validation_manifests(start: Start, clips: Path) -> None:
    train, one, other = (manifest(clips, f"v{i}.jsonl", 2 + i, "anna") for i in range(3))
    inputs = start(train, val_manifest=(one, other))
    assert inputs.val.manifests == {"v1.jsonl": range(3), "v2.jsonl": range(3, 7)}
    assert (len(inputs.train), inputs.train.manifests) == (2, {})
    assert [line.split(", ")[0] for line in describe_manifests(inputs.train, inputs.val)] == [
        "v1.jsonl: 3 validation samples", "v2.jsonl: 4 validation samples"
    ]  # fmt: skip


def test_random_references_stay_in_their_manifest(start: Start, clips: Path) -> None:
    """Both have a speaker "0", who is not the same."""
    one, other = (manifest(clips, f"{voice}.jsonl", 4, voice, speaker="0") for voice in ("anna", "ben"))
    train = start(one, other, reference="random").train
    drawn = np.array([train.references.in_epoch(epoch).rows for epoch in range(12)])
    assert [set(column) for column in drawn.T.tolist()] == [
        {*(range(4) if row < 4 else range(4, 8))} - {row} for row in range(8)
    ]
    assert train.digest()[:2] == [start(path).train.digest() for path in (one, other)]
    assert len(train.digest()) == 3


def test_a_change_of_one_manifest_checks_only_that_one(
    start: Start, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [manifest(clips, f"c{i}.jsonl", 2, "anna") for i in range(3)]
    start(paths[0])
    checked: list[Path] = []
    real = preparation.survey
    monkeypatch.setattr(preparation, "survey", lambda path, *rest: checked.append(path) or real(path, *rest))
    before = start(*paths).train.digest()
    assert checked == paths[1:]
    manifest(clips, "c1.jsonl", 3, "ben")
    after = start(*paths).train.digest()
    assert checked[2:] == [paths[1]]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]


def test_resume_notices_another_manifest_and_another_mix(start: Start, clips: Path) -> None:
    one, other, third = (manifest(clips, f"r{i}.jsonl", 4, "anna", language=str(i)) for i in range(3))

    def state(*manifests: Path, **options: Any) -> TrainerState:
        inputs = start(*manifests, **options)
        sampler = WindowSampler(inputs.train.lengths, 2, 1, 0, 1, 42, mix=inputs.train.mix)
        return TrainerState(10, _training_settings(inputs, sampler))

    same = state(one, other, mix=(1.0, 1.0))
    check_same_run(state(one, other), same, Path("checkpoint-2"))
    third.write_text(other.read_text())
    check_same_run(state(one, third), same, Path("checkpoint-2"))  # the same samples in another file
    with pytest.raises(InputError, match=r"was trained with mix \[1.0, 0.5\], but this run has None"):
        check_same_run(state(one, other, mix=(1.0, 0.5)), same, Path("checkpoint-2"))
    with pytest.raises(InputError, match=r"was trained with training_data \['\w{64}', '\w{64}'\], but this run has"):
        check_same_run(state(other, one), same, Path("checkpoint-2"))


def test_problems_of_all_manifests_at_once(start: Start, clips: Path, base: Path, tmp_path: Path) -> None:
    good, bad = manifest(clips, "good.jsonl", 2, "anna"), manifest(clips, "bad.jsonl", 2, "nobody")
    wrong = manifest(clips, "wrong.jsonl", 1, "ben", speakr="x")
    options = TrainOptions().replace(
        train_manifest=(good, bad, wrong), base_ckpt=str(base), cache_dir=tmp_path / "cache"
    )
    for run in (
        lambda: prepare.main(options.data, options.model, PrepareOptions()),
        lambda: start(good, bad, wrong),
    ):
        with pytest.raises(InputError) as caught:
            run()
        named = [problem.split(": ")[0] for problem in caught.value.problems]
        assert named == [f"{bad}:1", f"{bad}:2", f"{wrong}:1"]


def test_bad_samples_of_all_manifests_are_listed(start: Start, clips: Path, tmp_path: Path) -> None:
    paths = [clips / f"b{i}.jsonl" for i in range(2)]
    for path in paths:
        write_manifest(path, [{"audio": name, "text": "Words."} for name in ("anna_0.wav", "none.wav", "ben_0.wav")])
    inputs = start(*paths, skip_bad=tmp_path / "bad.txt")
    assert [line.split(": ")[0] for line in (tmp_path / "bad.txt").read_text().splitlines()] == [
        f"{path}:2" for path in paths
    ]
    assert sources(inputs.train) == [f"{path}:{line}" for path in paths for line in (1, 3)]


def test_prepare_encodes_all(
    clips: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lone_rank: None
) -> None:
    one, other = (manifest(clips, f"e_{voice}.jsonl", 4, voice) for voice in ("anna", "ben"))
    options = TrainOptions().replace(train_manifest=(one, other), base_ckpt=str(base), cache_dir=tmp_path / "cache")
    prepare.main(options.data, options.model, PrepareOptions())
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(".jsonl:")] == [
        f"{one}:", f"{other}:"
    ]  # fmt: skip
    assert len(list((tmp_path / "cache" / "codes").rglob("*.safetensors"))) == 8
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 2


def test_a_manifest_of_long_samples_alone_is_named(start: Start, clips: Path) -> None:
    short, long = manifest(clips, "short.jsonl", 3, "anna"), clips / "long.jsonl"
    write_manifest(long, [{"audio": "ben_0.wav", "text": "Many words. " * 60}])
    limit = max(start(short).train.lengths)
    with pytest.raises(InputError, match=rf"--max_seq_len {limit}: every sample of {long} is longer"):
        start(short, long, max_seq_len=limit)
    assert len(start(short, max_seq_len=limit).train) == 3


def test_refused_lists(tmp_path: Path) -> None:
    one, link = tmp_path / "one.jsonl", tmp_path / "link.jsonl"
    one.touch()
    link.symlink_to(one)
    other = tmp_path / "other.jsonl"

    def problems(**options: Any) -> list[str]:
        return check_options(TrainOptions().replace(**options))

    assert problems(train_manifest=(one, other), mix=(0.5, 2.0), val_manifest=(one, other)) == []
    assert problems(mix=(0.5,)) == []  # of the built-in manifest
    repeat = "; to repeat its samples, name it once, with the number 2 in --mix"
    assert problems(train_manifest=(one, other, one)) == [f"--train_manifest: names {one} twice{repeat}"]
    assert problems(train_manifest=(one, tmp_path / "x" / ".." / "one.jsonl")) == [
        f"--train_manifest: names {tmp_path}/x/../one.jsonl, which is also {one}, twice{repeat}"
    ]
    assert problems(val_manifest=(link, one)) == [f"--val_manifest: names {one}, which is also {link}, twice"]
    assert problems(train_manifest=()) == ["--train_manifest: names no manifest; leave the option out"]
    assert problems(val_manifest=(Path("a\0"), one)) == [
        r"--val_manifest 'a\x00': is not a file name: it contains a null character"
    ]
    assert problems(train_manifest=(one, other), mix=(1.0,)) == [
        "--mix 1: 1 given, and --train_manifest names 2; give a number for each manifest"
    ]
    for number in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        (problem,) = problems(train_manifest=(one, other), mix=(1.0, number))
        assert problem == f"--mix 1 {number:g}: each number must be above 0, up to 1,000"


def test_short_names() -> None:
    assert short_names([Path("a/en.jsonl"), Path("b/de.jsonl"), Path("clips")]) == ["en.jsonl", "de.jsonl", "clips"]
    assert short_names([Path("en/m.csv"), Path("de/m.csv")]) == ["en/m.csv", "de/m.csv"]
    assert short_names([Path("/m.csv"), Path("/x/m.csv")]) == ["/m.csv", "x/m.csv"]
