"""Similarity of voices: the same speaker above others; level and sample rate change nothing; what has no voice."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import VOICES
from torchaudio.functional import resample
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from higgs_ds.common.errors import InputError
from higgs_ds.data.audio import read_audio
from higgs_ds.model.sample import AudioClip
from higgs_ds.options.fields import RESEMBLYZER
from higgs_ds.speech.scoring import Scorer, voice_similarities
from higgs_ds.speech.speaker_similarity import Encoder, open_speaker_encoder, similarity

CPU = torch.device("cpu")
SPEAKERS = sorted({path.stem.split("_")[0] for path in VOICES.glob("*.flac")})


def voice(speaker: str) -> tuple[torch.Tensor, int]:
    """All clips of a sample voice, one after the other."""
    parts = [soundfile.read(path, dtype="float32", always_2d=True) for path in sorted(VOICES.glob(f"{speaker}_*.flac"))]
    return torch.cat([torch.from_numpy(waveform).mean(dim=1) for waveform, _ in parts]), parts[0][1]


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return open_speaker_encoder(RESEMBLYZER, CPU)


def test_is_that_of_resemblyzer(encode: Encoder) -> None:
    """Cosines by Resemblyzer 0.1.4 itself, of `embed_utterance(normalize_volume(waveform, -30))` at 16 kHz."""
    clips = [AudioClip(VOICES / f"{name}.flac") for name in ("anna_00", "anna_01", "ben_00", "ben_03")]
    voices = torch.stack([encode(read_audio(clip, 16000), 16000) for clip in clips])
    expected = [
        [1, 0.7333, 0.7336, 0.6155],
        [0.7333, 1, 0.6946, 0.6924],
        [0.7336, 0.6946, 1, 0.7716],
        [0.6155, 0.6924, 0.7716, 1],
    ]
    torch.testing.assert_close(voices @ voices.T, torch.tensor(expected), rtol=0, atol=1e-3)


def test_halves_of_a_voice_are_closer_than_voices(encode: Encoder) -> None:
    halves = {}
    for speaker in SPEAKERS:
        waveform, rate = voice(speaker)
        middle = len(waveform) // 2
        halves[speaker] = encode(waveform[:middle], rate), encode(waveform[middle:], rate)
    assert len(halves) > 2
    for first, second in itertools.combinations(halves, 2):
        between = [similarity(a, b) for a in halves[first] for b in halves[second]]
        assert min(similarity(*halves[first]), similarity(*halves[second])) > max(between) + 0.02


def test_level_and_rate_change_nothing(encode: Encoder) -> None:
    waveform, rate = voice(SPEAKERS[0])
    waveform = waveform * (0.4 / waveform.abs().max())
    whole = encode(waveform, rate)
    assert whole.norm() == pytest.approx(1, abs=1e-5)
    for changed, changed_rate in (
        (waveform * 0.1, rate), (waveform * 2, rate),
        *((resample(waveform, rate, other), other) for other in (16000, 22050, 48000)),
    ):  # fmt: skip
        assert similarity(whole, encode(changed, changed_rate)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("rates", [False, True])
def test_what_has_no_voice(rates: bool, encode: Encoder) -> None:
    """Silence and very short clips are named; what is no mono waveform of numbers is an error."""
    scorer = Scorer(encode=encode, rates=rates)
    for waveform, reason in (
        (torch.zeros(24000), "silence"), (torch.full((24000,), 1e-5), "silence"), (torch.ones(1), "shorter than 0.2 s"),
        (torch.zeros(0), "no frame"),
    ):  # fmt: skip
        heard = scorer.hear(waveform, 24000)
        assert heard.reason == reason
        assert heard.voice is None
        assert math.isnan(heard.mos)
    with pytest.raises(ValueError, match=r"mono waveform .* \(2, 24000\)"):
        scorer.hear(torch.zeros(2, 24000), 24000)
    with pytest.raises(ValueError, match="NaN or infinite"):
        scorer.hear(torch.full((24000,), math.nan), 24000)


def test_similarities_of_items(encode: Encoder) -> None:
    a, b, c = torch.eye(3)
    mixed = (a + b) / math.sqrt(2)
    own, others = voice_similarities([a, mixed, c, None], [a, b, c, a], ["anna", "anna", None, "anna"])
    assert own[:3] == pytest.approx([1, math.sqrt(0.5), 1])
    assert others[:2] == pytest.approx([0.5, math.sqrt(0.5)])
    assert all(map(math.isnan, (own[3], others[2], others[3])))


def test_x_vector_model_of_transformers(tmp_path: Path) -> None:
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16),
        conv_stride=(20, 16), conv_kernel=(20, 16), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, tdnn_dim=(16, 16), tdnn_kernel=(3, 1), tdnn_dilation=(1, 1),
        xvector_output_dim=8, num_buckets=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WavLMForXVector(config).eval()
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    waveform, rate = voice(SPEAKERS[0])
    found = open_speaker_encoder(str(tmp_path), CPU)(waveform, rate)
    at_16_khz = resample(waveform, rate, 16000)
    normalized = (at_16_khz - at_16_khz.mean()) / (at_16_khz.var(unbiased=False) + 1e-7).sqrt()
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(normalized[None]).embeddings, dim=1)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--speaker_model .*: is not an x-vector model"):
        open_speaker_encoder(str(tmp_path), CPU)
