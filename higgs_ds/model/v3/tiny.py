"""Small models of Higgs Audio v3 to build: configuration, tokenizer and random weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from higgs_ds.model.v3.config import HiggsQwen3Config, config_of
from higgs_ds.model.v3.layout import EOC_ID, MODEL_TYPE
from higgs_ds.model.v3.modeling import HiggsMultimodalQwen3ForConditionalGeneration
from higgs_ds.model.v3.prompt import LAYOUT_TOKENS

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, *LAYOUT_TOKENS)  # in the order of their ids, which follow those of the text
NUM_CODEBOOKS = 8


def with_special_tokens(backend: Tokenizer, inline_tags: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Append the special tokens to a tokenizer and wrap it for transformers. Changes `backend` in place."""
    tokens = [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, *inline_tags)]
    backend.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def base_config(tokenizer: PreTrainedTokenizerFast, **geometry: Any) -> HiggsQwen3Config:
    """Return the configuration of a base with this tokenizer.

    Args:
        geometry: values of the trunk that replace the default of two layers of width 256.
    """
    trunk = {
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    } | geometry
    audio = {
        "encoder_type": "discrete",
        "num_codebooks": NUM_CODEBOOKS,
        "vocab_size": EOC_ID + 1,
        "tie_word_embeddings": True,
        "out_dim": trunk["hidden_size"],
    }
    return config_of({"model_type": MODEL_TYPE, "text_config": trunk, "audio_encoder_config": audio})


def greedy_generation(config: HiggsQwen3Config) -> GenerationConfig:
    """Return the default generation settings of a built-in base: greedy, at most 30 s."""
    return GenerationConfig(do_sample=False, max_new_tokens=750)  # 25 frames/s


def random_model(tokenizer: PreTrainedTokenizerFast) -> HiggsMultimodalQwen3ForConditionalGeneration:
    """Return a model without values, and with the generation settings of its folder."""
    config = base_config(tokenizer)
    model = HiggsMultimodalQwen3ForConditionalGeneration(config)
    model.generation_config = greedy_generation(config)
    return model


def weight_std(name: str, parameter: torch.Tensor) -> float:
    """Return a standard deviation with which adapters alone can memorize clips."""
    if "text_embedding" in name:
        return 1.0
    return (1.5 if "modality" in name else 1.0) / math.sqrt(parameter.shape[1])


def write_companions(folder: Path, tokenizer: PreTrainedTokenizerBase, codec_folder: Path) -> None:
    """Write the tokenizer, and the codec in a folder of its own."""
    tokenizer.save_pretrained(folder)
    shutil.copytree(codec_folder, folder / "audio_tokenizer")
