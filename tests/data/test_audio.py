"""Audio of every format and rate decodes to the same mono sound; codes equal those of transformers' processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import PROJECT
from safetensors.torch import save_file
from transformers import AutoProcessor

from higgs_ds.data.audio import AudioError, ClipTooLongError, as_ogg, examine, read_audio
from higgs_ds.data.code_cache import CachedCodes, CodeCache
from higgs_ds.data.codec import Codec
from higgs_ds.data.codec_info import find_codec, read_codec_info
from higgs_ds.model.sample import AudioClip

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
        assert examine(clip, 600, RATE).num_samples(RATE) == len(read_audio(clip, RATE))


def test_silence_clipping_and_length(tmp_path: Path) -> None:
    def write(name: str, samples: np.ndarray) -> AudioClip:
        soundfile.write(tmp_path / name, samples, RATE, subtype="FLOAT")
        return AudioClip(tmp_path / name)

    with pytest.raises(AudioError, match="is silent: its peak is -80 dBFS"):
        examine(write("quiet.wav", tone(RATE) / 0.4 * 1e-4), 600, RATE)
    with pytest.raises(AudioError, match="is silent: every sample of it is zero"):
        examine(write("zero.wav", np.zeros(RATE, dtype=np.float32)), 600, RATE)
    with pytest.raises(AudioError, match=r"lasts 1.0 s; the limit is 0.9 s"):
        examine(write("long.wav", tone(RATE)), 0.9, RATE)
    assert examine(write("good.wav", tone(RATE)), 600, RATE).quality.clipped == 0
    loud = np.clip(tone(RATE) * 100, -1, 1)
    expected = float((np.abs(loud) >= 0.999).mean())
    assert examine(write("loud.wav", loud), 600, RATE).quality.clipped == pytest.approx(expected)
    assert expected > 0.5


def of_unknown_length(path: Path, seconds: int) -> AudioClip:
    """A FLAC file whose header does not give its length, as an encoder writes to a pipe."""
    soundfile.write(path, np.tile(tone(RATE), seconds), RATE)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the last 36 bits of bytes 18 to 25, in STREAMINFO
    content[22:26] = bytes(4)
    path.write_bytes(content)
    return AudioClip(path)


def decoded_seconds(monkeypatch: pytest.MonkeyPatch, clip: AudioClip, max_s: float) -> float:
    """How much of a clip is decoded before it is refused."""
    read, decoded = soundfile.SoundFile.read, []

    def counting(self: soundfile.SoundFile, *args: Any, **kwargs: Any) -> np.ndarray:
        decoded.append(read(self, *args, **kwargs))
        return decoded[-1]

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    with pytest.raises(ClipTooLongError):
        examine(clip, max_s, RATE)
    return sum(map(len, decoded)) / RATE


@pytest.mark.parametrize("suffix", ["flac", "wav", "mp3", "ogg"])
def test_a_long_clip_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"long.{suffix}"
    with soundfile.SoundFile(path, "w", RATE, 1) as file:
        for _ in range(90):
            file.write(tone(RATE))
    assert decoded_seconds(monkeypatch, AudioClip(path), 60) == 0
    assert decoded_seconds(monkeypatch, AudioClip(tmp_path / "x", data=path.read_bytes()), 60) == 0
    assert decoded_seconds(monkeypatch, AudioClip(path, offset_s=10, duration_s=70), 60) == 0
    assert examine(AudioClip(path, offset_s=20, duration_s=2), 60, RATE).source_samples == 2 * RATE


def test_a_long_clip_without_a_length_is_read_up_to_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clip = of_unknown_length(tmp_path / "long.flac", 200)
    assert 60 < decoded_seconds(monkeypatch, clip, 60) < 60 + 2**20 / RATE
    with pytest.raises(AudioError, match="its header does not give its length; rewrite it"):
        examine(of_unknown_length(tmp_path / "short.flac", 2), 60, RATE)
    assert len(read_audio(AudioClip(clip.path, offset_s=100, duration_s=1), RATE)) == RATE


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("WAV", "GSM610"),
        ("WAV", "G721_32"),
        ("WAV", "NMS_ADPCM_24"),
        ("AU", "G723_40"),
    ],
)
def test_formats_that_cannot_seek(tmp_path: Path, form: str, subtype: str) -> None:
    path = tmp_path / "phone"
    soundfile.write(path, tone(24000), 8000, format=form, subtype=subtype)
    whole = read_audio(AudioClip(path), 8000)
    assert len(whole) >= 24000
    part = read_audio(AudioClip(path, offset_s=1.25, duration_s=0.5), 8000)
    assert part.equal(whole[10000:14000])


def test_minutes_of_ogg(tmp_path: Path) -> None:
    """What the report page plays may be long: libsndfile's encoder must not be given all of it at once."""
    path = tmp_path / "long.wav"
    soundfile.write(path, np.tile(tone(RATE), 150), RATE)
    (tmp_path / "long.ogg").write_bytes(as_ogg(path))
    assert soundfile.info(tmp_path / "long.ogg").frames == 150 * RATE


@pytest.mark.parametrize("rate", [44101, 47999, 96001])
def test_rates_that_would_fill_the_memory_are_refused(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "odd.wav", tone(rate), rate)
    for look in (lambda clip: examine(clip, 600, RATE), lambda clip: read_audio(clip, RATE)):
        with pytest.raises(AudioError, match=f"has a sample rate of {rate} Hz"):
            look(AudioClip(tmp_path / "odd.wav"))


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
    codes = Codec(codec_folder, torch.device("cpu")).encode(waveform)
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
        codes = codec.encode(torch.randn(num_samples) * 0.1)
        assert codes.shape == (8, info.num_frames(num_samples))


def test_cache(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path / "cache", "codec")
    clip, part = AudioClip(VOICE), AudioClip(VOICE, duration_s=0.5)
    key = cache.key(clip)
    assert cache.load(key, 8) is None
    codes, quality = torch.randint(1024, (8, 30)), examine(clip, 600, RATE).quality
    cache.store(key, CachedCodes(codes, quality))
    stored = cache.load(key, 8)
    assert stored is not None
    assert stored.codes.equal(codes.short())
    assert stored.quality == quality
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
    cache.store(key, CachedCodes(torch.ones(8, 30)))
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
