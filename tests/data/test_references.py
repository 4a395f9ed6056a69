"""References that are left out, and clips of the same speaker as references: which samples, which clips, which ids."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SYSTEM, write_manifest

from higgs_ds.common.errors import InputError
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.data.collate import EncodedSample
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.index import Index
from higgs_ds.data.index_writer import CheckedClip, CheckedSample, PartWriter
from higgs_ds.data.reference_choice import References
from higgs_ds.data.reference_index import write_references
from higgs_ds.data.references import Candidate
from higgs_ds.model.sample import AudioClip, Message, Sample
from higgs_ds.options.commands import PrepareOptions
from higgs_ds.options.train import DataOptions, TrainOptions
from higgs_ds.speech.prompts import prompts_of
from higgs_ds.training import prepare
from higgs_ds.training.run import Inputs
from higgs_ds.training.startup import _check_and_encode

Start = Callable[..., Inputs]
EPOCHS = range(8)


@pytest.fixture
def start(base: Path, clips: Path, tmp_path: Path, lone_rank: None) -> Start:
    def start(manifest: Path, **options: Any) -> Inputs:
        defaults = {
            "base_ckpt": str(base),
            "cache_dir": clips / "cache",
            "output_dir": tmp_path / "out",
            "val_split": 0,
        }
        values: dict[str, Any] = defaults | {"train_manifest": (manifest,)} | options
        return _check_and_encode(TrainOptions().replace(**values), set(), FolderLock())

    return start


def recording(name: str, **more: Any) -> dict[str, Any]:
    """A recording, as in the flat format; each clip has its own words."""
    return {"audio": f"{name}.wav", "text": f"Words of {name}.", "speaker": name.split("_")[0]} | more


def turns(*names: str, system: Any = SYSTEM) -> list[dict[str, Any]]:
    """A conversation of clips with their words."""
    found = [{"role": "system", "content": system}] if system else []
    for name in names:
        audio = {"type": "audio", "audio_url": f"{name}.wav"}
        found += [{"role": "user", "content": f"Words of {name}."}, {"role": "assistant", "content": audio}]
    return found


def all_encoded(data: Dataset, epoch: int | None = None) -> list[EncodedSample]:
    found = [data.encoded(i, epoch) for i in range(len(data))]
    assert [len(sample.prompt.input_ids) for sample in found] == data.lengths_in(epoch)
    assert max(data.lengths_in(epoch)) <= data.longest
    return found


def same(one: EncodedSample, other: EncodedSample) -> bool:
    codes = [[clip.tolist() for clip in sample.codes] for sample in (one, other)]
    return one.prompt == other.prompt and codes[0] == codes[1]


def left_out(data: Dataset, epoch: int | None) -> list[bool]:
    assert data.references is not None
    return data.references.in_epoch(epoch).left_out.tolist()


def assert_forms(data: Dataset, with_it: list[EncodedSample], without: list[EncodedSample]) -> None:
    """Each sample is one of its two forms, as the choice of the epoch says, and has been both in some epoch."""
    forms = [set() for _ in range(len(data))]
    for epoch in EPOCHS:
        found, are_without = all_encoded(data, epoch), left_out(data, epoch)
        for i, sample in enumerate(found):
            assert same(sample, without[i] if are_without[i] else with_it[i])
            forms[i].add(are_without[i])
    assert all(
        form == ({False} if same(*pair) else {False, True}) for form, *pair in zip(forms, with_it, without, strict=True)
    )
    assert all(same(*pair) for pair in zip(all_encoded(data), with_it, strict=True))  # as in validation


@pytest.mark.parametrize("placement", ["context", "system"])
def test_left_out_is_the_sample_of_reference_none(start: Start, clips: Path, tmp_path: Path, placement: str) -> None:
    """Of a recording: where it has them, with a description instead of the clip, and several speakers' instruction."""
    names = {f"{kind}_file": str(clips / "ben_0.wav") for kind in ("audio", "ref_audio")}
    speakers = [
        {"ref_audio_file": str(clips / "anna_1.wav"), "ref_transcript": "One."},
        {"ref_audio_file": str(clips / "ben_1.wav"), "ref_transcript": "Two.", "description": "an old voice " * 9},
    ]
    samples = [
        {"audio_file": names["audio_file"], "text": "Alone."},
        names | {"text": "One speaker.", "ref_transcript": "Said before."},
        {"audio_file": names["audio_file"], "text": "[SPEAKER0] Hi. [SPEAKER1] Hello.", "ref_speakers": speakers},
    ]
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps({"samples": samples}))
    with_it, without = (all_encoded(start(path, reference=which).train) for which in (placement, "none"))
    assert [len(sample.codes) for sample in with_it + without] == [1, 2, 3, 1, 1, 1]
    inputs = start(path, reference=placement, reference_dropout=0.5)
    assert_forms(inputs.train, with_it, without)
    assert inputs.longest == max(len(sample.prompt.input_ids) for sample in with_it + without)
    assert inputs.train.references is not None
    assert inputs.train.references.describe().startswith(
        "2 samples have their own, 1 sample has none; left out with probability 0.5, of "
    )


def test_left_out_of_a_conversation(start: Start, clips: Path) -> None:
    """Earlier turns of speech, and system lines with a clip; what a user says, and a target with its text, stay."""
    audio = {"type": "audio", "audio_url": "anna_1.wav"}
    scene, end = f"{SYSTEM}\n\n<|scene_desc_start|>\n", "\n<|scene_desc_end|>"
    rain = f"{scene}Rain."
    question = [{"role": "user", "content": ["Answer this.", audio]}, *turns("anna_0", system=None)[1:]]
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    forms = [
        (turns("anna_1", "ben_1", "anna_0"), 5, turns("anna_0"), 1),
        (turns("anna_0", system=[f"{rain}\n\nSPEAKER0: ", audio, end]), 0, turns("anna_0", system=f"{rain}{end}"), 0),
        (turns("anna_0", system=[f"{scene}SPEAKER0: ", audio, end]), 1, turns("anna_0"), 1),
        (turns("anna_1", "anna_0", system=["SPEAKER0: ", audio]), 3, turns("anna_0", system=None), 0),
        ([*turns(), *chat, *turns("anna_0", system=None)], 3, [*turns(), *chat, *turns("anna_0", system=None)], 3),
        ([*turns(), *question], 0, [*turns(), *question], 0),
        (turns("anna_0"), 2, turns("anna_0"), 2),
        ([*turns("anna_1"), turns("anna_0")[2]], 3, [*turns("anna_1"), turns("anna_0")[2]], 3),
    ]  # fmt: skip
    paths = [
        write_manifest(clips / f"{name}.jsonl", [{"messages": m, "start_index": s} for m, s in samples])
        for name, samples in (("with", [form[:2] for form in forms]), ("without", [form[2:] for form in forms]))
    ]
    with_it, without = (all_encoded(start(path).train) for path in paths)
    assert [len(sample.codes) for sample in with_it] == [3, 2, 2, 3, 1, 2, 1, 2]
    assert_forms(start(paths[0], reference_dropout=0.5).train, with_it, without)


@pytest.mark.parametrize("form", ["flat", "chatml"])
def test_random_is_the_sample_with_that_clip_as_its_reference(start: Start, clips: Path, form: str) -> None:
    """The clips of the other speaker are never taken, and a sample keeps a reference of its own."""
    names = [f"{speaker}_{i}" for speaker in ("anna", "ben") for i in range(4)]
    own = {"ref_audio": "ben_0.wav", "ref_text": "Its own."} if form == "flat" else {}
    if form == "flat":
        entries = [recording(name) | (own if name == "anna_0" else {}) for name in names]
    else:
        entries = [{"messages": turns(name), "start_index": i % 3, "speaker": name[:3]} for i, name in enumerate(names)]
    train = start(write_manifest(clips / f"{form}.jsonl", entries), reference="random").train
    assert train.references is not None
    pairs = [
        (name, names[row] if row >= 0 else None)
        for epoch in EPOCHS
        for name, row in zip(names, train.references.in_epoch(epoch).rows, strict=True)
    ]
    named = [
        recording(name) | ({"ref_audio": f"{other}.wav", "ref_text": f"Words of {other}."} if other else own)
        if form == "flat"
        else {"messages": turns(other or "", name), "start_index": 3}
        for name, other in pairs
    ]
    explicit = all_encoded(start(write_manifest(clips / "explicit.jsonl", named)).train)
    found = [sample for epoch in EPOCHS for sample in all_encoded(train, epoch)]
    assert all(same(*pair) for pair in zip(found, explicit, strict=True))
    with_reference = {pair for pair in pairs if pair[1] is not None}
    others = {(a, b) for a, b in itertools.permutations(names, 2) if a[0] == b[0]}
    assert with_reference == {pair for pair in others if not (own and pair[0] == "anna_0")}
    for name in names[1:]:  # another one in each epoch
        chosen = [other for which, other in pairs if which == name]
        assert all(one != other for one, other in itertools.pairwise(chosen))


def test_both_options(start: Start, clips: Path) -> None:
    entries = [recording(f"anna_{i}") for i in range(4)]
    path = write_manifest(clips / "both.jsonl", entries)
    plain, train = start(path).train, start(path, reference="random", reference_dropout=0.4).train
    without = all_encoded(plain)
    seen = set()
    for epoch in EPOCHS:
        found, are_without = all_encoded(train, epoch), left_out(train, epoch)
        assert [len(sample.codes) for sample in found] == [1 if out else 2 for out in are_without]
        assert all(same(found[i], without[i]) for i in range(4) if are_without[i])
        seen.update(are_without)
    assert seen == {False, True}


def test_lengths_of_every_epoch_fit(start: Start, clips: Path) -> None:
    """A sample gets only references that fit beside it. What the plan takes as the longest sample is reached."""
    path = write_manifest(clips / "fit.jsonl", [recording(f"{who}_{i}") for who in ("anna", "ben") for i in range(4)])
    whole = start(path, reference="random")
    assert whole.longest == max(max(whole.train.lengths_in(epoch)) for epoch in range(12))
    limit = whole.longest - 2
    inputs = start(path, reference="random", max_seq_len=limit)
    assert inputs.too_long == []
    rows = np.concatenate([inputs.train.references.in_epoch(epoch).rows for epoch in range(12)])
    assert (rows >= 0).all()
    assert max(len(s.prompt.input_ids) for epoch in EPOCHS for s in all_encoded(inputs.train, epoch)) <= limit
    assert inputs.longest <= limit < whole.longest
    with pytest.raises(InputError, match=rf"--max_tokens_per_batch {limit}: the longest sample has {whole.longest} to"):
        start(path, reference="random", max_tokens_per_batch=limit)
    # No pair of turns fits: nothing is left out for its length, and no sample has a reference.
    plain = start(path)
    with pytest.raises(InputError, match="8 have no other clip of their speaker, with other words and short enough"):
        start(path, reference="random", max_seq_len=plain.longest)


def test_validation_is_fixed_and_training_takes_nothing_of_it(start: Start, clips: Path) -> None:
    path = write_manifest(clips / "split.jsonl", [recording(f"{who}_{i}") for who in ("anna", "ben") for i in range(4)])
    options = {"reference": "random", "reference_dropout": 0.9, "val_split": 0.25}
    inputs = start(path, **options)
    train, val = inputs.train, inputs.val
    assert len(val) == 2
    seen = np.unique(np.concatenate([train.references.in_epoch(epoch).rows for epoch in range(40)]))
    assert set(seen.tolist()) == {-1, *train.rows.tolist()}
    first, second = (all_encoded(inputs.val) for inputs in (inputs, start(path, **options)))
    assert all(len(sample.codes) == 2 for sample in first)
    assert all(same(*pair) for pair in zip(first, second, strict=True))
    for encoded, prompt in zip(first, prompts_of(val, None), strict=True):  # what --sample_steps speaks
        assert prompt.turn == 4
        assert prompt.given[0].equal(encoded.codes[0])
        assert prompt.target.equal(encoded.codes[1])
    apart = start(path, reference="random", val_manifest=(path,))  # from its own samples
    assert all(len(sample.codes) == 2 for sample in all_encoded(apart.val))
    by_speaker = start(path, reference="random", val_split=0.5, split_by="speaker")
    assert all(len(sample.codes) == 2 for sample in all_encoded(by_speaker.val))


# Names of speakers, by sample, and what the message says.
NO_CHOICE = {
    "no_speakers": ([None] * 3, "3 samples have none (3 name no speaker); name speakers of two or more clips"),
    "one_clip": (["a", "b", "c"], "3 samples have none (3 have no other clip of their speaker"),
}


@pytest.mark.parametrize("name", NO_CHOICE)
def test_no_clip_to_choose(
    start: Start, clips: Path, name: str, capsys: pytest.CaptureFixture[str], base: Path
) -> None:
    speakers, reason = NO_CHOICE[name]
    entries = [recording(f"anna_{i}", speaker=speaker) for i, speaker in enumerate(speakers)]
    path = write_manifest(clips / f"{name}.jsonl", entries)
    with pytest.raises(InputError, match=r"^--reference random: no training sample can get another clip") as caught:
        start(path, reference="random")
    assert reason in str(caught.value)
    data = DataOptions(train_manifest=(path,), reference="random", cache_dir=clips / "cache")
    model = TrainOptions().replace(base_ckpt=str(base)).model
    with pytest.raises(InputError, match=r"^--reference random: no training sample can get another clip"):
        prepare.main(data, model, PrepareOptions(check_only=True))
    with pytest.raises(InputError, match=r"^--reference_dropout 0\.5: no training sample has a reference to leave out"):
        start(path, reference_dropout=0.5)


def test_what_is_reported(start: Start, clips: Path) -> None:
    entries = [recording(f"anna_{i}") for i in range(3)]
    entries += [recording("ben_0", speaker=None), recording("ben_1"), recording("ben_2", text="[SPEAKER0] Hi.")]
    entries += [recording("ben_3", ref_audio="ben_0.wav", ref_text="Its own.", text="Words of ben_1.")]
    inputs = start(write_manifest(clips / "reported.jsonl", entries), reference="random")
    expected = (
        "3 samples get another clip of their speaker, 1 sample has their own, 3 samples have none (1 name no "
        "speaker; 1 are more than one text and its clip; 1 have no other clip of their speaker, with other words and "
        "short enough)"
    )
    assert inputs.train.references.describe() == expected
    assert f"references: {expected}" in inputs.summary


# --- many samples, without audio ---

PAIR = (Message("user", ("Words.",)), Message("assistant", (AudioClip(Path("a.wav")),)))


def index_of(folder: Path, drawn: Iterator[tuple[str | None, Candidate, int, int]]) -> Index:
    """Write an index of samples with a speaker, as candidates, of a length, and of one without their reference."""
    folder.mkdir(exist_ok=True)
    writer = PartWriter(folder, 0)
    columns = []
    for i, (speaker, candidate, num_tokens, plain_tokens) in enumerate(drawn):
        sample = Sample(PAIR, 0, speaker, f"m:{i + 1}")
        writer.add(CheckedSample(i, sample, num_tokens, (CheckedClip("ab" * 32, 25),), ()))
        columns.append((plain_tokens, candidate))
    writer.close()
    write_references(folder / "references-00000.arrow", columns)
    return Index(folder)


def candidates(count: int, seed: int) -> Iterator[tuple[str | None, Candidate, int, int]]:
    """Samples of which some have the words, the clip or the time of another, no speaker, no pair, or a reference."""
    draw = random.Random(seed)
    for _ in range(count):
        at, length = draw.randrange(40), draw.randrange(1, 30)
        takes = draw.random() < 0.8
        candidate = Candidate(
            draw.choice([0, 50 + length, 50 + length, 50 + length]), draw.randrange(30), draw.randrange(60),
            draw.randrange(20), at, at + length / 10, takes,
        )  # fmt: skip
        yield draw.choice([None, "a", "b", "b"]), candidate, 100 + length, 0 if takes else 60


@pytest.mark.parametrize("seed", range(4))
def test_choices_against_every_pair(tmp_path: Path, seed: int) -> None:
    """All clips that may be a sample's reference are, one after another, and no other."""
    drawn = list(candidates(70, seed))
    index = index_of(tmp_path / "index", iter(drawn))
    rows, pool, limit = np.arange(5, 70), np.arange(0, 60), 100 + 50 + 35

    def may_be(i: int, j: int) -> bool:
        (speaker, target, num_tokens, _), (of_other, other, _, _) = drawn[i], drawn[j]
        overlaps = target.start_s < other.end_s and other.start_s < target.end_s
        is_target = target.words == other.words or target.clip == other.clip or (target.file == other.file and overlaps)
        fits = 0 < other.num_tokens <= limit - num_tokens
        return i != j and speaker is not None and speaker == of_other and target.takes and fits and not is_target

    options = DataOptions(reference="random", max_seq_len=limit)
    references = References(index, rows, pool, options, seed)
    epochs = [references.in_epoch(epoch) for epoch in range(70)]
    in_order = References(index, rows, pool, options, seed)
    longest = references.longest
    for number, i in enumerate(rows.tolist()):
        allowed = {j for j in pool.tolist() if may_be(i, j)}
        chosen = [int(epoch.rows[number]) for epoch in epochs]
        assert set(chosen) == (allowed or {-1})
        added = max((drawn[j][1].num_tokens for j in allowed), default=0)
        assert drawn[i][2] + added <= longest[number] <= limit
        lengths = [drawn[i][2] + (drawn[j][1].num_tokens if j >= 0 else 0) for j in chosen]
        assert [epoch.lengths[number] for epoch in epochs] == lengths
    # Neither the order in which epochs are asked for nor what was asked before matters.
    assert all((in_order.in_epoch(epoch).rows == epochs[epoch].rows).all() for epoch in (50, 3, 0))
    other = References(index, rows, pool, options, seed + 1)
    assert any((other.in_epoch(epoch).rows != epochs[epoch].rows).any() for epoch in range(3))


def test_share_that_is_left_out(tmp_path: Path) -> None:
    """Near P of the samples with a reference in every epoch, independently of each other epoch and seed."""
    count, share = 20000, 0.3
    drawn = ((None, Candidate(0, 0, 0, 0, 0, 0, False), 100, 60 * (i % 2)) for i in range(count))
    index, rows = index_of(tmp_path / "index", drawn), np.arange(count)
    options = DataOptions(reference_dropout=share)
    one, other = (References(index, rows, rows, options, seed) for seed in (-7, 8))
    drops = [one.in_epoch(epoch).left_out for epoch in range(6)] + [other.in_epoch(0).left_out]
    assert not any(drop[::2].any() for drop in drops)  # they have no reference
    assert (one.in_epoch(0).lengths == np.where(drops[0], 60, 100)).all()
    half = count // 2
    deviation = np.sqrt(share * (1 - share) / half)
    assert all(abs(drop.sum() / half - share) < 4 * deviation for drop in drops)
    for a, b in itertools.combinations(drops, 2):
        assert abs((a & b).sum() / half - share**2) < 4 * np.sqrt(share**2 * (1 - share**2) / half)
    assert not one.in_epoch(None).left_out.any()
    neighbours = drops[0][1:-2:2] & drops[0][3::2]  # samples, too, are independent of each other
    assert abs(neighbours.sum() / half - share**2) < 4 * np.sqrt(share**2 * (1 - share**2) / half)
