"""Measures of speech against sounds and words with known values."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import soundfile
import torch
import torchaudio
from conftest import PROJECT, VOICES

from higgs_ds.common.errors import InputError
from higgs_ds.data.audio import read_audio
from higgs_ds.model.sample import AudioClip
from higgs_ds.speech.measures import (
    agreement,
    median_pitch_hz,
    mel_distance_db,
    spectral_similarity,
    stop_warning,
    word_errors,
    words_of,
)
from higgs_ds.speech.recognizers import check_recognizer, open_recognizer

RATE = 24000


def test_words_without_inline_tags() -> None:
    assert words_of("<|style:whisper|>One, two<|sfx:laughter|>three.") == ["one", "two", "three"]


def hum(pitch_hz: float, seconds: float, loudness: float = 0.3) -> torch.Tensor:
    """Return a voiced sound: harmonics whose amplitude falls with their number."""
    t = torch.arange(int(seconds * RATE)) / RATE
    return loudness * sum(torch.sin(2 * math.pi * n * pitch_hz * t) / n for n in range(1, 12))


@pytest.mark.parametrize("pitch_hz", [80, 110, 180, 240, 330])
def test_pitch(pitch_hz: float) -> None:
    quiet = 1e-4 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    sound = torch.cat([quiet, hum(pitch_hz, 1.0), quiet])  # longer silence than sound
    assert median_pitch_hz(sound, RATE) == pytest.approx(pitch_hz, rel=0.02)


def test_no_pitch() -> None:
    assert math.isnan(median_pitch_hz(torch.zeros(0), RATE))
    assert math.isnan(median_pitch_hz(torch.zeros(RATE), RATE))


def test_agreement() -> None:
    target = torch.arange(12).view(2, 6)
    assert agreement(target, target).tolist() == [1, 1]
    assert agreement(target[:, :3], target).tolist() == [0.5, 0.5]
    spoken = torch.cat([target, target], dim=1)
    spoken[1, :6] += 1
    assert agreement(spoken, target).tolist() == [0.5, 0]
    assert agreement(target[:, :0], target).tolist() == [0, 0]


def test_mel_distance() -> None:
    voices = [read_audio(AudioClip(VOICES / f"{name}.flac"), RATE) for name in ("anna_01", "ben_01")]
    one, other = voices
    assert mel_distance_db(one, one, RATE) == 0
    softer = mel_distance_db(0.5 * one, one, RATE)
    assert 3 < softer < 20 * math.log10(2)  # parts that are silent in both do not differ
    assert mel_distance_db(other, one, RATE) > softer
    longer, higher = hum(110, 2.0), hum(220, 1.0)
    assert mel_distance_db(hum(110, 1.0), longer, RATE) < mel_distance_db(higher, longer, RATE) / 2


def test_spectral_similarity() -> None:
    one, other = (read_audio(AudioClip(VOICES / f"{name}.flac"), RATE) for name in ("anna_01", "ben_01"))
    assert spectral_similarity(one, one, RATE) == pytest.approx(1)
    softer = torchaudio.functional.treble_biquad(0.1 * one, RATE, -12)
    assert spectral_similarity(softer, one, RATE) > 0.97  # neither loudness nor a filter matters
    noisy = one + 0.03 * one.std() * torch.randn(len(one), generator=torch.Generator().manual_seed(0))
    assert 0.9 < spectral_similarity(noisy, one, RATE) < 1
    content = io.BytesIO()
    soundfile.write(content, torchaudio.functional.resample(one, RATE, 8000).numpy(), 8000, "GSM610", format="WAV")
    on_the_phone = torch.from_numpy(soundfile.read(io.BytesIO(content.getvalue()), dtype="float32")[0])
    assert spectral_similarity(torchaudio.functional.resample(on_the_phone, 8000, RATE), one, RATE) > 0.8
    for unlike in (other, one.flip(0), torch.randn(len(one), generator=torch.Generator().manual_seed(0))):
        assert abs(spectral_similarity(unlike, one, RATE)) < 0.3
    assert spectral_similarity(torch.zeros(len(one)), one, RATE) == 0


def test_stop_rate() -> None:
    assert "stop rate 0 is bad" in (stop_warning(0) or "")
    assert stop_warning(0.1) is None


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b c", "a x b c y", 2), ("a b", "", 2), ("", "a", 1)],
)
def test_word_errors(said: str, heard: str, errors: int) -> None:
    assert word_errors(said.split(), heard.split()) == errors


def test_words() -> None:
    assert words_of("Good morning, it's ÄRGER!") == ["good", "morning", "it's", "ärger"]


def test_recognizer_refuses_unknown_words() -> None:
    pytest.importorskip("pocketsphinx")
    check_recognizer("pocketsphinx")
    with pytest.raises(InputError, match="its English dictionary does not have xqzzy"):
        open_recognizer("pocketsphinx", ["good", "xqzzy"])
    heard = open_recognizer("pocketsphinx", ["good", "morning", "kettle"])(
        read_audio(AudioClip(VOICES / "anna_00.flac"), RATE), RATE
    )
    assert heard == ["good", "morning"]


def test_recognizer_does_not_depend_on_earlier_clips() -> None:
    pytest.importorskip("pocketsphinx")
    digits = "zero one two three four five six seven eight nine".split()
    clips = [
        read_audio(AudioClip(PROJECT / "samples" / "digits_held_out" / f"finn_{n:02}.flac"), RATE) for n in range(12)
    ]
    recognize = open_recognizer("pocketsphinx", digits)
    assert [recognize(clip, RATE) for clip in clips] == [
        open_recognizer("pocketsphinx", digits)(clip, RATE) for clip in clips
    ]


def test_no_such_recognizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a speech recognizer that transformers can load"):
        open_recognizer(str(tmp_path), [])
