"""Recordings are compared with what the codec makes of them: known voices stay alike, unknown ones are warned of."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import PROJECT, VOICES_MANIFEST, speech_sample, text_sample, write_manifest

from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.common.errors import InputError
from higgs_ds.data.audio import read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.preparation import Preparation
from higgs_ds.model.sample import AudioClip
from higgs_ds.options.train import DataOptions, ModelOptions
from higgs_ds.speech.codec_check import check_codec
from higgs_ds.speech.measures import spectral_similarity

DIGITS = PROJECT / "samples" / "digits.jsonl"
Compare = Callable[..., str]


@pytest.fixture(scope="module")
def bundle(cache_dir: Path) -> Bundle:
    return open_bundle(None, None, None, cache_dir)


@pytest.fixture
def compare(bundle: Bundle, tmp_path: Path) -> Compare:
    """Return a function that checks manifests, compares some of their clips, and returns the lines of the summary."""

    def run(*manifests: Path, num_clips: int = 5, keep: bool = True, named: str | None = None, **options: Any) -> str:
        data = DataOptions(train_manifest=manifests, **options)
        with Preparation(data, bundle.coder(tmp_path), tmp_path) as preparation:
            checked = [preparation.check(path) for path in manifests]
            return check_codec(preparation, checked, ModelOptions(base_ckpt=named), num_clips, keep)

    return run


def kept_in(cache: Path) -> list[Path]:
    return sorted((cache / "codec_checks").glob("*"))


def test_voices_of_the_codec_stay_alike(compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    (low, high), (of_few, _) = (
        [float(x) for x in re.findall(r"0\.\d\d", compare(DIGITS, num_clips=count))[:2]] for count in (20, 3)
    )
    assert 0.95 < low <= of_few <= high <= 1
    assert capsys.readouterr().out == ""


def test_an_unknown_voice_is_warned_of(
    compare: Compare, bundle: Bundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each named clip has the similarity of that very clip, also where samples before it are left out as bad."""
    names = [f"{speaker}_0{number}.flac" for speaker in ("anna", "ben") for number in range(4)]
    entries = [text_sample("", ""), *(speech_sample(f"Good morning {name}.", name) for name in names)]
    manifest = write_manifest(tmp_path / "m.jsonl", entries)
    summary = compare(manifest, num_clips=4, skip_bad=tmp_path / "bad.txt")
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert "4 of 4 clips come back unlike themselves from the codec of speaking-base" in warning
    assert "give --base_ckpt bosonai/higgs-audio-v2-generation-3B-base" in warning
    assert "4 below 0.5: unlike" in summary
    found = re.findall(rf"{manifest}:(\d+) (-?0\.\d\d)", warning)
    assert len({line for line, _ in found}) == 4
    codec = Codec(bundle.codec.folder, torch.device("cpu"))
    for line, similarity in found:
        clip = entries[int(line) - 1]["messages"][-1]["content"]["audio_url"]
        recording = read_audio(AudioClip(Path(clip)), codec.sample_rate)
        decoded = codec.decode(codec.encode(recording))
        assert float(similarity) == pytest.approx(spectral_similarity(decoded, recording, codec.sample_rate), abs=0.006)


def test_words_are_counted_where_the_recognizer_knows_them(
    compare: Compare, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("pocketsphinx")
    said = "The kettle is on would you like some tea"
    for text, counted in ((said, True), (f"{said} xqzzy", False)):
        manifest = write_manifest(tmp_path / "m.jsonl", [speech_sample(text, "anna_01.flac")])
        compare(manifest)
        rates = re.findall(r"pocketsphinx gets (\d+) % wrong as recorded, (\d+) %", capsys.readouterr().out)
        assert len(rates) == counted
        assert all(int(before) < int(after) for before, after in rates)


def test_the_middle_of_long_clips(compare: Compare, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A clip of a known voice with an unknown one before and after it: only the middle is compared."""
    (tmp_path / "clips").mkdir()
    samples = PROJECT / "samples"
    unknown, known = (
        np.concatenate([soundfile.read(samples / f"{name}_0{number}.flac")[0] for number in range(1, 5)])
        for name in ("voices/anna", "digits/finn")
    )
    assert len(unknown) > 6 * 24000 < len(known)
    for name, parts in (("a", [unknown, known, unknown]), ("b", [known, unknown, known])):
        soundfile.write(tmp_path / "clips" / f"{name}.wav", np.concatenate(parts), 24000)
        (tmp_path / "clips" / f"{name}.txt").write_text("One two three.")
    assert "2 compared" in compare(tmp_path / "clips")
    assert re.findall(r"clips/(\w).wav -?0\.\d", capsys.readouterr().out) == ["b"]


def test_clips_of_all_manifests(compare: Compare, tmp_path: Path) -> None:
    """They share the number; each has one at least. References, texts and short clips are not compared."""
    text = write_manifest(tmp_path / "text.jsonl", [text_sample("Question?", "Answer.")])
    entries = [speech_sample("Go.", "anna_00.flac", duration=0.3), speech_sample("Good.", "ben_00.flac")]
    short = write_manifest(tmp_path / "short.jsonl", entries)
    summary = compare(DIGITS, text, short, num_clips=5, allow_text_targets=True).splitlines()
    assert summary[0] == "clips and what the codec makes of them:"
    found = [line.removeprefix(f"  {path}: ") for path, line in zip((DIGITS, text, short), summary[1:], strict=True)]
    assert found[0].startswith("2 compared")
    assert found[1] == "no clip of 0.5 s or more to compare"
    assert found[2].startswith("1 compared")


def test_no_clip_is_compared(compare: Compare, tmp_path: Path) -> None:
    assert compare(DIGITS, num_clips=0).strip().endswith("no clip was compared (--flag_codec_clips 0)")
    assert "no clip was compared, because the codec's weights are random" in compare(DIGITS, named="tiny-random-base")
    assert not kept_in(tmp_path)


def test_results_are_kept(compare: Compare, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """And read again, unless they are damaged. A check alone writes nothing."""
    first = compare(VOICES_MANIFEST, keep=False)
    warned = capsys.readouterr().out
    assert not kept_in(tmp_path)
    assert compare(VOICES_MANIFEST) == first
    (kept,) = kept_in(tmp_path)
    values = json.loads(kept.read_text())
    kept.write_text(json.dumps(values | {"similarities": [0.75] * 5}))
    assert "similarity 0.75 to 0.75" in compare(VOICES_MANIFEST)
    kept.write_text("{")
    capsys.readouterr()
    assert compare(VOICES_MANIFEST) == first
    assert capsys.readouterr().out == warned
    assert json.loads(kept.read_text()) == values


def test_a_clip_that_is_gone(bundle: Bundle, tmp_path: Path) -> None:
    clip = tmp_path / "a.flac"
    shutil.copy(PROJECT / "samples" / "voices" / "anna_00.flac", clip)
    entry = speech_sample("Good morning.", "anna_00.flac")
    entry["messages"][-1]["content"]["audio_url"] = str(clip)
    manifest = write_manifest(tmp_path / "m.jsonl", [entry])
    with Preparation(DataOptions(train_manifest=(manifest,)), bundle.coder(tmp_path), tmp_path) as preparation:
        checked = preparation.check(manifest)
        clip.unlink()
        with pytest.raises(InputError, match=r"a\.flac: has changed since it was checked: no such file"):
            check_codec(preparation, [checked], ModelOptions(), 5)
        write_manifest(manifest, [])
        with pytest.raises(InputError, match=r"m\.jsonl: has changed since it was checked"):
            check_codec(preparation, [checked], ModelOptions(), 5)
