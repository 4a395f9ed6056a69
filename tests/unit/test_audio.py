"""Audio in every format and rate comes out as the same mono sound; codes come from the processor's own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import PROJECT
from safetensors.torch import save_file
from transformers import AutoProcessor

from higgs_ds.data.audio import AudioError, read_audio
from higgs_ds.data.audio_codes import CodeCache, encode_clips, find_keys
from higgs_ds.data.codec import Codec, codec_digest, find_codec
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
    found = read_audio(AudioClip(path), RATE)
    expected = torch.from_numpy(tone(RATE)) / channels
    assert found.dtype == torch.float32
    # Lossy formats may add a little at the ends, and no more than a quiet error within.
    assert abs(len(found) - RATE) <= (0 if suffix in (".wav", ".flac") else 2400)
    spectrum, reference = (torch.fft.rfft(x[:RATE], RATE).abs() for x in (found, expected))
    assert (spectrum - reference).norm() / reference.norm() < 0.05


def test_stretch_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ramp.wav"
    ramp = np.linspace(-0.9, 0.9, 3 * RATE, dtype=np.float32)
    soundfile.write(path, ramp, RATE, subtype="FLOAT")
    found = read_audio(AudioClip(path, offset_s=1.0, duration_s=0.5), RATE)
    assert found.equal(torch.from_numpy(ramp[RATE : RATE + RATE // 2]))
    assert len(read_audio(AudioClip(path, offset_s=2.5, duration_s=9.0), RATE)) == RATE // 2


def test_what_cannot_be_read(tmp_path: Path) -> None:
    def reason(clip: AudioClip) -> str:
        with pytest.raises(AudioError) as caught:
            read_audio(clip, RATE)
        return str(caught.value)

    assert reason(AudioClip(tmp_path / "none.wav")) == "no such file"
    assert reason(AudioClip(tmp_path)) == "is not a file"
    text = tmp_path / "text.wav"
    text.write_text("this is no audio")
    assert reason(AudioClip(text)).startswith("cannot be read as audio")
    cut = tmp_path / "cut.flac"
    cut.write_bytes(VOICE.read_bytes()[:5000])
    assert reason(AudioClip(cut)).startswith("cannot be read as audio")
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros(0, dtype=np.float32), RATE)
    assert reason(AudioClip(empty)).startswith("holds no samples")
    assert reason(AudioClip(VOICE, offset_s=60)).startswith("holds no samples from 60 s on")
    broken = tmp_path / "nan.wav"
    soundfile.write(broken, np.array([0.1, np.nan], dtype=np.float32), RATE, subtype="FLOAT")
    assert reason(AudioClip(broken)) == "holds NaN or infinite samples"


@pytest.fixture(scope="module")
def codec_folder(base: Path) -> Path:
    return find_codec(base, None)


def test_codes_are_the_processors(base: Path, codec_folder: Path) -> None:
    """What is trained on is what transformers' processor makes of the same clip at inference."""
    waveform = read_audio(AudioClip(VOICE), RATE)
    codes = Codec(codec_folder, torch.device("cpu")).encode(waveform)
    processor = AutoProcessor.from_pretrained(base)
    inputs = processor(text="<|audio_out_bos|><|AUDIO_OUT|>", audio=waveform.numpy(), return_tensors="pt")
    rows = inputs["audio_input_ids"][0]
    assert len(rows) == codes.shape[1] + 9
    for k in range(8):
        assert rows[k + 1 : k + 1 + codes.shape[1], k].equal(codes[k])
    assert len(codes.unique()) > 20


def test_cache(tmp_path: Path, codec_folder: Path) -> None:
    codec = Codec(codec_folder, torch.device("cpu"))
    cache = CodeCache(tmp_path, codec_digest(codec_folder))
    clips = [(AudioClip(VOICE), "m:1"), (AudioClip(VOICE, duration_s=0.5), "m:2"), (AudioClip(VOICE), "m:3")]
    keys, missing, problems = find_keys(cache, clips, RATE, 960)
    assert problems == []
    assert len(set(keys.values())) == len(keys) == len(missing) == 2
    encode_clips(cache, codec, missing, keys)
    for clip in missing:
        stored = cache.load(keys[clip])
        assert stored is not None
        assert stored.equal(codec.encode(read_audio(clip, RATE)))
    assert find_keys(cache, clips, RATE, 960)[1] == []  # nothing is left to encode

    copy = tmp_path / "same sound, other name.flac"
    copy.write_bytes(VOICE.read_bytes())
    assert cache.key(AudioClip(copy)) == keys[AudioClip(VOICE)]
    assert CodeCache(tmp_path, "another codec").key(AudioClip(VOICE)) != keys[AudioClip(VOICE)]


def test_damaged_cache_files_are_made_again(tmp_path: Path, codec_folder: Path) -> None:
    codec = Codec(codec_folder, torch.device("cpu"))
    cache = CodeCache(tmp_path, codec_digest(codec_folder))
    clips = [(AudioClip(VOICE), "m:1")]
    keys, missing, _ = find_keys(cache, clips, RATE, 960)
    encode_clips(cache, codec, missing, keys)
    (path,) = cache.folder.rglob("*.safetensors")
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        path.write_bytes(damage)
        assert find_keys(cache, clips, RATE, 960)[1] == missing
    save_file({"other": torch.zeros(1)}, path)
    assert find_keys(cache, clips, RATE, 960)[1] == missing


def test_every_bad_clip_is_named(tmp_path: Path) -> None:
    short = tmp_path / "short.wav"
    soundfile.write(short, tone(RATE, 0.03), RATE)
    cache = CodeCache(tmp_path / "cache", "codec")
    clips = [(AudioClip(tmp_path / "none.wav"), "m:1"), (AudioClip(short), "m:2"), (AudioClip(VOICE), "m:3")]
    keys, _, problems = find_keys(cache, clips, RATE, 960)
    assert list(keys) == [AudioClip(VOICE)]
    assert problems == [
        f"m:1: {tmp_path}/none.wav: no such file",
        f"m:2: {short}: lasts 0.030 s, shorter than one frame of the codec (0.040 s)",
    ]
