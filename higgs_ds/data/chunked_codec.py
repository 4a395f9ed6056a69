"""Encode on a CPU in parts that fit the processor's cache. Values may differ in the last bit from those of the whole.

Whole, the first layers of a clip of six seconds make tensors of 37 MiB. The C library asks the operating system for
blocks above 32 MiB each time, which then clears every page of them: for such clips the codec takes half as long again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import HiggsAudioV2TokenizerModel
from transformers.models.dac.modeling_dac import DacEncoder
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder, HubertGroupNormConvLayer

CHUNK = 2**20  # numbers in the largest tensor of a part, 4 MiB; about the size of a core's cache

Stage = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def in_chunks(model: HiggsAudioV2TokenizerModel) -> Iterator[None]:
    """Within the block, the codec's encoders process one clip part by part."""
    parts = {model.acoustic_encoder: ChunkedAcousticEncoder}
    if type(model.semantic_model.feature_extractor) is HubertFeatureEncoder:
        parts[model.semantic_model.feature_extractor] = ChunkedFeatureEncoder
    before = {part: type(part) for part in parts}
    for part, kind in parts.items():
        part.__class__ = kind
    try:
        yield
    finally:
        for part, kind in before.items():
            part.__class__ = kind


class ChunkedAcousticEncoder(DacEncoder):
    """The encoder of DAC (Kumar et al. 2023, arXiv 2306.06546)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *blocks = self.block
        x = _padded_stage(lambda part: first(self.conv1(part)), [self.conv1, *_convolutions(first)], x)
        for block in blocks:
            x = _padded_stage(block, _convolutions(block), x)
        return self.conv2(self.snake1(x))


class ChunkedFeatureEncoder(HubertFeatureEncoder):
    """The convolutions of HuBERT (Hsu et al. 2021, arXiv 2106.07447)."""

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        x = input_values[:, None]
        for layer in self.conv_layers:
            if isinstance(layer, HubertGroupNormConvLayer):
                x = _normalized_channels(layer, x)
            else:
                x = _unpadded_stage(layer, layer.conv, x)
        return x


def _parts(length: int, step: int) -> list[tuple[int, int]]:
    """Divide a length into parts of `step`; what would be left, if less than half of that, goes to the last part."""
    starts = range(0, max(1, length - step // 2), step)
    return list(zip(starts, [*starts[1:], length], strict=True))


def _convolutions(module: nn.Module) -> list[nn.Conv1d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv1d)]


def _padded_stage(stage: Stage, convolutions: list[nn.Conv1d], x: torch.Tensor) -> torch.Tensor:
    """Apply convolutions that keep the length, and a last one with a stride, to parts of x (1, C, T) with margins.

    Within the margin, zeros beyond the part's ends reach the outputs, which are cut off; at the ends of the whole, the
    part has no margin.
    """
    *_, last = convolutions
    stride, length = last.stride[0], x.shape[-1]
    step = max(1, CHUNK // max(conv.in_channels for conv in convolutions) // stride) * stride
    margin = sum(int(conv.padding[0]) for conv in convolutions) + last.kernel_size[0]
    margin = math.ceil(margin / stride) * stride
    outputs = []
    for start, end in _parts(length, step):
        begins = max(0, start - margin)
        output = stage(x[..., begins : end + margin])
        skipped = (start - begins) // stride
        outputs.append(output[..., skipped : None if end == length else skipped + (end - start) // stride])
    return torch.cat(outputs, dim=-1)


def _unpadded_stage(stage: Stage, conv: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """Apply a convolution without padding, and what follows at each position, to parts of x (1, C, T)."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    num_outputs = (x.shape[-1] - kernel) // stride + 1
    step = max(1, CHUNK // conv.in_channels // stride)
    outputs = [
        stage(x[..., first * stride : (last - 1) * stride + kernel]) for first, last in _parts(num_outputs, step)
    ]
    return torch.cat(outputs, dim=-1)


def _normalized_channels(layer: HubertGroupNormConvLayer, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer that normalizes each channel over time to some channels at a time."""
    conv, norm = layer.conv, layer.layer_norm
    num_outputs = (x.shape[-1] - conv.kernel_size[0]) // conv.stride[0] + 1
    step = max(1, CHUNK // num_outputs)
    output = x.new_empty(1, conv.out_channels, num_outputs)
    for first in range(0, conv.out_channels, step):
        part = slice(first, first + step)
        bias = None if conv.bias is None else conv.bias[part]
        channels = F.conv1d(x, conv.weight[part], bias, conv.stride)
        normed = F.group_norm(channels, channels.shape[1], norm.weight[part], norm.bias[part], norm.eps)
        output[:, part] = layer.activation(normed)
    return output
