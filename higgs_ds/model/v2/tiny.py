"""Small models of Higgs Audio v2 to build: configuration, tokenizer, processor, and random weights."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import (
    DacFeatureExtractor,
    GenerationConfig,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    HiggsAudioV2TokenizerModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # over the tensors of a model; errors and warnings stay
CODEBOOK_SIZE = 1024
# In the order of their ids, which follow those of the text.
SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|recipient|>", "<|scene_desc_start|>", "<|scene_desc_end|>", "<|audio_bos|>", "<|audio_eos|>",
    "<|audio_out_bos|>", "<|reserved_special_token_6|>", "<|AUDIO|>", "<|AUDIO_OUT|>",
]  # fmt: skip


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


def random_model(tokenizer: PreTrainedTokenizerFast) -> HiggsAudioV2ForConditionalGeneration:
    """Return a model without values, and with the generation settings of its folder."""
    config = base_config(tokenizer)
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    model.generation_config = greedy_generation(config)
    return model


def weight_std(name: str, parameter: torch.Tensor) -> float:
    """Return a standard deviation with which adapters alone can memorize clips."""
    if "embed_audio_tokens" in name:
        return 1 / math.sqrt(8)  # eight of them are summed at each position
    if "embed_tokens" in name:
        return 1.0
    return (1.5 if "lm_head" in name else 1.0) / math.sqrt(parameter.shape[1])


def write_companions(folder: Path, tokenizer: PreTrainedTokenizerBase, codec_folder: Path) -> None:
    """Write the tokenizer and what names the codec, which are transformers' processor."""
    build_processor(tokenizer, codec_folder).save_pretrained(folder)


def build_processor(tokenizer: PreTrainedTokenizerBase, codec_folder: Path) -> HiggsAudioV2Processor:
    """Build transformers' processor with this project's chat template. The saved processor names the codec's folder."""
    return HiggsAudioV2Processor(
        feature_extractor=DacFeatureExtractor(sampling_rate=24000, hop_length=1),
        tokenizer=tokenizer,
        audio_tokenizer=HiggsAudioV2TokenizerModel.from_pretrained(codec_folder),
        chat_template=files("higgs_ds.bases").joinpath("assets/chat_template.jinja").read_text(encoding="utf-8"),
    )
