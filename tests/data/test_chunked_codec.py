"""Encoding in parts on a CPU: the codes of the whole clip, wherever it is cut."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import VOICES

from higgs_ds.data import chunked_codec
from higgs_ds.data.audio import read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.codec_info import find_codec
from higgs_ds.model.sample import AudioClip

RATE = 24000


@pytest.fixture(scope="module")
def codec(base: Path) -> Codec:
    return Codec(find_codec(base, None), torch.device("cpu"))


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    return torch.cat([read_audio(AudioClip(path), RATE) for path in sorted(VOICES.glob("*.flac"))[:4]])


@pytest.mark.parametrize("chunk", [2**13, 2**15, 50_000])
@pytest.mark.parametrize("num_samples", [960, 2 * RATE, 50_001, 3 * RATE + 479])
def test_same_codes_as_the_whole(
    codec: Codec, speech: torch.Tensor, monkeypatch: pytest.MonkeyPatch, chunk: int, num_samples: int
) -> None:
    """Parts so small that every stage is cut several times, and lengths that divide evenly and that do not."""
    clip = speech[:num_samples]
    with torch.inference_mode():
        expected = codec.model.encode(clip[None, None]).audio_codes[0]
    monkeypatch.setattr(chunked_codec, "CHUNK", chunk)
    assert codec.encode(clip).equal(expected)


def test_values_of_the_whole(codec: Codec, speech: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding; and without a margin, the difference is seen."""
    monkeypatch.setattr(chunked_codec, "CHUNK", 2**13)
    encoder, clip = codec.model.acoustic_encoder, speech[None, None, : 3 * RATE]
    with torch.inference_mode():
        expected = encoder(clip)
        with chunked_codec.in_chunks(codec.model):
            found = encoder(clip)
            monkeypatch.setattr(chunked_codec, "math", SimpleNamespace(ceil=lambda x: 0))
            without_margin = encoder(clip)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (without_margin - expected).abs().max() > 1e-2 * expected.abs().max()
    assert type(encoder) is not chunked_codec.ChunkedAcousticEncoder


def test_parts() -> None:
    assert chunked_codec._parts(100, 40) == [(0, 40), (40, 100)]
    assert chunked_codec._parts(101, 40) == [(0, 40), (40, 80), (80, 101)]
    assert chunked_codec._parts(7, 40) == [(0, 7)]
    for length in range(1, 200):
        parts = chunked_codec._parts(length, 8)
        assert parts[0][0] == 0
        assert parts[-1][1] == length
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
