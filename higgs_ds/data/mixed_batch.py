"""Encode clips of different lengths in one batch of the audio codec, each with the codes that it has alone.

Clips are padded with zeros at the end. That alone would change their codes: the first norm of the semantic branch is
over time, its attention is over all frames, and every convolution with padding expects zeros right after a clip, where
the layers before it have left other values.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torchaudio
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import HiggsAudioV2TokenizerModel
from transformers.audio_utils import conv1d_output_length

from higgs_ds.data.codec_info import SEMANTIC_PADDING


def encode_mixed_batch(model: HiggsAudioV2TokenizerModel, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the codes (C, F) of each mono waveform (num_samples,), all on the model's device."""
    semantic, num_frames = _semantic_frames(model, waveforms)
    acoustic = _acoustic_frames(model, waveforms, num_frames)
    width = max(num_frames)
    frames = torch.cat([acoustic[..., :width], semantic[..., :width]], dim=1)
    frames = model.fc(frames.transpose(1, 2)).transpose(1, 2)
    codes = model.quantizer.encode(frames, model.config.target_bandwidths[-1]).transpose(0, 1)
    return [clip[:, :length] for clip, length in zip(codes, num_frames, strict=True)]


def _semantic_frames(
    model: HiggsAudioV2TokenizerModel, waveforms: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[int]]:
    """Return the semantic branch's output (B, H, F), and the number of frames of each clip."""
    config, tower = model.config, model.semantic_model
    rate, tower_rate = config.sample_rate, config.semantic_sample_rate
    resampled = torchaudio.functional.resample(pad_sequence(list(waveforms), batch_first=True), rate, tower_rate)
    # The resampling filter leaves a tail after the end of each clip, so the clips are cut before they are padded.
    cut = [row[: math.ceil(len(clip) * tower_rate / rate)] for row, clip in zip(resampled, waveforms, strict=True)]
    padded = pad_sequence([nn.functional.pad(clip, (SEMANTIC_PADDING,) * 2) for clip in cut], batch_first=True)
    lengths = [len(clip) + 2 * SEMANTIC_PADDING for clip in cut]
    mask = None
    if len(set(lengths)) > 1:
        mask = (torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]).long().to(padded.device)
    with _norm_of_each_clip(tower.feature_extractor.conv_layers[0], lengths):
        hidden = tower(padded, attention_mask=mask, output_hidden_states=True).hidden_states
    every = config.semantic_downsample_factor
    features = torch.stack(hidden, dim=1).mean(dim=1)[:, ::every]
    for layer in tower.feature_extractor.conv_layers:
        lengths = [conv1d_output_length(layer.conv, length) for length in lengths]
    lengths = [math.ceil(length / every) for length in lengths]
    with _zeros_after_clips(model.encoder_semantic, lengths) as num_frames:
        return model.encoder_semantic(features.transpose(1, 2)), num_frames


def _acoustic_frames(
    model: HiggsAudioV2TokenizerModel, waveforms: Sequence[torch.Tensor], num_frames: Sequence[int]
) -> torch.Tensor:
    """Return the acoustic branch's output (B, H, F). The codec pads the clips for which it would be of another length.

    Args:
        num_frames: lengths of the semantic branch's outputs.
    """
    encoder, padded = model.acoustic_encoder, list(waveforms)
    for i, (clip, wanted) in enumerate(zip(waveforms, num_frames, strict=True)):
        length = len(clip)
        for conv in _convolutions(encoder):
            length = conv1d_output_length(conv, length)
        if length != wanted:
            padded[i] = nn.functional.pad(clip, (model.pad, model.pad))
    with _zeros_after_clips(encoder, [len(clip) for clip in padded]):
        return encoder(pad_sequence(padded, batch_first=True)[:, None])


def _convolutions(module: nn.Module) -> Iterable[nn.Conv1d]:
    return (part for part in module.modules() if isinstance(part, nn.Conv1d))


@contextlib.contextmanager
def _zeros_after_clips(module: nn.Module, lengths: list[int]) -> Iterator[list[int]]:
    """Within the block, each convolution sees zeros right after each clip, as it does if the clip is alone.

    The convolutions must run one after another in the order of registration. `lengths` of the inputs becomes those of
    the outputs. A clip's outputs depend on as many positions after its end as the convolution has padding.
    """

    def zero(conv: Any, inputs: tuple[torch.Tensor]) -> None:
        for i, length in enumerate(lengths):
            inputs[0][i, :, length : length + conv.padding[0]] = 0
            lengths[i] = conv1d_output_length(conv, length)

    lengths = list(lengths)
    hooks = [conv.register_forward_pre_hook(zero) for conv in _convolutions(module)]
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()


class _NormOfEachClip(nn.Module):
    """A norm over time that is applied to each clip without its padding, which becomes zero."""

    def __init__(self, norm: nn.GroupNorm, lengths: Sequence[int]) -> None:
        super().__init__()
        self.norm, self.lengths = norm, lengths

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = torch.zeros_like(x)
        for i, length in enumerate(self.lengths):
            normed[i : i + 1, :, :length] = self.norm(x[i : i + 1, :, :length])
        return normed


@contextlib.contextmanager
def _norm_of_each_clip(layer: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Within the block, the norm over time of a first convolution layer, if it has one, sees each clip alone.

    Args:
        lengths: of the layer's inputs.
    """
    norm, conv = getattr(layer, "layer_norm", None), layer.conv
    if not isinstance(norm, nn.GroupNorm):  # in some models, it is over the channels of one frame
        yield
        return
    assert isinstance(conv, nn.Conv1d)
    layer.layer_norm = _NormOfEachClip(norm, [conv1d_output_length(conv, length) for length in lengths])
    try:
        yield
    finally:
        layer.layer_norm = norm
