"""Higgs Audio v3 as a model of transformers: Qwen3's trunk between tables of text and of audio codes.

Module names are those of the released files, so that these load, and adapters are named, without any renaming.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from higgs_ds.model.v3.config import HiggsQwen3Config
from higgs_ds.model.v3.generation import CodeSampler
from higgs_ds.model.v3.layout import CODEC_PREFIX, TEXT_HEAD


class RoundedRotaryEmbedding(Qwen3RotaryEmbedding):
    """Cosines and sines rounded to bf16, as in the training of the released model, whatever the model's dtype."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = super().forward(x.float(), position_ids)
        return cos.bfloat16().to(x.dtype), sin.bfloat16().to(x.dtype)


class Trunk(Qwen3Model):
    """Qwen3 without its embedding."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.embed_tokens
        self.rotary_emb = RoundedRotaryEmbedding(config)


class AudioTable(nn.Embedding):
    """One vector for each code of each codebook: (C x S, H), the rows of codebook k from k x S on.

    If it is tied, it is the head, too. One module then has both functions, because ZeRO-3 gathers a weight only around
    calls of its module.
    """

    def forward(self, codes: torch.Tensor, function: Callable[[torch.Tensor, torch.Tensor], Any] | None = None) -> Any:
        """Return the sums (..., H) of the vectors of codes (..., C); with a `function`, its value for x and the weight.

        Args:
            codes: the codes, or what the function gets as x.
        """
        if function is not None:
            return function(codes, self.weight)
        return super().forward(_with_offsets(codes, self.num_embeddings)).sum(-2)

    def streamed(self, source: Any, name: str) -> nn.Module:
        """Return a table whose weight is read from a `streaming.WeightSource` by the name of this module."""
        return _StreamedTable(source, name, self.num_embeddings)


class _StreamedTable(nn.Module):
    def __init__(self, source: Any, name: str, num_codes: int) -> None:
        super().__init__()
        self.source, self.name, self.num_codes = source, name, num_codes

    def forward(self, x: torch.Tensor, function: Any = None) -> torch.Tensor:
        if function is not None:  # the product with the head
            return self.source.linear(self.name, x)
        return self.source.rows(f"{self.name}.weight", _with_offsets(x, self.num_codes)).sum(-2)


def _with_offsets(codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Return the rows (..., C) of a table of `num_codes` rows for codes (..., C)."""
    size = num_codes // codes.shape[-1]
    return codes + torch.arange(codes.shape[-1], device=codes.device) * size


class AudioHead(nn.Linear):
    """A head of its own, for a model that is not tied."""

    def forward(self, x: torch.Tensor, function: Callable[[torch.Tensor, torch.Tensor], Any] | None = None) -> Any:
        return super().forward(x) if function is None else function(x, self.weight)

    def streamed(self, source: Any, name: str) -> nn.Module:
        """Return a head whose weight is read from a `streaming.WeightSource` by the name of this module."""
        return _StreamedTable(source, name, self.out_features)


class _AudioEmbedding(nn.Module):
    def __init__(self, config: HiggsQwen3Config) -> None:
        super().__init__()
        self.embedding = AudioTable(config.num_codebooks * config.codebook_size, config.hidden_size)


class _Embeddings(nn.Module):
    def __init__(self, config: HiggsQwen3Config) -> None:
        super().__init__()
        self.text_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.modality_embeddings = nn.ModuleList([_AudioEmbedding(config)])


class _Heads(nn.Module):
    def __init__(self, config: HiggsQwen3Config) -> None:
        super().__init__()
        rows = config.num_codebooks * config.codebook_size
        self.modality_heads = nn.ModuleList([AudioHead(config.hidden_size, rows, bias=False)])


class _Tied(nn.Module):
    def __init__(self, config: HiggsQwen3Config) -> None:
        super().__init__()
        self.embedding = _Embeddings(config)
        if not config.is_tied:
            self.head = _Heads(config)


class HiggsMultimodalQwen3ForConditionalGeneration(PreTrainedModel):
    """The model without a text head, which nothing here needs: no text is predicted."""

    config: HiggsQwen3Config
    config_class = HiggsQwen3Config
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3DecoderLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [f"^{re.escape(name)}" for name in (CODEC_PREFIX, TEXT_HEAD)]

    def __init__(self, config: HiggsQwen3Config) -> None:
        super().__init__(config)
        self.tied = _Tied(config)
        self.body = Trunk(config.trunk)
        # What vLLM-Omni's configuration for this model has; a base may have its own.
        self.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=50, top_p=0.95)
        self.post_init()

    @property
    def model(self) -> Trunk:
        """The trunk, by the name that it has in other families."""
        return self.body

    @property
    def text_embedding(self) -> nn.Embedding:
        return self.tied.embedding.text_embedding

    @property
    def audio_table(self) -> AudioTable:
        embedding: Any = self.tied.embedding.modality_embeddings[0]
        return embedding.embedding

    @property
    def audio_lm_head(self) -> Any:
        """The module whose weight is the head: a call with a function gets x and that weight."""
        return self.audio_table if self.config.is_tied else self.tied.head.modality_heads[0]

    def get_input_embeddings(self) -> nn.Module:
        return self.text_embedding

    def embed(self, input_ids: torch.Tensor, is_audio: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (B, T, H) of ids (B, T), with those of rows of codes (A, C) where `is_audio`."""
        return self.text_embedding(input_ids).masked_scatter(is_audio[..., None], self.audio_table(codes))

    def audio_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., C, S) of hidden states (..., H), which the last norm has normed."""
        return self.audio_lm_head(hidden, nn.functional.linear).unflatten(-1, (self.config.num_codebooks, -1))

    def forward(
        self,
        input_ids: torch.Tensor,
        audio_input_ids: torch.Tensor | None = None,
        audio_input_ids_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the trunk's outputs for ids (B, T).

        Args:
            audio_input_ids: rows of codes (B, R, C); of a sequence with fewer than R, the last ones are used.
            audio_input_ids_mask: bool (B, T), where they are in the sequence.
        """
        if audio_input_ids is None or audio_input_ids_mask is None:
            return self.body(inputs_embeds=self.text_embedding(input_ids), **kwargs)
        num_rows = audio_input_ids.shape[1]
        first = num_rows - audio_input_ids_mask.sum(1, keepdim=True)
        used = torch.arange(num_rows, device=first.device) >= first
        embedded = self.embed(input_ids, audio_input_ids_mask, audio_input_ids[used])
        return self.body(inputs_embeds=embedded, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        audio_input_ids: torch.Tensor | None = None,
        audio_input_ids_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 2048,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        logits_processor: Any = None,
        synced_gpus: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        """Generate the rows of one clip after each prompt (B, T), padded on the left.

        Args:
            audio_input_ids, audio_input_ids_mask: as in `forward`, padded on the left.
            attention_mask: (B, T), 0 for padding; by default, there is none.
            do_sample, temperature, top_k, top_p: by default, those of the model's generation settings.
            logits_processor: see `CodeSampler`.
            synced_gpus: go on until every rank has ended, because all compute with each other's weights.

        Returns:
            Rows (B, R, C): those of the prompts, followed by the new ones, up to the end of the longest clip.
        """
        given = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings: dict[str, Any] = {
            name: getattr(self.generation_config, name) if value is None else value for name, value in given.items()
        }
        sampler = CodeSampler(self.config.num_codebooks, **settings, logits_processor=logits_processor)
        no_rows = input_ids.new_zeros(len(input_ids), 0, self.config.num_codebooks)
        prompt = no_rows if audio_input_ids is None else audio_input_ids
        cache = DynamicCache(config=self.config.trunk)
        places = _Places(attention_mask)
        outputs = self(
            input_ids,
            audio_input_ids,
            audio_input_ids_mask,
            past_key_values=cache,
            use_cache=True,
            **places.arguments(),
        )
        rows: list[torch.Tensor] = []
        goes_on = True
        while _any_rank(goes_on, synced_gpus, input_ids.device):
            logits = self.audio_logits(outputs.last_hidden_state[:, -1])
            if goes_on:
                row = sampler.next_rows(logits)
                rows.append(row)
            goes_on = goes_on and not sampler.has_ended and len(rows) < max_new_tokens
            if goes_on or synced_gpus:
                embedded = self.audio_table(row)[:, None]
                places.advance()
                outputs = self.body(inputs_embeds=embedded, past_key_values=cache, use_cache=True, **places.arguments())
        return torch.cat([prompt, torch.stack(rows, dim=1)], dim=1)


class _Places:
    """Which positions of padded sequences are padding, and the numbers of the others; nothing if none is padding."""

    def __init__(self, attention_mask: torch.Tensor | None) -> None:
        self.mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        self.numbers = None if self.mask is None else (self.mask.cumsum(-1) - 1).clamp(min=0)

    def arguments(self) -> dict[str, Any]:
        """Return arguments of the trunk for the positions that it has not seen."""
        return {} if self.mask is None else {"attention_mask": self.mask, "position_ids": self.numbers}

    def advance(self) -> None:
        """Go on by one position, which is no padding."""
        if self.mask is not None and self.numbers is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            self.numbers = self.numbers[:, -1:] + 1


def _any_rank(value: bool, synced: bool, device: torch.device) -> bool:
    """Return whether a value is true on any rank; without `synced`, on this one."""
    if not synced:
        return value
    shared = torch.tensor(float(value), device=device)
    torch.distributed.all_reduce(shared)
    return shared.item() > 0
