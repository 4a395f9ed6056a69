"""Samples that may be bad are listed, and good ones are not; the list is the same after a restart and on any ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import VOICES, speech_sample, write_manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common.errors import InputError
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.data import repeats, survey
from higgs_ds.data.audio import read_audio
from higgs_ds.data.flags import Flagged, find_flags
from higgs_ds.data.index import Index
from higgs_ds.data.preparation import Preparation, _open_part
from higgs_ds.data.survey import Checker, Share
from higgs_ds.model.sample import AudioClip
from higgs_ds.options.commands import PrepareOptions
from higgs_ds.options.flags import FlagOptions, check_flag_options
from higgs_ds.options.train import DataOptions, ModelOptions, TrainOptions
from higgs_ds.training.loading import _write_run_files
from higgs_ds.training.prepare import main
from higgs_ds.training.startup import _check_and_encode

pytestmark = pytest.mark.usefixtures("lone_rank")
RATE = 24000
NUM_GOOD = 200
WORDS = "before river window seven garden kettle letter summer orange music harbour little yellow people silver".split()
Fault = Callable[[np.ndarray, str], tuple[np.ndarray, dict[str, Any]]]


@pytest.fixture(scope="module")
def bundle(base: Path) -> Bundle:
    return open_bundle(str(base), None, None, base.parent)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def narrow(sound: np.ndarray) -> np.ndarray:
    """Return what remains of a sound that was recorded at 8 kHz, at 48 kHz."""
    from torchaudio.functional import resample

    return resample(resample(torch.from_numpy(sound), RATE, 8000), 8000, 2 * RATE).numpy()


# What makes a clip and its text bad: the sound, and what else of the sample is changed.
FAULTS: dict[str, Fault] = {
    "silence at the start": lambda x, text: (np.concatenate([silence(4.1), x]), {}),
    "silence at the end": lambda x, text: (np.concatenate([x, silence(4.1)]), {}),
    "pause": lambda x, text: (np.concatenate([x[: RATE // 2], silence(2.5), x[RATE // 2 :]]), {}),
    "too quiet": lambda x, text: (0.05 * x, {}),
    "clipping": lambda x, text: (np.clip(6 * x, -1, 1), {}),
    "DC offset": lambda x, text: (x + 0.03, {}),
    "bandwidth": lambda x, text: (narrow(x), {"rate": 2 * RATE}),
    "characters per second": lambda x, text: (x, {"text": " ".join(f"{text} {n}" for n in range(40))}),
    "level unlike the others": lambda x, text: (0.2 * x, {}),
    "same audio, other text": lambda x, text: (x, {"text": f"Other words. {text[::-1]}"}),  # see `corpus`
    "like text, other audio": lambda x, text: (0.9 * x, {"text": text.upper().replace(".", "?!")}),
    "script": lambda x, text: (x, {"language": "ru-RU"}),
}


def good_clip(number: int, voices: list[tuple[str, np.ndarray]]) -> tuple[str, np.ndarray, str]:
    """Return speaker, sound and text of a clip that differs from all others."""
    draw = np.random.default_rng(number)
    speaker, sound = voices[number % len(voices)]
    sound = draw.uniform(0.7, 1.0) * sound + 1e-4 * draw.standard_normal(len(sound))
    text = " ".join(draw.permutation(WORDS))[: round(13 * len(sound) / RATE)]
    return speaker, sound.astype(np.float32), f"{text} {number}."


def corpus(folder: Path, num_good: int) -> tuple[Path, dict[str, str]]:
    """Write good clips of three speakers and, among them, one for each fault. Return their manifest and the bad lines.

    The last two texts and sounds are made from those of the first good clips.
    """
    voices = [(path.stem[:-3], read_audio(AudioClip(path), RATE).numpy()) for path in sorted(VOICES.iterdir())]
    entries, bad = [], {}
    kinds = [*[None] * (num_good // 2), *FAULTS, *[None] * (num_good - num_good // 2)]
    for i, kind in enumerate(kinds):
        of_other = {"same audio, other text": 3, "like text, other audio": 4}.get(kind or "", i)
        speaker, sound, text = good_clip(of_other, voices)
        changed: dict[str, Any] = {}
        if kind is not None:
            sound, changed = FAULTS[kind](sound, text)
            bad[kind] = f"m.jsonl:{i + 1}"
        path = folder / f"{i}.wav"
        soundfile.write(path, sound, changed.get("rate", RATE))
        misc = {"speaker": speaker, "misc": {"language": changed.get("language", "en")}}
        entries.append(speech_sample(changed.get("text", text), str(path)) | misc)
    return write_manifest(folder / "m.jsonl", entries), bad


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("corpus"), 12)[0]


def lines_of(flagged: Flagged) -> list[list[str]]:
    """Return source, kind, figure and remark of everything that is flagged."""
    return [line.split("\t") for line in flagged.list_lines()]


def flagged_in(index: Index, **options: Any) -> list[list[str]]:
    return lines_of(find_flags(index, FlagOptions(**options), None, RATE))


def indexed(bundle: Bundle, manifest: Path, folder: Path, num_shares: int = 1) -> Index:
    """Check a manifest as ranks do, in shares."""
    for i in range(num_shares):
        checker = Checker(DataOptions(), bundle.coder(folder))
        with _open_part(folder, i) as (keep, report_invalid):
            result, _ = survey.survey(manifest, checker, Share(i, num_shares), 2, keep, report_invalid)
        assert result.problems == []
    return Index(folder)


def test_each_fault_is_listed_and_no_good_clip(bundle: Bundle, tmp_path: Path) -> None:
    manifest, bad = corpus(tmp_path, NUM_GOOD)
    found: dict[str, list[str]] = {}
    for source, kind, _, _ in flagged_in(indexed(bundle, manifest, tmp_path)):
        found.setdefault(kind, []).append(Path(source).name)
    assert found.keys() == bad.keys()
    for kind, line in bad.items():
        assert line in found[kind], kind
    assert {line for lines in found.values() for line in lines} == {*bad.values()}
    # A very quiet or clipped clip has another level as well; all others are listed once.
    assert sum(map(len, found.values())) <= len(bad) + 2


def test_any_number_of_ranks_lists_the_same(bundle: Bundle, small_corpus: Path, tmp_path: Path) -> None:
    lists = []
    for num_shares in (1, 3):
        folder = tmp_path / str(num_shares)
        folder.mkdir()
        lists.append(flagged_in(indexed(bundle, small_corpus, folder, num_shares)))
    assert len(lists[0]) >= len(FAULTS)
    assert lists[0] == lists[1]


def test_limits_that_flag_nothing(bundle: Bundle, small_corpus: Path, tmp_path: Path) -> None:
    inf = float("inf")
    off = {
        "flag_end_silence_s": inf, "flag_pause_s": inf, "flag_rate_ratio": inf, "flag_level_dbfs": -inf,
        "flag_level_difference_db": inf, "flag_clipping": inf, "flag_dc_offset": inf, "flag_bandwidth": 0.0,
        "flag_similarity": inf, "flag_script_share": 0.0,
    }  # fmt: skip
    assert check_flag_options(FlagOptions(**off)) == []
    left = flagged_in(indexed(bundle, small_corpus, tmp_path), **off)
    assert {kind for _, kind, _, _ in left} == {"same audio, other text"}  # never right
    assert len(check_flag_options(FlagOptions(flag_pause_s=-1, flag_bandwidth=float("nan"), flag_min_clips=0))) == 3


def test_command_prints_and_lists(
    base: Path, small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "flagged.tsv"
    options = DataOptions(train_manifest=(small_corpus,), cache_dir=tmp_path / "cache")
    model = ModelOptions(base_ckpt=str(base))
    main(options, model, PrepareOptions(check_only=True, flagged_list=target))
    printed = capsys.readouterr().out
    lines = target.read_text().splitlines()
    assert f"12 of 24 samples may be bad; none of them is left out; {target} lists all of them" in printed
    (at_end,) = [line.split("\t") for line in lines if "\tsilence at the end\t" in line]
    assert at_end[0] == f"{small_corpus}:8"
    assert 4.1 < float(at_end[2]) < 4.8
    assert f"  silence at the end: 1 sample\n    {small_corpus}:8: {at_end[3]}\n" in printed
    assert f"{small_corpus}:9\tpause\t2.5\ta pause of 2.5 s" in lines
    for line in lines:
        assert line.split("\t")[1] in printed
    main(options, model, PrepareOptions(check_only=True, flagged_list=target), FlagOptions(flag_pause_s=3))
    assert len(target.read_text().splitlines()) == len(lines) - 1
    target.write_text("Something else.\n")
    with pytest.raises(InputError, match="exists, and is not a list of flagged samples"):
        main(options, model, PrepareOptions(check_only=True, flagged_list=target))


def test_run_prints_and_lists(
    base: Path, small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run prints and writes before its first step; also for validation samples."""
    options = TrainOptions().replace(
        train_manifest=(small_corpus,), val_manifest=(small_corpus,), base_ckpt=str(base), cache_dir=tmp_path / "cache",
        output_dir=tmp_path / "run", flag_pause_s=1.0,
    )  # fmt: skip
    inputs = _check_and_encode(options, set(), FolderLock())
    listed = tmp_path / "run" / "flagged_samples.tsv"
    assert f"12 of 24 samples may be bad; none of them is left out; all are listed in {listed}" in (
        capsys.readouterr().out
    )
    assert len(inputs.train) == 24
    _write_run_files(inputs, TrainerState(1, {}))
    lines = [line.split("\t") for line in listed.read_text().splitlines()]
    assert lines == 2 * flagged_in(open_newest(tmp_path / "cache"), flag_pause_s=1.0)


def open_newest(cache: Path) -> Index:
    return Index(max(path.parent for path in cache.glob("index/*/index.json")))


def test_restart_and_codes_of_earlier_versions(
    bundle: Bundle, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measurements are in the kept index, beside the codes of a new index, and made anew for codes without them."""

    def prepared() -> list[list[str]]:
        with Preparation(DataOptions(), bundle.coder(tmp_path), tmp_path) as preparation:
            checked = preparation.check(small_corpus)
            preparation.encode(checked, torch.device("cpu"))
            index = preparation.keep(checked)
            return lines_of(preparation.flagged(index, FlagOptions()))

    first = prepared()
    assert len(first) >= len(FAULTS)
    examined: list[AudioClip] = []
    real = survey.examine
    monkeypatch.setattr(survey, "examine", lambda clip, *args: examined.append(clip) or real(clip, *args))
    assert prepared() == first
    for kept in (tmp_path / "index").glob("*/index.json"):
        kept.unlink()
    assert prepared() == first
    assert examined == []
    for kept in (tmp_path / "index").glob("*/index.json"):
        kept.unlink()
    codes = sorted(tmp_path.glob("codes/*/*.safetensors"))
    for path in codes:
        with safe_open(path, "pt") as file:
            key = file.metadata()["key"]
        save_file(load_file(path), path, {"key": key, "clipped": "0.0"})
    times = [path.stat().st_mtime_ns for path in codes]
    assert prepared() == first
    assert len({clip.path for clip in examined}) == len(codes) + 1  # one clip has two files
    assert [path.stat().st_mtime_ns for path in codes] == times  # nothing is encoded again


def spoken(folder: Path, texts: list[str], speakers: list[str] | None = None) -> Path:
    """Write a manifest of texts that are said by different clips, at about the same level and rate."""
    draw = np.random.default_rng(1)
    entries = []
    for i, text in enumerate(texts):
        soundfile.write(folder / f"{i}.wav", 0.1 * draw.standard_normal(round(RATE * len(text) / 15)), RATE)
        entries.append(speech_sample(text, str(folder / f"{i}.wav")) | {"speaker": speakers[i] if speakers else "s"})
    return write_manifest(folder / "m.jsonl", entries)


LONG = "The old lighthouse keeper climbed the narrow stairs every evening to light the lamp for the passing ships"


@pytest.mark.parametrize(
    ("other", "is_like"),
    [
        (LONG.upper() + "!", True),
        (LONG.replace("narrow ", ""), True),
        (LONG.replace("keeper", "guard"), True),
        ("And " + LONG, True),
        (LONG + " again", True),
        (LONG.replace("evening to light the lamp", "morning to feed the gulls"), False),
        (LONG.replace("old lighthouse", "young captain"), False),
        (LONG + " and then went home to have his supper", False),
    ],
)
def test_like_texts(bundle: Bundle, tmp_path: Path, other: str, is_like: bool) -> None:
    found = flagged_in(indexed(bundle, spoken(tmp_path, [LONG, "Something else is said here.", other]), tmp_path))
    expected = [
        [
            f"{tmp_path}/m.jsonl:3",
            "like text, other audio",
            "1",
            f"the same or nearly the same text as {tmp_path}/m.jsonl:1",
        ]
    ]
    assert [[*line[:3], line[3].split(",")[0]] for line in found] == (expected if is_like else [])


def test_texts_that_may_be_said_twice(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short ones, and those of other speakers. Pairs beyond a limit are counted."""
    manifest = spoken(tmp_path, ["Yes, of course.", "Yes, of course!", LONG, LONG], ["a", "a", "a", "b"])
    assert flagged_in(indexed(bundle, manifest, tmp_path)) == []
    monkeypatch.setattr(repeats, "MAX_COMPARED", 1)
    manifest = spoken(tmp_path, [LONG, LONG + "es", LONG + "es now"])
    flagged = find_flags(indexed(bundle, manifest, tmp_path), FlagOptions(), None, RATE)
    assert [line[0] for line in lines_of(flagged)] == [f"{manifest}:2"]
    assert flagged.describe()[-1] == "not compared: 1 more pairs of texts that start or end alike"


def test_medians_of_languages_and_speakers(bundle: Bundle, tmp_path: Path) -> None:
    """A language written in fewer characters, and a slow speaker, are compared with their own kind."""
    texts = [f"{i} {LONG[: 30 + i]}" for i in range(12)] + [LONG[i : 40 + i] for i in range(12)]
    draw = np.random.default_rng(2)
    entries = []
    for i, text in enumerate(texts):
        slow = i >= 12
        seconds = len(text) / 15 * (4 if slow else 1) / (4 if i == 20 else 1)
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * draw.standard_normal(round(RATE * seconds)), RATE)
        labels = {"speaker": f"s{i % 6}", "misc": {"language": "xx-YY" if slow else "en"}}
        entries.append(speech_sample(text, str(tmp_path / f"{i}.wav")) | labels)
    index = indexed(bundle, write_manifest(tmp_path / "m.jsonl", entries), tmp_path)
    (found,) = flagged_in(index, flag_similarity=float("inf"))
    assert found[:2] == [f"{tmp_path}/m.jsonl:21", "characters per second"]
    assert "the median of the language is" in found[3]
    assert flagged_in(index, flag_similarity=float("inf"), flag_min_clips=13) == []


def test_few_clips_have_no_median(bundle: Bundle, tmp_path: Path) -> None:
    entries = []
    for i, (text, seconds) in enumerate([(LONG, 7), ("word " * 600, 2.9), ("Word.", 20), ("Oh!", 1.5)]):
        soundfile.write(
            tmp_path / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(round(RATE * seconds)), RATE
        )
        entries.append(speech_sample(text, str(tmp_path / f"{i}.wav")))
    index = indexed(bundle, write_manifest(tmp_path / "m.jsonl", entries), tmp_path)
    found = flagged_in(index)
    assert [line[0] for line in found] == [f"{tmp_path}/m.jsonl:2", f"{tmp_path}/m.jsonl:3"]
    assert found[0][3] == "2400 characters in 2.9 s: 827.6 per second; speech has 1 to 40"
    assert flagged_in(index, flag_rate_ratio=float("inf")) == []
