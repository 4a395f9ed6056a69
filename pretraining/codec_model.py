"""The codec to train: transformers' own classes, at a size for two CPU cores."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import HiggsAudioV2TokenizerModel

from higgs_ds.bases.tiny_random import codec_config

LATENT = 32
SEMANTIC = 16  # width of the semantic features concatenated to the latents
RESIDUAL = 0.2
# From this encoder block on, convolutions use no neighbours, so a word's codes hardly depend on the words next to it.
FIRST_SHORT_SIGHTED_BLOCK = 2


def build_codec() -> HiggsAudioV2TokenizerModel:
    """Return an untrained codec with the released codec's interface, whose semantic branch adds nothing."""
    config = codec_config(LATENT, encoder=8, decoder=256, semantic=4)
    model = HiggsAudioV2TokenizerModel(config).eval()
    with torch.no_grad():
        for part in (model.acoustic_encoder, model.acoustic_decoder):
            for name, layer in part.named_modules():
                if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                    fan_in = layer.in_channels * layer.kernel_size[0] / layer.stride[0] ** layer.transposed
                    layer.weight.normal_(0, math.sqrt(1 / fan_in))
                    assert layer.bias is not None
                    layer.bias.zero_()
                    if "res_unit" in name and name.endswith("conv2"):
                        layer.weight *= RESIDUAL  # otherwise sums of sixteen units grow until nothing is learned
        # The acoustic encoder's latent vector is quantized unchanged.
        _only_acoustic(model.fc, LATENT + SEMANTIC)
        _only_acoustic(model.fc2, LATENT)
        for quantizer in model.quantizer.quantizers:
            _only_acoustic(quantizer.project_in, LATENT)
            _only_acoustic(quantizer.project_out, LATENT + SEMANTIC)
    _make_short_sighted(model)
    _scale_layers(model)
    return model.requires_grad_(False)


def _only_acoustic(layer: nn.Linear, outputs: int) -> None:
    assert layer.out_features == outputs
    layer.weight.copy_(torch.eye(layer.out_features, layer.in_features))
    layer.weight[:, LATENT:] = 0
    layer.bias.zero_()


@torch.no_grad()
def _scale_layers(model: HiggsAudioV2TokenizerModel) -> None:
    """Scale the last layers of encoder and decoder so that latents and sound start at their final magnitude."""
    noise = 0.1 * torch.randn(1, 24000)
    model.acoustic_encoder.conv2.weight /= latents_of(model, noise).std()
    model.acoustic_decoder.conv2.weight *= 0.1 / sound_of(model, latents_of(model, noise)).std()


def _make_short_sighted(model: HiggsAudioV2TokenizerModel) -> None:
    """Zero all taps except the middle ones, and their gradients."""
    encoder = model.acoustic_encoder
    far = [encoder.conv2]
    for block in encoder.block[FIRST_SHORT_SIGHTED_BLOCK:]:
        far += [unit.conv1 for unit in (block.res_unit1, block.res_unit2, block.res_unit3)]
    for layer in far:
        kernel = layer.kernel_size[0]
        middle = torch.arange(kernel) == kernel // 2
        with torch.no_grad():
            layer.weight.copy_(layer.weight * middle * math.sqrt(kernel))
        layer.weight.register_hook(lambda gradient, middle=middle: gradient * middle)


def latents_of(model: HiggsAudioV2TokenizerModel, waveforms: torch.Tensor) -> torch.Tensor:
    """Return the latents (B, F, LATENT) that `encode` quantizes, of waveforms (B, num_samples) of whole frames."""
    return model.acoustic_encoder(waveforms[:, None]).transpose(1, 2)


def sound_of(model: HiggsAudioV2TokenizerModel, latents: torch.Tensor) -> torch.Tensor:
    """Return waveforms (B, num_samples) of latents (B, F, LATENT), as `decode` does."""
    return model.acoustic_decoder(latents.transpose(1, 2))[:, 0]
