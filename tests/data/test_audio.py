"""Audio of every format and rate decodes to the same mono sound; codes equal those of transformers' processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import PROJECT
from safetensors.torch import save_file
from transformers import AutoProcessor

from higgs_ds.data.audio import AudioError, examine, read_audio
from higgs_ds.data.code_cache import CachedCodes, CodeCache
from higgs_ds.data.codec import Codec, find_codec, read_codec_info
from higgs_ds.data.sample import AudioClip

VOICE = PROJECT / "samples" / "voices" / "anna_00.flac"
RATE = 24000


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(int(rate * seconds)) / rate
    return (0.4 * np.sin(2 * np.pi * 440 * time) * np.hanning(len(time))).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100, 48000])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_rates_channels(tmp_path: Path, suffix: str, rate: int, channels: int) -> None:
    path = tmp_path / f"tone{suffix}"
    left = tone(rate)
    soundfile.write(path, np.stack([left, np.zeros_like(left)], axis=1) if channels == 2 else left, rate)
    waveform = read_audio(AudioClip(path), RATE)
    expected = torch.from_numpy(tone(RATE)) / channels
    assert waveform.dtype == torch.float32
    # Lossy formats may add a few samples at the ends, and a small error in between.
    assert abs(len(waveform) - RATE) <= (0 if suffix in (".wav", ".flac") else 2400)
    spectrum, reference = (torch.fft.rfft(x[:RATE], RATE).abs() for x in (waveform, expected))
    assert (spectrum - reference).norm() / reference.norm() < 0.05


def test_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ramp.wav"
    ramp = np.linspace(-0.9, 0.9, 3 * RATE, dtype=np.float32)
    soundfile.write(path, ramp, RATE, subtype="FLOAT")
    waveform = read_audio(AudioClip(path, offset_s=1.0, duration_s=0.5), RATE)
    assert waveform.equal(torch.from_numpy(ramp[RATE : RATE + RATE // 2]))
    # A clip may extend up to 0.1 s past the end of its file.
    assert len(read_audio(AudioClip(path, offset_s=2.5, duration_s=0.55), RATE)) == RATE // 2


def test_audio_inside_a_manifest() -> None:
    clip = AudioClip(Path("m.jsonl"), offset_s=0.2, duration_s=0.5, data=VOICE.read_bytes())
    assert read_audio(clip, RATE).equal(read_audio(AudioClip(VOICE, 0.2, 0.5), RATE))


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 48000])
def test_length_is_known_without_resampling(tmp_path: Path, rate: int) -> None:
    for extra in range(7):
        path = tmp_path / f"{rate}-{extra}.wav"
        soundfile.write(path, tone(rate)[: rate // 2 + extra], rate)
        clip = AudioClip(path)
        assert examine(clip, 600).num_samples(RATE) == len(read_audio(clip, RATE))


def test_silence_clipping_and_length(tmp_path: Path) -> None:
    def write(name: str, samples: np.ndarray) -> AudioClip:
        soundfile.write(tmp_path / name, samples, RATE, subtype="FLOAT")
        return AudioClip(tmp_path / name)

    with pytest.raises(AudioError, match="is silent: its peak is -80 dBFS"):
        examine(write("quiet.wav", tone(RATE) / 0.4 * 1e-4), 600)
    with pytest.raises(AudioError, match="is silent: its peak is -inf dBFS"):
        examine(write("zero.wav", np.zeros(RATE, dtype=np.float32)), 600)
    with pytest.raises(AudioError, match=r"lasts 1.0 s, longer than --max_clip_s 0.9"):
        examine(write("long.wav", tone(RATE)), 0.9)
    assert examine(write("good.wav", tone(RATE)), 600).clipped == 0
    loud = np.clip(tone(RATE) * 100, -1, 1)
    expected = float((np.abs(loud) >= 0.999).mean())
    assert examine(write("loud.wav", loud), 600).clipped == pytest.approx(expected)
    assert expected > 0.5


def test_unreadable_audio(tmp_path: Path) -> None:
    def reason(clip: AudioClip) -> str:
        with pytest.raises(AudioError) as caught:
            read_audio(clip, RATE)
        return str(caught.value)

    assert reason(AudioClip(tmp_path / "none.wav")) == "no such file"
    assert reason(AudioClip(tmp_path)) == "is not a file"
    text = tmp_path / "text.wav"
    text.write_text("this is not audio")
    assert reason(AudioClip(text)).startswith("cannot be read as audio")
    cut = tmp_path / "cut.flac"
    cut.write_bytes(VOICE.read_bytes()[:5000])
    assert reason(AudioClip(cut)).startswith("cannot be read as audio")
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros(0, dtype=np.float32), RATE)
    assert reason(AudioClip(empty)).startswith("contains no samples")
    assert reason(AudioClip(VOICE, offset_s=60)).startswith("contains no samples after 60 s")
    assert reason(AudioClip(VOICE, duration_s=60)).endswith("before the end of the clip (offset 0 s, duration 60 s)")
    broken = tmp_path / "nan.wav"
    soundfile.write(broken, np.array([0.1, np.nan], dtype=np.float32), RATE, subtype="FLOAT")
    assert reason(AudioClip(broken)) == "contains NaN or infinite samples"


@pytest.fixture(scope="module")
def codec_folder(base: Path) -> Path:
    return find_codec(base, None)


def test_codes_are_the_processors(base: Path, codec_folder: Path) -> None:
    """The codes for training equal those that transformers' processor computes for the same clip at inference."""
    waveform = read_audio(AudioClip(VOICE), RATE)
    codes = Codec(codec_folder, torch.device("cpu")).encode(waveform[None])[0]
    processor = AutoProcessor.from_pretrained(base)
    inputs = processor(text="<|audio_out_bos|><|AUDIO_OUT|>", audio=waveform.numpy(), return_tensors="pt")
    rows = inputs["audio_input_ids"][0]
    assert len(rows) == codes.shape[1] + 9
    for k in range(8):
        assert rows[k + 1 : k + 1 + codes.shape[1], k].equal(codes[k])
    assert len(codes.unique()) > 20


def test_number_of_frames_is_known_without_encoding(codec_folder: Path) -> None:
    codec, info = Codec(codec_folder, torch.device("cpu")), read_codec_info(codec_folder)
    assert (info.sample_rate, info.hop_length) == (RATE, 960)
    for num_samples in [960, 1000, 1079, 1080, 1920, 4800 + 119, 4800 + 120, 4800 + 599, 24000, 60001]:
        codes = codec.encode(torch.randn(1, num_samples) * 0.1)
        assert codes.shape == (1, 8, info.num_frames(num_samples))


def test_a_clip_has_the_same_codes_in_a_batch(codec_folder: Path) -> None:
    codec = Codec(codec_folder, torch.device("cpu"))
    waveforms = torch.stack([read_audio(AudioClip(VOICE, offset_s=i / 10, duration_s=0.8), RATE) for i in range(4)])
    assert codec.encode(waveforms).equal(torch.cat([codec.encode(waveform[None]) for waveform in waveforms]))


def test_cache(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path / "cache", "codec")
    clip, part = AudioClip(VOICE), AudioClip(VOICE, duration_s=0.5)
    key = cache.key(clip)
    assert cache.load(key, 8) is None
    codes = torch.randint(1024, (8, 30))
    cache.store(key, CachedCodes(codes, 0.25))
    stored = cache.load(key, 8)
    assert stored is not None
    assert stored.codes.equal(codes.short())
    assert stored.clipped == 0.25
    assert cache.looks_complete(key, 30, 8)
    assert not cache.looks_complete(key, 29 + 64, 8)
    assert not cache.looks_complete(key, 40, 8)
    assert cache.key(part) != key
    assert cache.load(cache.key(part), 8) is None

    copy = tmp_path / "same sound, other name.flac"
    copy.write_bytes(VOICE.read_bytes())
    assert cache.key(AudioClip(copy)) == key == cache.key(AudioClip(tmp_path / "m.jsonl", data=VOICE.read_bytes()))
    assert CodeCache(tmp_path, "another codec").key(clip) != key
    copy.write_bytes(VOICE.read_bytes() + b" ")
    assert cache.key(AudioClip(copy)) != key


def test_damaged_and_foreign_cache_files_are_ignored(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path, "codec")
    key, other = cache.key(AudioClip(VOICE)), cache.key(AudioClip(VOICE, duration_s=0.5))
    cache.store(key, CachedCodes(torch.ones(8, 30), 0.0))
    content = cache.path(key).read_bytes()
    for damage in (content[: len(content) // 2], b"", b"\xff" * 100):
        cache.path(key).write_bytes(damage)
        assert cache.load(key, 8) is None
    save_file({"other": torch.zeros(1)}, cache.path(key))
    assert cache.load(key, 8) is None
    cache.path(key).write_bytes(content)
    assert cache.load(key, 8) is not None
    assert cache.load(key, 4) is None
    cache.path(other).parent.mkdir(exist_ok=True)
    cache.path(other).write_bytes(content)  # another clip's codes under this clip's name
    assert cache.load(other, 8) is None
