"""The random base: a tiny Higgs Audio v2 with its codec and tokenizer, for trying out the trainer and for tests.

It has the classes, layout and special tokens of a real base, and the same code loads it. Its weights are random: it
generates noise until it is trained, and its codec decodes any codes to noise. It is built from fixed seeds, so that it
is the same on every machine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DacFeatureExtractor,
    GenerationConfig,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    HiggsAudioV2TokenizerConfig,
    HiggsAudioV2TokenizerModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from higgs_ds.common.files import new_folder, saving

CODEC_NAME = "tiny-random-codec"
# In the order of their ids, which follow those of the text.
SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|recipient|>", "<|scene_desc_start|>", "<|scene_desc_end|>", "<|audio_bos|>", "<|audio_eos|>",
    "<|audio_out_bos|>", "<|reserved_special_token_6|>", "<|AUDIO|>", "<|AUDIO_OUT|>",
]  # fmt: skip
CODEBOOK_SIZE = 1024


def build_random_base(base: Path) -> None:
    """Build the random base and, beside it, its codec, unless they exist. Several processes may call it at once.

    Raises:
        SaveError: it cannot be written.
    """
    codec = base.with_name(CODEC_NAME)
    if not codec.is_dir():
        with saving(codec), new_folder(codec) as folder, _seeded(21):
            save_model(_build_codec(), folder)
    if not base.is_dir():
        with saving(base), new_folder(base) as folder, _seeded(20):
            tokenizer = _build_tokenizer()
            model = _build_model(tokenizer)
            save_model(model, folder)
            model.generation_config.save_pretrained(folder)
            build_processor(tokenizer, codec).save_pretrained(folder)


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


def _build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer without merges: one token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return with_special_tokens(backend)


def with_special_tokens(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Append the special tokens to a tokenizer and wrap it for transformers. Changes `backend` in place."""
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )


def random_config() -> HiggsAudioV2Config:
    """Return the configuration of the random base without building the base."""
    return base_config(_build_tokenizer())


def base_config(tokenizer: PreTrainedTokenizerFast, **geometry: Any) -> HiggsAudioV2Config:
    """Return the configuration of a base with this tokenizer.

    Args:
        geometry: values that replace the default of two dual-FFN layers of width 256.
    """
    token = tokenizer.convert_tokens_to_ids
    values = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    return HiggsAudioV2Config(
        **values | geometry,
        vocab_size=len(tokenizer),
        num_codebooks=8,
        codebook_size=CODEBOOK_SIZE + 2,
        pad_token_id=token("<|end_of_text|>"),
        bos_token_id=token("<|begin_of_text|>"),
        eos_token_id=token("<|eot_id|>"),
        audio_token_id=token("<|AUDIO_OUT|>"),
        audio_bos_token_id=token("<|audio_out_bos|>"),
        audio_delay_token_id=token("<|reserved_special_token_6|>"),
        audio_stream_bos_id=CODEBOOK_SIZE,
        audio_stream_eos_id=CODEBOOK_SIZE + 1,
    )


def greedy_generation(config: HiggsAudioV2Config) -> GenerationConfig:
    """Return the default generation settings of a base: greedy, at most 30 s."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
        max_new_tokens=750,  # 25 frames/s
    )


def _build_model(tokenizer: PreTrainedTokenizerFast) -> HiggsAudioV2ForConditionalGeneration:
    """Build a model with weights large enough that adapters alone can memorize clips."""
    config = base_config(tokenizer)
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(_uniform(parameter.shape, _weight_std(name, parameter)))
    model.generation_config = greedy_generation(config)
    return model.to(torch.bfloat16)


def _weight_std(name: str, parameter: torch.Tensor) -> float:
    if "embed_audio_tokens" in name:
        return 1 / math.sqrt(8)  # eight of them are summed at each position
    if "embed_tokens" in name:
        return 1.0
    return (1.5 if "lm_head" in name else 1.0) / math.sqrt(parameter.shape[1])


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


def build_processor(tokenizer: PreTrainedTokenizerBase, codec_folder: Path) -> HiggsAudioV2Processor:
    """Build transformers' processor with this project's chat template. The saved processor names the codec's folder."""
    return HiggsAudioV2Processor(
        feature_extractor=DacFeatureExtractor(sampling_rate=24000, hop_length=1),
        tokenizer=tokenizer,
        audio_tokenizer=HiggsAudioV2TokenizerModel.from_pretrained(codec_folder),
        chat_template=files("higgs_ds.bases").joinpath("assets/chat_template.jinja").read_text(encoding="utf-8"),
    )
