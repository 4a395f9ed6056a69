"""Measurements of clips and texts against values known from their making; trimmed clips against clips that are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import speech_sample, write_manifest

from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.data.audio import examine, read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.preparation import Preparation
from higgs_ds.data.quality import ClipQuality, decoded
from higgs_ds.data.spoken_text import SCRIPTS, normalized, script_share, words_of
from higgs_ds.model.sample import AudioClip, Message, Sample
from higgs_ds.options.train import DataOptions

RATE = 24000


@pytest.fixture(scope="module")
def bundle(base: Path) -> Bundle:
    return open_bundle(str(base), None, None, base.parent)


def sine(seconds: float, rate: int = RATE, hz: float = 1000) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def measured(path: Path, sound: np.ndarray, rate: int = RATE, subtype: str = "FLOAT", **options: Any) -> ClipQuality:
    soundfile.write(path, sound, rate, subtype=subtype)
    return examine(AudioClip(path), 600, RATE, **options).quality


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_silence_level_and_offset(tmp_path: Path, rate: int, channels: int) -> None:
    silence = [np.zeros(round(seconds * rate)) for seconds in (0.5, 1.25, 70.0)]
    sound = np.concatenate([silence[0], sine(1, rate), silence[2], sine(2, rate), silence[1]]) * 0.1 + 0.02
    found = measured(tmp_path / "a.wav", np.repeat(sound[:, None], channels, 1), rate)
    assert found.duration_s == pytest.approx(74.75, abs=1e-4)
    assert (found.start_s, found.end_s) == pytest.approx((0.5, 1.25), abs=0.011)
    assert found.pause_s == pytest.approx(70, abs=0.021)
    assert found.speech_s == pytest.approx(73, abs=0.021)
    assert found.level_dbfs == pytest.approx(-23.01, abs=0.1)  # of a sine at -20 dBFS
    assert found.dc_offset == pytest.approx(0.02, abs=1e-4)
    assert found.rate_hz == rate
    assert decoded(found.encoded()) == found


def test_silence_is_relative_to_the_clip(tmp_path: Path) -> None:
    noise = 0.1 * 10 ** (-35 / 20) * np.sqrt(0.5) * np.random.default_rng(0).standard_normal(3 * RATE)
    sound = noise + np.concatenate([np.zeros(RATE), 0.1 * sine(1), np.zeros(RATE)])
    for gain in (1, 0.05):
        assert measured(tmp_path / "a.wav", gain * sound).start_s == 0
        assert measured(tmp_path / "a.wav", gain * sound, silence_db=30).start_s == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("rate", "cutoff_hz"), [(24000, 4000), (48000, 4000), (48000, 12000), (24000, 12000)])
def test_bandwidth(tmp_path: Path, rate: int, cutoff_hz: int) -> None:
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(2 * rate))
    spectrum[np.fft.rfftfreq(2 * rate, 1 / rate) > cutoff_hz] = 0
    sound = np.fft.irfft(spectrum)
    found = measured(tmp_path / "a.wav", 0.1 * sound / sound.std(), rate).cutoff_hz
    assert found == pytest.approx(cutoff_hz, abs=6 * rate / 256)  # six of the bins that it is measured in


def test_same_samples_in_other_files(tmp_path: Path) -> None:
    # As integers: libsndfile rounds other numbers differently in WAV and FLAC.
    sound = np.random.default_rng(0).integers(-9000, 9000, RATE, np.int16)
    found = measured(tmp_path / "a.wav", sound, subtype="PCM_16")
    assert measured(tmp_path / "b.flac", sound, subtype="PCM_16") == found
    assert measured(tmp_path / "c.flac", sound // 2, subtype="PCM_16").audio != found.audio
    assert measured(tmp_path / "d.flac", sound[:-1], subtype="PCM_16").audio != found.audio
    whole = examine(AudioClip(tmp_path / "a.wav", 0.25, 0.5), 600, RATE).quality
    assert measured(tmp_path / "e.wav", sound[RATE // 4 : 3 * RATE // 4], subtype="PCM_16") == whole


@pytest.mark.parametrize("samples", [1, 100, 239, 240, 241, 700])
def test_very_short_and_odd_clips(tmp_path: Path, samples: int) -> None:
    for sound in (
        np.full(samples, 0.5),
        0.5 * sine(1)[7 : 7 + samples],
        np.stack([sine(1), -sine(1)], 1)[7 : 7 + samples],
    ):
        found = measured(tmp_path / "a.wav", sound)
        assert np.isfinite(found).all()
        assert found.speech_s > 0


@pytest.mark.usefixtures("lone_rank")
@pytest.mark.parametrize(("offset_s", "duration_s"), [(0.0, None), (0.25, 2.4)])
def test_trimmed_clip_is_the_clip_that_is_cut(
    bundle: Bundle, tmp_path: Path, offset_s: float, duration_s: float | None
) -> None:
    """Codes, lengths and keys, for a whole file and for a part of one: 0.5 and 0.9 s of silence become 0.2 s."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(round(1.6 * RATE))
    sound = np.concatenate([np.zeros(round((0.5 + offset_s) * RATE)), noise, np.zeros(round(0.9 * RATE))])
    soundfile.write(tmp_path / "a.wav", sound, RATE)
    part = {} if duration_s is None else {"offset": offset_s, "duration": duration_s}
    manifest = write_manifest(tmp_path / "m.jsonl", [speech_sample("Words.", str(tmp_path / "a.wav"), **part)])
    codec = Codec(bundle.codec.folder, torch.device("cpu"))

    def prepared(trim_silence: float | None) -> list[Dataset]:
        cache, found = tmp_path / "cache", []
        for _ in range(3):  # from the audio; from the kept index; from the codes
            with Preparation(DataOptions(trim_silence=trim_silence), bundle.coder(cache), cache) as preparation:
                checked = preparation.check(manifest)
                preparation.encode(checked, torch.device("cpu"))
                index = preparation.keep(checked)
            found.append(Dataset(index, np.arange(1), bundle.coder(cache)))
            if len(found) == 2:
                for kept in (cache / "index").glob("*/index.json"):
                    kept.unlink()
        return found

    for trim_silence, start_s, kept_s in ((0.2, 0.3, 2.0), (None, 0.0, 3.0 if duration_s is None else 2.4)):
        expected = codec.encode(read_audio(AudioClip(tmp_path / "a.wav", offset_s + start_s, kept_s), RATE))
        assert expected.shape[1] == round(kept_s * 25)
        for dataset in prepared(trim_silence):
            assert dataset.encoded(0).codes[0].equal(expected)
            assert dataset.lengths[0] == len(dataset.encoded(0).prompt.input_ids)


@pytest.mark.parametrize(
    ("language", "text", "share", "script"),
    [
        ("en", "Hello, world.", 1.0, "LATIN"),
        ("ru", "Privet, mir.", 0.0, "LATIN"),
        ("Russian", "Привет, мир! OK", 9 / 11, "CYRILLIC"),
        ("ru_RU", "Привет", 1.0, "CYRILLIC"),
        ("en-GB", "Привет", 0.0, "CYRILLIC"),
        ("ja", "カタカナとひらがなと漢字ー々", 1.0, "HIRAGANA"),
        ("zh", "你好,世界", 1.0, "CJK"),
        ("zh-CN", "ni hao", 0.0, "LATIN"),
        ("ko", "안녕하세요", 1.0, "HANGUL"),
        ("hi", "नमस्ते दुनिया", 1.0, "DEVANAGARI"),
        ("ja", "\N{FULLWIDTH LATIN CAPITAL LETTER A}\N{HALFWIDTH KATAKANA LETTER KA}" * 2, 1 / 2, None),
        ("el", "Καλημέρα", 1.0, "GREEK"),
        ("zh-Latn", "ni hao", 1.0, None),
        ("sr", "zdravo", 1.0, None),
        ("klingon", "nuqneH", 1.0, None),
        ("ru", "1234, 5!", 1.0, None),
        (None, "Привет", 1.0, None),
    ],
)
def test_script_of_a_language(language: str | None, text: str, share: float, script: str | None) -> None:
    found_share, found = script_share(language, text)
    assert found_share == pytest.approx(share)
    assert script in (None, SCRIPTS[found])
    assert (found >= 0) == (share < 1 or script is not None)


CLIP = AudioClip(Path("a.wav"))


@pytest.mark.parametrize(
    ("messages", "start_index", "words"),
    [
        ([("user", "Said before."), ("assistant", CLIP), ("user", "One."), ("assistant", CLIP)], 2, "One."),
        ([("user", "One."), ("assistant", CLIP), ("user", "Two."), ("assistant", CLIP)], 0, "One. Two."),
        ([("user", "One. Two."), ("assistant", CLIP), ("assistant", CLIP)], 0, "One. Two."),
        ([("system", CLIP), ("user", "[SPEAKER0] One. [SPEAKER1] Two."), ("assistant", CLIP)], 0, "  One.   Two."),
        ([("user", "Repeat:", CLIP), ("assistant", CLIP)], 0, ""),
        ([("user", "One."), ("assistant", "One.", CLIP)], 0, ""),
        ([("user", "One."), ("assistant", "Two.")], 0, ""),
        ([("assistant", CLIP)], 0, ""),
    ],
)
def test_words_that_are_spoken(messages: list[tuple[Any, ...]], start_index: int, words: str) -> None:
    turns = tuple(Message(role, parts) for role, *rest in messages for parts in [tuple(rest)])
    assert words_of(Sample(turns, start_index, None, "m:1")) == words


def test_normalized_texts() -> None:
    assert normalized("It's 5 o'clock, Anna_B!") == normalized("its 5 OCLOCK anna b") == b"its5oclockannab"
    assert normalized("ÉTÉ à Nîmes?").decode() == "étéànîmes"
