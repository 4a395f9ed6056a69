"""The random bases: a tiny model of a family with its codec and tokenizer, for trying out the trainer and for tests.

It has the classes, layout and special tokens of a real base, and the same code loads it. Its weights are random: it
generates noise until it is trained, and its codec decodes any codes to noise. It is built from fixed seeds, so that it
is the same on every machine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    HiggsAudioV2TokenizerConfig,
    HiggsAudioV2TokenizerModel,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from higgs_ds.common.files import new_folder, saving
from higgs_ds.model.family import Family

disable_progress_bar()  # over the tensors of a model; errors and warnings stay
CODEC_NAME = "tiny-random-codec"
CODEBOOK_SIZE = 1024


def build_random_base(base: Path, family: Family) -> None:
    """Build the random base and, beside it, its codec, unless they exist. Several processes may call it at once.

    Raises:
        SaveError: it cannot be written.
    """
    codec, tiny = base.with_name(CODEC_NAME), family.tiny()
    if not codec.is_dir():
        with saving(codec), new_folder(codec) as folder, _seeded(21):
            save_model(_build_codec(), folder)
    if not base.is_dir():
        with saving(base), new_folder(base) as folder, _seeded(20):
            tokenizer = tiny.with_special_tokens(_byte_tokenizer())
            model = tiny.random_model(tokenizer)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim == 2:
                        parameter.copy_(_uniform(parameter.shape, tiny.weight_std(name, parameter)))
            model = model.to(torch.bfloat16)
            save_model(model, folder)
            model.generation_config.save_pretrained(folder)
            tiny.write_companions(folder, tokenizer, codec)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write what `save_pretrained` writes, on any rank: in a process group, that writes nothing except on the first."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the random numbers in the block, and restore the generator's state after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _uniform(shape: torch.Size, std: float) -> torch.Tensor:
    """Uniform numbers with standard deviation `std`. Unlike normal ones, they are bit-identical on every processor."""
    return (2 * torch.rand(shape) - 1) * (std * math.sqrt(3))


def random_config(family: Family) -> Any:
    """Return the configuration of a random base without building the base."""
    tiny = family.tiny()
    return tiny.base_config(tiny.with_special_tokens(_byte_tokenizer()))


def _byte_tokenizer() -> Tokenizer:
    """Build a byte-level tokenizer without merges: one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def codec_config(latent: int, encoder: int, decoder: int, semantic: int) -> HiggsAudioV2TokenizerConfig:
    """A codec with the released codec's interface at a hundredth of its size.

    24 kHz, hop 960, 25 frames/s, 8 codebooks of 1024 codes.

    Args:
        latent: width of the vectors that are quantized.
        encoder, decoder: width of the first convolution of each.
        semantic: width of the semantic branch's convolutions.
    """
    ratios = [8, 5, 4, 2, 3]
    return HiggsAudioV2TokenizerConfig(
        target_bandwidths=[0.5, 1, 1.5, 2],
        sample_rate=24000,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=latent,
        acoustic_model_config={
            "model_type": "dac",
            "encoder_hidden_size": encoder,
            "decoder_hidden_size": decoder,
            "downsampling_ratios": ratios,
            "upsampling_ratios": ratios,
            "hidden_size": latent,
        },
        semantic_model_config={
            "model_type": "hubert",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "conv_dim": [semantic] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
        },
    )


def _build_codec() -> HiggsAudioV2TokenizerModel:
    config = codec_config(latent=16, encoder=4, decoder=64, semantic=16)
    model = HiggsAudioV2TokenizerModel(config).eval()
    # Making it draws random numbers, whose count differs between versions of transformers.
    with torch.no_grad(), _seeded(22):
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("alpha"):
                parameter.copy_(_uniform(parameter.shape, math.sqrt(1 / parameter[0].numel())))
            elif name.endswith("bias"):
                parameter.zero_()
        for quantizer in model.quantizer.quantizers:
            # The initial codebooks are zero, so that every code would be the same.
            quantizer.codebook.embed.copy_(_uniform(quantizer.codebook.embed.shape, 1.0))
        _scale_layers(model, _uniform(torch.Size([1, 1, config.sample_rate]), 0.1))
    return model


def _scale_layers(model: HiggsAudioV2TokenizerModel, noise: torch.Tensor) -> None:
    """Scale single layers so that, for one second of noise, each part's output has a size that the next part can use.

    The factors are powers of two: measured sizes differ in their last digits between machines, but weights must not.
    """

    def size(output: torch.Tensor) -> torch.Tensor:
        return output.std().log2().round().exp2()

    encoder, decoder = model.acoustic_encoder, model.acoustic_decoder
    encoder.conv2.weight /= size(encoder(noise))
    semantic = model._extract_semantic_features(noise).transpose(1, 2)
    model.encoder_semantic.conv_blocks[-1].conv.weight /= size(model.encoder_semantic(semantic))
    joined = torch.cat([encoder(noise), model.encoder_semantic(semantic)], dim=1).transpose(1, 2)
    model.fc.weight /= size(model.fc(joined))
    for quantizer in model.quantizer.quantizers:
        quantizer.project_in.weight /= size(quantizer.project_in(model.fc(joined)))
        quantizer.project_out.weight /= len(model.quantizer.quantizers)
    decoder.conv2.weight /= 8 * size(model.decode(model.encode(noise).audio_codes).audio_values)
