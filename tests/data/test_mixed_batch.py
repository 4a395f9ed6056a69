"""Clips of different lengths in one batch: each has the codes that transformers' codec gives it alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import PROJECT, VOICES
from torch.nn.utils.rnn import pad_sequence
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

from higgs_ds.bases.conversion import native_codec
from higgs_ds.data.audio import read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.codec_info import find_codec
from higgs_ds.model.sample import AudioClip

CPU, RATE = torch.device("cpu"), 24000
SHORTEST = 960  # samples in one frame


@pytest.fixture(scope="module")
def codec(base: Path) -> Codec:
    return Codec(find_codec(base, None), CPU)


def clips(count: int, longest: int) -> list[torch.Tensor]:
    """Return stretches of the voices of random lengths, in random order."""
    draw = torch.Generator().manual_seed(0)
    waveforms = [read_audio(AudioClip(path), RATE) for path in sorted(VOICES.glob("*.flac"))[:8]]
    speech = torch.cat(waveforms)
    found = []
    for length in torch.randint(SHORTEST, longest, (count,), generator=draw).tolist():
        start = int(torch.randint(len(speech) - length, (1,), generator=draw))
        found.append(speech[start : start + length])
    return found


def alone(codec: Codec, waveforms: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [codec.model.encode(waveform[None, None]).audio_codes[0] for waveform in waveforms]


@pytest.mark.slow
def test_200_clips_of_random_lengths(codec: Codec) -> None:
    waveforms = sorted(clips(200, 2 * RATE), key=len)
    for start in range(0, 200, 10):
        batch = waveforms[start : start + 10]
        for mixed, expected in zip(codec.encode_batch(batch), alone(codec, batch), strict=True):
            assert mixed.equal(expected)


def test_every_remainder_of_a_frame(codec: Codec) -> None:
    """Some of these lengths make the codec pad its acoustic branch, some do not; the longest is first."""
    waveforms = [clip[:length] for length, clip in zip(range(4 * 960, 960, -97), clips(40, 2 * RATE), strict=False)]
    waveforms = [clip for clip in waveforms if len(clip) >= SHORTEST]
    for mixed, expected in zip(codec.encode_batch(waveforms), alone(codec, waveforms), strict=True):
        assert mixed.equal(expected)


def test_one_clip_and_equal_lengths(codec: Codec) -> None:
    waveforms = [clip[:5000] for clip in clips(20, 2 * RATE) if len(clip) > 5000]
    for batch in (waveforms[:1], waveforms):
        for mixed, expected in zip(codec.encode_batch(batch), alone(codec, batch), strict=True):
            assert mixed.equal(expected)


def test_padding_alone_changes_codes(codec: Codec) -> None:
    """What the masks are for: with zeros appended, without masks, the codes differ."""
    waveforms = clips(8, 2 * RATE)
    with torch.inference_mode():
        padded = codec.model.encode(pad_sequence(waveforms, batch_first=True)[:, None]).audio_codes
    differing = [
        not codes[:, : expected.shape[1]].equal(expected)
        for codes, expected in zip(padded, alone(codec, waveforms), strict=True)
    ]
    assert sum(differing) >= 7  # all but the longest


def test_the_original_codec(tmp_path: Path) -> None:
    """Converted from its original layout, beside longer clips, it gives the codes of the original runtime."""
    from safetensors.torch import load_file

    original = PROJECT / "tests" / "golden" / "original_codec"
    codec = Codec(native_codec(original, "--codec_ckpt", tmp_path), CPU)
    expected = load_file(original / "expected.safetensors")
    mixed = codec.encode_batch([*clips(3, 3 * RATE), expected["waveform"]])
    assert mixed[-1].equal(expected["codes"])


def test_a_norm_over_channels(tmp_path: Path) -> None:
    """Larger HuBERTs normalize each frame over its channels, and their layers before attention."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = HiggsAudioV2TokenizerConfig(
        target_bandwidths=[2], codebook_size=64, codebook_dim=8,
        acoustic_model_config={
            "model_type": "dac", "encoder_hidden_size": 4, "decoder_hidden_size": 32, "hidden_size": 16,
            "downsampling_ratios": [8, 5, 4, 2, 3], "upsampling_ratios": [8, 5, 4, 2, 3],
        },
        semantic_model_config={
            "model_type": "hubert", "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer", "do_stable_layer_norm": True, **small,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = HiggsAudioV2TokenizerModel(config)
    for quantizer in model.quantizer.quantizers:
        quantizer.codebook.embed.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    codec, waveforms = Codec(tmp_path, CPU), clips(12, RATE)
    for mixed, expected in zip(codec.encode_batch(waveforms), alone(codec, waveforms), strict=True):
        assert mixed.equal(expected)
    assert len(torch.cat([codes.flatten() for codes in alone(codec, waveforms)]).unique()) > 20


def test_convolutions_in_float32(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, cuDNN uses TF32; the setting of other models in the process stays."""
    assert torch.backends.cudnn.allow_tf32
    seen = []
    encoder = type(codec.model.acoustic_encoder)
    original = encoder.forward
    monkeypatch.setattr(
        encoder, "forward", lambda *args: seen.append(torch.backends.cudnn.allow_tf32) or original(*args)
    )
    codec.encode_batch(clips(2, RATE))
    monkeypatch.setattr(codec.model, "encode", lambda *args: seen.append(torch.backends.cudnn.allow_tf32) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        codec.encode(clips(1, RATE)[0])
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32
