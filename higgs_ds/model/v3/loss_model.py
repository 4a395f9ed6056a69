"""Higgs Audio v3 in training: Qwen3's layers without routing, and the loss of the audio alone."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP, Qwen3RMSNorm

from higgs_ds.model.gathering import GatheringLinear
from higgs_ds.model.head_loss import Chunks, head_loss
from higgs_ds.model.lean_layers import AttentionForward, FFNForward, NormForward
from higgs_ds.model.lean_ops import Permute
from higgs_ds.model.loss_model import LossModel
from higgs_ds.model.offload import save_on_host
from higgs_ds.model.v3.config import HiggsQwen3Config


def describe_model(config: HiggsQwen3Config) -> str:
    """Describe a model's architecture in one line."""
    tied = "the head is the table of codes" if config.is_tied else "a head of its own"
    return (
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, one FFN in each; {config.num_codebooks} "
        f"codebooks of {config.codebook_size}, delayed; {tied}; {str(config.dtype).removeprefix('torch.')} in its files"
    )


class LeanNorm(NormForward, Qwen3RMSNorm):
    """A norm that keeps only its input."""


class LeanAttention(AttentionForward, Qwen3Attention):
    """An attention with fused projections, whose queries and keys are normed."""

    def normed(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own: Any = self
        return own.q_norm(query), own.k_norm(key)


class LeanMLP(FFNForward, Qwen3MLP):
    """A fused FFN."""


class LeanLayer(Qwen3DecoderLayer):
    """A decoder layer for sequences (B, T, H).

    With `predicting` (K,), some positions numbered through the batch, the layer returns only their outputs (K, H), and
    applies its FFN only to them.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        rotations: tuple[torch.Tensor, torch.Tensor],
        predicting: torch.Tensor | None = None,
    ) -> torch.Tensor:
        attended = self.self_attn(*self.input_layernorm(hidden, with_recipe=True), rotations)
        rows = (hidden + attended).flatten(0, 1)
        del attended  # what is not kept for the backward pass is freed before the FFN
        if predicting is not None:
            rows = rows.index_select(0, predicting)
        outputs = rows + self.mlp(*self.post_attention_layernorm(rows, with_recipe=True))
        return outputs.view_as(hidden) if predicting is None else outputs


TRAINING_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Qwen3DecoderLayer: LeanLayer,
    Qwen3Attention: LeanAttention,
    Qwen3MLP: LeanMLP,
    Qwen3RMSNorm: LeanNorm,
    nn.Linear: GatheringLinear,
}
GENERATION_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    LeanLayer: Qwen3DecoderLayer,
    LeanAttention: Qwen3Attention,
}


class AudioLossModel(LossModel):
    """The model with its loss, which is that of the audio: no text is predicted."""

    training_classes = TRAINING_CLASSES
    generation_classes = GENERATION_CLASSES
    chunks: Chunks | None = None  # those for the device

    def set_chunks(self, chunks: Chunks) -> None:
        self.chunks = chunks

    def forward(  # type: ignore[override]
        self,
        text_ids: torch.Tensor,
        codes: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        audio_places: torch.Tensor,
        audio_targets: torch.Tensor,
        target_weights: torch.Tensor,
        **_: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the loss, as `LossModel.forward`. Its sum of the text is 0."""
        hidden = self.decode(text_ids, codes, positions, places, positions[audio_places])
        selected = self.higgs.model.norm(hidden)
        loss_of = partial(head_loss, targets=audio_targets, target_weights=target_weights[1:], chunks=self.chunks)
        losses, sums, hits = self.higgs.audio_lm_head(selected, loss_of)
        ends = audio_targets == self.higgs.config.audio_stream_eos_id
        nothing = sums.new_zeros(1)
        counted = torch.cat([nothing, hits.sum(0), torch.stack([(hits & ends).sum(), ends.sum()])])
        return losses, torch.cat([nothing, sums]), counted.float()

    def decode(
        self,
        text_ids: torch.Tensor,
        codes: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        predicting: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (B, T, H), after the last layer and before the final norm.

        With `predicting`, they are those of some positions (`LeanLayer`). They are in the model's dtype, but in float32
        for a model in fp16.
        """
        higgs: Any = self.higgs
        packed = torch.cat([higgs.text_embedding(text_ids), higgs.audio_table(codes)])
        hidden = Permute.apply(packed, places.flatten(), positions).view(*places.shape, -1)
        rotations = higgs.model.rotary_emb(hidden, torch.arange(places.shape[1], device=places.device)[None])
        if hidden.dtype == torch.float16:
            # The sum of all layers' outputs may leave fp16's range, although none of them does. The norms return fp16.
            hidden = hidden.float()
        for layer in higgs.model.layers:
            offloaded = self.offload_checkpoints and layer.gradient_checkpointing
            with save_on_host() if offloaded else contextlib.nullcontext():
                hidden = layer(hidden, rotations, predicting if layer is higgs.model.layers[-1] else None)
        return hidden
