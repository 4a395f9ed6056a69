"""Manifests are checked once and clips encoded once: what is kept, what is reused, what is refused."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICES, speech_sample, write_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.common.errors import InputError, MoreProblems
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.data import encode, preparation, survey
from higgs_ds.data.audio import read_audio
from higgs_ds.data.code_cache import CachedCodes, CodeCache
from higgs_ds.data.codec import Codec
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.index import Index
from higgs_ds.data.index_writer import CheckedSample
from higgs_ds.data.problem_list import shown_problems
from higgs_ds.data.quality import ClipQuality, decoded
from higgs_ds.data.reference_index import REFERENCES
from higgs_ds.data.survey import Share
from higgs_ds.model.sample import AudioClip
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.commands import PrepareOptions
from higgs_ds.options.train import DataOptions, ModelOptions, TrainOptions
from higgs_ds.training.prepare import main
from higgs_ds.training.startup import _check_and_encode

pytestmark = pytest.mark.usefixtures("lone_rank")
RATE = 24000


@pytest.fixture(scope="module")
def bundle(base: Path) -> Bundle:
    return open_bundle(str(base), None, None, base.parent)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    clips = ["anna_00.flac", "ben_00.flac", "carla_00.flac", "anna_00.flac"]
    return write_manifest(tmp_path / "m.jsonl", [speech_sample(f"Clip {i}.", clip) for i, clip in enumerate(clips)])


def prepared(bundle: Bundle, path: Path, cache: Path, shard: Share = preparation.WHOLE, **options: Any) -> Index:
    with preparation.Preparation(DataOptions(**options), bundle.coder(cache), cache, shard) as started:
        checked = started.check(path)
        assert checked.problems == []
        started.encode(checked, torch.device("cpu"))
        return started.keep(checked)


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def codes_below(cache: Path) -> dict[str, list[list[int]]]:
    return {path.name: load_file(path)["codes"].tolist() for path in files_below(cache / "codes")}


def test_codes_and_texts_come_back(bundle: Bundle, manifest: Path, tmp_path: Path) -> None:
    index = prepared(bundle, manifest, tmp_path / "cache")
    assert len(index) == 4
    dataset = Dataset(index, np.arange(4), bundle.coder(tmp_path / "cache"))
    codec = Codec(bundle.codec.folder, torch.device("cpu"))
    for i, clip in enumerate(["anna_00.flac", "ben_00.flac", "carla_00.flac", "anna_00.flac"]):
        sample, _ = index.sample(i)
        assert sample.source == f"{manifest}:{i + 1}"
        assert sample.messages[1].parts == (f"Clip {i}.",)
        encoded = dataset.encoded(i)
        assert encoded.codes[0].equal(codec.encode(read_audio(AudioClip(VOICES / clip), RATE)))
        assert len(encoded.prompt.input_ids) == dataset.lengths[i]
    assert len(files_below(tmp_path / "cache" / "codes")) == 3


def test_nothing_is_checked_twice(
    bundle: Bundle, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run reuses the index; after any change, everything is checked again."""
    voice = tmp_path / "voice.flac"
    shutil.copy(VOICES / "ben_01.flac", voice)
    write_manifest(manifest, [speech_sample("One.", "anna_00.flac"), speech_sample("Two.", str(voice))])
    cache = tmp_path / "cache"
    digest = prepared(bundle, manifest, cache).digests().tobytes()
    calls = []
    real = preparation.survey
    monkeypatch.setattr(preparation, "survey", lambda *args: calls.append(1) or real(*args))

    def surveyed(**options: Any) -> int:
        calls.clear()
        prepared(bundle, manifest, cache, **options)
        return len(calls)

    assert surveyed() == 0
    assert surveyed(reference="random", reference_dropout=0.5) == 0
    assert prepared(bundle, manifest, cache).digests().tobytes() == digest
    assert surveyed(normalize_text=True) == 1
    write_manifest(manifest, [speech_sample("One.", "anna_00.flac"), speech_sample("Two!", str(voice))])
    assert (surveyed(), surveyed()) == (1, 0)
    shutil.copy(VOICES / "ben_02.flac", voice)
    os.utime(voice, ns=(1, 1))
    assert (surveyed(), surveyed()) == (1, 0)
    for codes in files_below(cache / "codes"):  # including those of the first voice.flac, which are no longer used
        codes.write_bytes(codes.read_bytes()[:50])
    assert (surveyed(), surveyed()) == (1, 0)
    for codes in files_below(cache / "codes"):
        codes.unlink()
    assert (surveyed(), surveyed()) == (1, 0)


def test_change_of_a_transcript_outside_the_folder_is_detected(bundle: Bundle, tmp_path: Path) -> None:
    words = tmp_path / "elsewhere" / "words.txt"
    words.parent.mkdir()
    words.write_text("Some words.")
    folder = tmp_path / "data"
    folder.mkdir()
    sample = {"id": "a", "audio_file": str(VOICES / "anna_00.flac"), "transcript_file": str(words)}
    (folder / "metadata.json").write_text(json.dumps({"samples": [sample]}))
    prepared(bundle, folder, tmp_path / "cache")
    words.write_text("Other words, and more of them.")
    index = prepared(bundle, folder, tmp_path / "cache")
    assert index.sample(0)[0].messages[1].parts == ("Other words, and more of them.",)


def test_a_prepared_run_never_loads_the_codec(
    manifest: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainOptions().replace(
        train_manifest=(manifest,), base_ckpt=str(base), cache_dir=tmp_path / "cache", output_dir=tmp_path / "out"
    )
    main(options.data, options.model, PrepareOptions())
    again = (
        "import sys; from higgs_ds.cli import prepare; assert prepare(sys.argv[1:]) == 0; assert not "
        "{'torch', 'transformers'} & sys.modules.keys()"  # their import takes longer than anything else it does
    )
    arguments = ("--train_manifest", manifest, "--base_ckpt", base, "--cache_dir", tmp_path / "cache")
    subprocess.run([sys.executable, "-c", again, *arguments], check=True)
    monkeypatch.setattr(encode, "_load_codec", None)
    monkeypatch.setattr(survey, "examine", None)
    inputs = _check_and_encode(options, set(), FolderLock())
    batch = inputs.train.batch(range(len(inputs.train)))
    assert len(inputs.train) == 3
    assert batch.num_samples == 3


def audio_faults(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Samples with faults, and a part of the message for each."""
    sound = (0.3 * np.sin(np.arange(2 * RATE) / 20)).astype(np.float32)
    soundfile.write(folder / "short.wav", sound[:700], RATE)
    soundfile.write(folder / "empty.wav", sound[:0], RATE)
    soundfile.write(folder / "silent.wav", sound * 0, RATE)
    soundfile.write(folder / "nan.wav", np.where(np.arange(2 * RATE) == 7, np.nan, sound), RATE, subtype="FLOAT")
    soundfile.write(folder / "long.wav", np.tile(sound, 6), RATE)
    soundfile.write(folder / "good.wav", sound, RATE)
    (folder / "text.wav").write_text("not audio")
    (folder / "cut.flac").write_bytes((VOICES / "anna_00.flac").read_bytes()[:4000])

    def clip(name: str, **more: Any) -> dict[str, Any]:
        audio = {"type": "audio", "audio_url": name, **more}
        return {"messages": [{"role": "user", "content": "Words."}, {"role": "assistant", "content": audio}]}

    return [
        (clip("none.wav"), "none.wav: no such file"),
        (clip("."), f"{folder}: is not a file"),
        (clip("short.wav"), "short.wav: lasts 0.029 s, shorter than one frame of the codec (0.040 s)"),
        (clip("empty.wav"), "empty.wav: contains no samples"),
        (clip("silent.wav"), "silent.wav: is silent: every sample of it is zero"),
        (clip("nan.wav"), "nan.wav: contains NaN or infinite samples"),
        (clip("long.wav"), "long.wav: lasts 12.0 s, longer than --max_clip_s 10; cut it with offset and duration"),
        (clip("text.wav"), "text.wav: cannot be read as audio: Format not recognised."),
        (clip("cut.flac"), "cut.flac: cannot be read as audio: "),
        (clip("good.wav", offset=5), "good.wav: contains no samples after 5 s"),
        (
            clip("good.wav", offset=1, duration=3),
            "good.wav: ends at 2.00 s, before the end of the clip (offset 1 s, duration 3 s)",
        ),
        (clip("", raw_audio="bm8gYXVkaW8="), "audio: cannot be read as audio: "),
        (clip("", raw_audio="$$$"), "messages[1].content.raw_audio: '$$$' is not base64: "),
        (clip("https://a.b/c.wav"), "'https://a.b/c.wav' is a URL, not a local file; download it"),
        (clip("good.wav", offset=-1), "messages[1].content.offset: must be a number of seconds, 0 or more, but is -1"),
        (
            clip("good.wav", duration="2 s"),
            "messages[1].content.duration: must be a number of seconds, 0 or more, but is '2 s'",
        ),
        (clip("good.wav") | {"start_index": 9}, "start_index: must be the index of a message, from 0 to 1, but is 9"),
        (clip("good.wav") | {"start_indx": 0}, "start_indx: is not a known key; did you mean 'start_index'?"),
        (clip("good.wav") | {"speaker": 7}, "speaker: must be a string, but is a number"),
        (speech_sample(" ", "anna_00.flac"), "messages[1].content: is empty or blank"),
        (speech_sample("<|AUDIO|>", "anna_00.flac"), "messages[1].content: contains <|AUDIO|>, which the prompt"),
        ({"messages": []}, "messages: must be a list of one or more messages, but is empty"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "messages[0].role: 'bot' is not a role; allowed: system, "),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages: no target audio: "),
    ]


@pytest.mark.parametrize("half", [0, 1])
def test_every_fault_in_one_run_and_nothing_written(
    tmp_path: Path, base: Path, half: int, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = audio_faults(tmp_path)[half::2]  # so that all are printed
    good = speech_sample("Good.", "anna_00.flac")
    path = write_manifest(tmp_path / "m.jsonl", [good, *(sample for sample, _ in faults), good])
    cache = tmp_path / "cache"
    options = DataOptions(train_manifest=(path,), cache_dir=cache, max_clip_s=10)
    before = files_below(tmp_path)
    with pytest.raises(InputError) as caught:
        main(options, ModelOptions(base_ckpt=str(base)), PrepareOptions())
    assert len(caught.value.problems) == len(faults)
    for line, (problem, (_, expected)) in enumerate(zip(caught.value.problems, faults, strict=True), start=2):
        assert problem.startswith(f"{path}:{line}: ")
        assert expected in problem
    assert files_below(tmp_path) == before

    bad_list = tmp_path / "bad.txt"
    main(dataclasses.replace(options, skip_bad=bad_list), ModelOptions(base_ckpt=str(base)), PrepareOptions())
    assert bad_list.read_text().splitlines() == [" ".join(p.splitlines()) for p in caught.value.problems]
    printed = capsys.readouterr().out
    assert f"skipped {len(faults)} bad samples of {path}, listed in {bad_list}" in printed
    assert "samples: 2" in printed
    assert len(files_below(cache / "codes")) == 1


@pytest.mark.parametrize("num_bad", [20, 21, 3000])
def test_many_bad_samples_are_counted_and_listed(tmp_path: Path, base: Path, num_bad: int) -> None:
    """Of two manifests: 20 lines, the number of all, and a file with all of them in their order."""
    paths = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    bad = [speech_sample(f"Bad {i}.", f"none_{i}.flac") for i in range(num_bad)]
    write_manifest(paths[0], [speech_sample("Good.", "anna_00.flac"), *bad[: num_bad - 3]])
    write_manifest(paths[1], bad[num_bad - 3 :])
    cache = tmp_path / "cache"
    options = DataOptions(train_manifest=tuple(paths), cache_dir=cache)
    with pytest.raises(InputError) as caught:
        main(options, ModelOptions(base_ckpt=str(base)), PrepareOptions())
    expected = [f"{paths[0]}:{i + 2}: " for i in range(num_bad - 3)] + [f"{paths[1]}:{i + 1}: " for i in range(3)]
    shown, lists = str(caught.value).splitlines(), list((cache / "invalid").glob("*"))
    assert shown[0] == f"{num_bad:,} problems:"
    assert all(line.startswith(f"  {source}") for line, source in zip(shown[1:21], expected, strict=False))
    if num_bad == 20:
        assert (len(shown), lists) == (21, [])
        return
    (of_all,) = lists
    more = "1 more problem" if num_bad == 21 else "2,980 more problems"
    assert shown[21:] == [
        f"  and {more}: {num_bad:,} in {num_bad:,} samples, all of which are listed in {of_all}; --skip_bad LIST_FILE "
        "leaves these samples out"
    ]
    listed = of_all.read_text().splitlines()
    assert len(listed) == num_bad
    assert all(line.startswith(source) for line, source in zip(listed, expected, strict=True))
    assert [f"  {line}" for line in listed[:20]] == shown[1:21]


def test_the_list_of_a_training_is_in_its_folder(tmp_path: Path, base: Path, manifest: Path) -> None:
    """It is removed when a run starts; a folder that another run has is not touched."""
    bad = write_manifest(tmp_path / "bad.jsonl", [speech_sample("Bad.", f"none_{i}.flac") for i in range(30)])
    line = ["--base_ckpt", str(base), "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")]
    argv = [*line, "--train_manifest", str(bad), "--deepspeed", "zero2.json", "--precision", "fp32"]
    with FolderLock() as lock, pytest.raises(InputError, match=rf"listed in {tmp_path}/run/invalid_samples.txt"):
        _check_and_encode(*parse_train_options(argv), lock)
    assert len((tmp_path / "run" / "invalid_samples.txt").read_text().splitlines()) == 30
    (tmp_path / "run" / "invalid_samples.txt").unlink()
    (tmp_path / "run" / "checkpoint-3").mkdir()
    with FolderLock() as lock, pytest.raises(InputError, match=r"contains checkpoint-3") as caught:
        _check_and_encode(*parse_train_options(argv), lock)
    assert f"{tmp_path}/cache/invalid/" in str(caught.value)
    assert not (tmp_path / "run" / "invalid_samples.txt").exists()


def test_a_line_that_stands_for_problems_of_all_ranks() -> None:
    problems = ["one", copy.copy(MoreProblems("and 2 more", 2))]  # as pickle copies it
    assert str(InputError(problems)) == "3 problems:\n  one\n  and 2 more"


def test_fault_of_a_paired_file_names_it_once(tmp_path: Path, base: Path) -> None:
    """In a folder of recordings, the audio file itself is the source of the fault."""
    folder = tmp_path / "voices"
    folder.mkdir()
    shutil.copy(VOICES / "anna_00.flac", folder / "good.flac")
    (folder / "good.txt").write_text("Good.")
    (folder / "bad.wav").write_text("not audio")
    (folder / "bad.txt").write_text("Bad.")
    options = DataOptions(train_manifest=(folder,), cache_dir=tmp_path / "cache", format="paired")
    with pytest.raises(InputError) as caught:
        main(options, ModelOptions(base_ckpt=str(base)), PrepareOptions())
    (problem,) = caught.value.problems
    assert problem == f"{folder}/bad.wav: cannot be read as audio: Format not recognised."
    assert problem.count("bad.wav") == 1


def test_check_only_writes_nothing(manifest: Path, base: Path, tmp_path: Path) -> None:
    before = files_below(tmp_path)
    options = DataOptions(train_manifest=(manifest,), cache_dir=tmp_path / "cache")
    main(options, ModelOptions(base_ckpt=str(base)), PrepareOptions(check_only=True))
    assert files_below(tmp_path) == before


def test_all_bad_is_an_error(tmp_path: Path, base: Path) -> None:
    path = write_manifest(tmp_path / "m.jsonl", [speech_sample("Words.", "none.flac")])
    options = DataOptions(train_manifest=(path,), cache_dir=tmp_path / "cache", skip_bad=tmp_path / "bad.txt")
    with pytest.raises(InputError, match=r"every sample is bad, see .*bad\.txt"):
        main(options, ModelOptions(base_ckpt=str(base)), PrepareOptions())


def test_shards_fill_one_cache(bundle: Bundle, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    for i in range(3):
        prepared(bundle, manifest, cache, Share(i, 3))
    undivided = prepared(bundle, manifest, tmp_path / "other cache")
    monkeypatch.setattr(encode, "_load_codec", None)
    monkeypatch.setattr(survey, "examine", None)
    assert prepared(bundle, manifest, cache).digests().tobytes() == undivided.digests().tobytes()


def test_order_does_not_depend_on_the_parts(bundle: Bundle, manifest: Path, tmp_path: Path) -> None:
    """An index of three ranks has the same rows as an index of one rank."""
    write_manifest(manifest, [speech_sample(f"{i}", "anna_00.flac") | {"speaker": f"s{i % 3}"} for i in range(10)])
    checker = survey.Checker(DataOptions(), bundle.coder(tmp_path / "cache"))
    indexes = []
    for count in (1, 3):
        folder = tmp_path / f"{count} parts"
        folder.mkdir()
        for i in range(count):
            with preparation._open_part(folder, i) as (keep, report_invalid):
                survey.survey(manifest, checker, Share(i, count), 2, keep, report_invalid)
        indexes.append(Index(folder))
    one, three = indexes
    assert [one.sample(i) for i in range(10)] == [three.sample(i) for i in range(10)]
    assert one.num_tokens.tolist() == three.num_tokens.tolist()
    assert one.labels("speaker")[0].tolist() == three.labels("speaker")[0].tolist() == [i % 3 for i in range(10)]


def rows_of(index: Index) -> list[Any]:
    numbers, speakers = index.labels("speaker")
    digests = [digest.tobytes() for digest in index.digests()]
    samples = [(index.sample(i), index.sample(i, without_reference=True)) for i in range(len(index))]
    return [samples, index.num_tokens.tolist(), numbers.tolist(), speakers, digests]


def test_processes_find_the_same_as_threads(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems, rows and missing clips, all in manifest order."""
    monkeypatch.setattr(preparation, "may_fork", lambda: True)  # this process has a process group
    good = [speech_sample(f"Clip {i}.", f"{name}_0{i % 3}.flac") for i in range(9) for name in ("anna", "ben")]
    entries = [sample | {"speaker": f"s{i % 4}"} for i, sample in enumerate(good)]
    path = write_manifest(tmp_path / "m.jsonl", [*entries[:5], *(s for s, _ in audio_faults(tmp_path)), *entries[5:]])
    found = []
    for limit in (preparation.WORTH_BYTES, 0):
        monkeypatch.setattr(preparation, "WORTH_BYTES", limit)
        bad = tmp_path / f"{limit}.txt"
        options = DataOptions(skip_bad=bad, num_workers=3, max_clip_s=10)
        coder = bundle.coder(tmp_path / "cache")
        with preparation.Preparation(options, coder, tmp_path / "cache") as started:
            checked = started.check(path)
            assert checked.index is not None
            problems = shown_problems([checked.findings], tmp_path / "all.txt")
            missing = sorted(checked.missing.keys), round(checked.missing.seconds, 6)
            clips = [clip.key for clip in survey.missing_clips(path, started.checker, checked.missing)]
            rows = rows_of(checked.index)
            found.append((problems, missing, clips, rows, bad.read_text(), started.describe(checked)))
            assert len(checked.findings) == (3 if limit == 0 else 1)
    assert found[0] == found[1]
    assert len(found[0][0]) == survey.MAX_SHOWN + 1
    assert f": {len(audio_faults(tmp_path))} in " in found[0][0][-1]


def test_columns_of_references_are_added_to_a_kept_index(bundle: Bundle, manifest: Path, tmp_path: Path) -> None:
    """A run that draws references opens the index that one without them has kept, and has what a new index gets."""
    prepared(bundle, manifest, tmp_path / "cache")
    before = {path.parent for path in files_below(tmp_path / "cache" / "index")}
    later = prepared(bundle, manifest, tmp_path / "cache", reference="random")
    assert {path.parent for path in files_below(tmp_path / "cache" / "index")} == before == {later.folder}
    new = prepared(bundle, manifest, tmp_path / "other", reference="random")
    for name in REFERENCES.names:
        assert later.reference_column(name).tolist() == new.reference_column(name).tolist()
    assert (later.reference_column("pair_tokens") > 0).all()


def test_an_index_that_vanishes_while_old_ones_are_looked_for(bundle: Bundle, manifest: Path, tmp_path: Path) -> None:
    """Another process renames its own when it has finished. A link to nothing is listed and then not found as well."""
    (tmp_path / "cache" / "index").mkdir(parents=True)
    (tmp_path / "cache" / "index" / "finished.tmp").symlink_to("nothing")
    assert len(prepared(bundle, manifest, tmp_path / "cache")) > 0


@pytest.mark.parametrize("cut", [0, 4, 30, -1])
def test_facts_of_codes_are_those_of_their_file(tmp_path: Path, cut: int) -> None:
    cache, key = CodeCache(tmp_path, "codec"), "ab" * 32
    assert cache.facts(key, 8) is None
    measured = ClipQuality(7, 1.24, 0.25, 0.5, 0.125, -20.0, 0.0, 0.25, 8000, 16000, 40)
    cache.store(key, CachedCodes(torch.zeros(8, 31), measured))
    assert cache.facts(key, 8) == (31, cache.load(key, 8).quality) == (31, decoded(measured.encoded()))
    assert cache.facts(key, 4) is None
    content = cache.path(key).read_bytes()
    cache.path("cd" * 32).parent.mkdir()
    cache.path("cd" * 32).write_bytes(content)
    assert cache.facts("cd" * 32, 8) is cache.load("cd" * 32, 8) is None
    cache.path(key).write_bytes(content[:cut])
    assert cache.facts(key, 8) is cache.load(key, 8) is None


@pytest.mark.slow
def test_worker_processes_give_the_same_codes(
    bundle: Bundle, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(bundle, manifest, tmp_path / "alone", num_workers=1)
    monkeypatch.setattr(encode, "WORTH_A_WORKER_S", 0.1)
    prepared(bundle, manifest, tmp_path / "workers", num_workers=2)
    alone, workers = (codes_below(tmp_path / name) for name in ("alone", "workers"))
    assert len(alone) == 3
    assert alone == workers


def test_batches_hold_clips_of_similar_length() -> None:
    def batches(*num_samples: int) -> list[list[int]]:
        window = [survey.ClipToEncode(AudioClip(Path(f"{i}")), "", n, None) for i, n in enumerate(num_samples)]
        return [[clip.num_samples for clip in batch] for batch in encode._batches(window, RATE)]

    assert batches(RATE, 9, RATE, 9, 7) == [[7, 9, 9, RATE, RATE]]
    assert batches(*[50 * RATE] * 5) == [[50 * RATE] * 2, [50 * RATE] * 2, [50 * RATE]]
    assert batches(70 * RATE, RATE, 50 * RATE, 200 * RATE) == [[RATE, 50 * RATE], [70 * RATE], [200 * RATE]]


def test_batched_encoding_gives_the_same_codes(bundle: Bundle, tmp_path: Path) -> None:
    """The GPU's code path, run on the CPU: clips of several lengths together, read by threads."""
    names = ("anna_00", "ben_00", "carla_00", "ben_01")
    clips = [AudioClip(VOICES / f"{name}.flac", 0.1, 0.5 + 0.17 * i) for i, name in enumerate(names)]
    cache, codec = bundle.coder(tmp_path).cache, Codec(bundle.codec.folder, torch.device("cpu"))
    todo = [survey.ClipToEncode(clip, cache.key(clip), round(clip.duration_s * RATE), None) for clip in clips]
    with encode.tqdm(disable=True) as bar:
        encode._encode_batched(todo, encode.CodeStore(cache), codec, 2, bar)
    for clip in todo:
        stored = cache.load(clip.key, 8)
        assert stored is not None
        assert stored.codes.long().equal(codec.encode(read_audio(clip.clip, RATE)))


def test_missing_codes_are_reported_and_computed_again(bundle: Bundle, manifest: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    index = prepared(bundle, manifest, cache)
    dataset = Dataset(index, np.arange(4), bundle.coder(cache))
    (path,) = [p for p in files_below(cache / "codes") if p.stem == index.sample(1)[1][0].key]
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(InputError, match=r"m\.jsonl:2: the codes of its audio in .* are missing or damaged"):
        dataset.encoded(1)
    prepared(bundle, manifest, cache)
    assert dataset.encoded(1).codes[0].tolist() == codes_below(cache)[path.name]


def test_split_and_lengths(bundle: Bundle, base: Path, manifest: Path, tmp_path: Path) -> None:
    entries = [speech_sample(f"{i}" * (i + 1), "anna_00.flac") | {"speaker": f"s{i % 4}"} for i in range(20)]
    write_manifest(manifest, entries)
    options = TrainOptions().replace(
        train_manifest=(manifest,), base_ckpt=str(base), cache_dir=tmp_path / "cache", output_dir=tmp_path / "out"
    )
    inputs = _check_and_encode(options.replace(split_by="speaker", val_split=0.25), set(), FolderLock())
    speakers = [{d.index.sample(int(row))[0].speaker for row in d.rows} for d in (inputs.train, inputs.val)]
    assert len(inputs.val) == 5
    assert speakers[0].isdisjoint(speakers[1])

    limit = sorted(inputs.train.index.num_tokens)[14]
    inputs = _check_and_encode(options.replace(max_seq_len=int(limit)), set(), FolderLock())
    assert len(inputs.train) + len(inputs.val) == 15
    assert max(inputs.train.lengths) <= limit
    assert inputs.too_long == [f"{manifest}:{i + 1}: {inputs.train.index.num_tokens[i]} tokens" for i in range(15, 20)]

    with pytest.raises(InputError, match=r"--max_tokens_per_batch 50: the longest sample has \d+ tokens"):
        _check_and_encode(options.replace(max_tokens_per_batch=50), set(), FolderLock())
    with pytest.raises(InputError, match="every sample is longer"):
        _check_and_encode(options.replace(max_seq_len=10), set(), FolderLock())
    write_manifest(manifest, [speech_sample("Words.", "anna_00.flac")] * 2)
    with pytest.raises(InputError, match="--split_by speaker: 2 samples name no speaker"):
        _check_and_encode(options.replace(split_by="speaker"), set(), FolderLock())


def test_problems_of_a_bad_base_and_bad_samples_together(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.jsonl", [speech_sample("Words.", "none.flac")])
    options = TrainOptions().replace(
        train_manifest=(path,), base_ckpt=str(tmp_path), cache_dir=tmp_path / "cache", output_dir=tmp_path / "out"
    )
    with pytest.raises(InputError) as caught:
        _check_and_encode(options, set(), FolderLock())
    assert any("is not a model folder" in problem for problem in caught.value.problems)
    assert any("none.flac: no such file" in problem for problem in caught.value.problems)


GOOD_AUDIO = (VOICES / "anna_00.flac").read_bytes()


@st.composite
def audio_parts(draw: st.DrawFn) -> dict[str, Any]:
    """An audio part whose name, offset, duration or bytes may be wrong."""
    part: dict[str, Any] = {"type": "audio"}
    if draw(st.booleans()):
        data = bytearray(GOOD_AUDIO)
        for at, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=8)):
            data[at] = value
        part["raw_audio"] = base64.b64encode(data[: draw(st.integers(0, len(data)))]).decode()
    else:
        names = ["anna_00.flac", "ben_00.flac", "a.raw", "x" * 300, ".", "/dev/null", "/proc/self/mem"]
        part["audio_url"] = draw(st.sampled_from(names) | st.text(max_size=8))
    numbers = st.floats(0, allow_infinity=False) | st.floats(0, 2) | st.none()
    return part | {"offset": draw(numbers), "duration": draw(numbers)}


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(audio_parts(), min_size=1, max_size=4))
def test_any_audio_is_used_or_reported(bundle: Bundle, tmp_path: Path, parts: list[dict[str, Any]]) -> None:
    (tmp_path / "a.raw").write_bytes(b"\0" * 100)
    entries = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": p}]} for p in parts]
    path = write_manifest(tmp_path / "m.jsonl", entries)
    good: list[int] = []
    bad: list[int] = []
    checker = survey.Checker(DataOptions(), bundle.coder(tmp_path))

    def keep(samples: list[CheckedSample]) -> None:
        good.extend(sample.number for sample in samples)

    survey.survey(path, checker, Share(), 2, keep, lambda number, _: bad.append(number))
    assert sorted({*good, *bad}) == list(range(len(parts)))
    assert not {*good} & {*bad}
