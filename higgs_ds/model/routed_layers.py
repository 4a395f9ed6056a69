"""Decoder layers for batches in which text and audio are each contiguous, and heads that compute their loss.

transformers' layer selects text and audio by a mask, again in every layer, which synchronizes with the GPU each time.
Here all layers share the order in which the batch is packed (`data.collate.Batch`). Results are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2MLP,
    HiggsAudioV2RMSNorm,
)

from higgs_ds.model.head_loss import head_loss
from higgs_ds.model.part_modules import AudioAttentionLayer


@dataclass(frozen=True)
class Routing:
    """Maps between positions, the flat indices into (B, T), and places, the indices into the packed batch.

    The packed batch has the places of all text first, then those of all A audio positions.

    num_text: number of text places, with padding.
    positions: (N,), the position of each place.
    places: (B, T), the place of each position.
    audio_rows: (B, S), numbers of each sample's audio places, counted from the first audio place; A for padding.
    audio_at: (A,), the flat index of each audio place in `audio_rows`.
    audio_rotations: cosines and sines (B, S, D) of the positions in `audio_rows`, for audio self-attention.
    """

    num_text: int
    positions: torch.Tensor
    places: torch.Tensor
    audio_rows: torch.Tensor
    audio_at: torch.Tensor
    audio_rotations: tuple[torch.Tensor, torch.Tensor] | None = None

    def to_sequences(self, x: torch.Tensor) -> torch.Tensor:
        """Reorder places (N, H) to positions (B, T, H)."""
        return _Permute.apply(x, self.places.flatten(), self.positions).view(*self.places.shape, -1)

    def to_places(self, x: torch.Tensor) -> torch.Tensor:
        """Reorder positions (B, T, H) to places (N, H)."""
        return _Permute.apply(x.flatten(0, 1), self.positions, self.places.flatten())

    def to_audio_rows(self, audio: torch.Tensor) -> torch.Tensor:
        """Reorder audio places (A, H) to the audio of each sample (B, S, H), padded with zeros at the end."""
        padded = torch.cat([audio, audio.new_zeros(1, audio.shape[1])])
        return padded.index_select(0, self.audio_rows.flatten()).view(*self.audio_rows.shape, -1)

    def to_audio_places(self, rows: torch.Tensor) -> torch.Tensor:
        """Reorder the audio of each sample (B, S, H) to audio places (A, H)."""
        return rows.flatten(0, 1).index_select(0, self.audio_at)

    def with_audio_rotations(self, rotations: tuple[torch.Tensor, torch.Tensor]) -> Routing:
        """Add `audio_rotations`, selected from cosines and sines of all columns (1, T, D); padding gets any of them."""
        columns = self.positions[self.num_text :] % self.places.shape[1]
        columns = torch.cat([columns, columns.new_zeros(1)])[self.audio_rows]
        cos, sin = rotations
        return replace(self, audio_rotations=(cos[0][columns], sin[0][columns]))


class _Permute(torch.autograd.Function):
    """Reorder rows. The backward pass gathers by the inverse order, where torch would scatter-add into zeros."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].index_select(0, ctx.inverse), None, None


class _Recompute(torch.autograd.Function):
    """Recompute a cheap function of tensors in the backward pass; only its inputs are kept.

    Other tensors that the function uses get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
            output = ctx.function(*inputs)
        input_gradients = iter(
            torch.autograd.grad(output, [tensor for tensor in inputs if tensor.requires_grad], gradients)
        )
        return None, *(next(input_gradients) if need else None for need in needed)


class LeanNorm(HiggsAudioV2RMSNorm):
    """A norm that keeps only its input for the backward pass; transformers' norm also keeps float32 copies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Recompute.apply(self._normalize, x, self.weight)

    def _normalize(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The steps of transformers' norm (Zhang and Sennrich 2019, arXiv 1910.07467); the weight may be trained."""
        x_float32 = x.float()
        scaled = x_float32 * torch.rsqrt(x_float32.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return weight * scaled.to(x.dtype)


class LeanMLP(HiggsAudioV2MLP):
    """An FFN that recomputes the output of its activation function, which is cheap, instead of keeping it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_Recompute.apply(self._activate_and_gate, self.gate_proj(x), self.up_proj(x)))

    def _activate_and_gate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate) * up


class RoutedLayer(HiggsAudioV2DecoderLayer):
    """A decoder layer for places (N, H)."""

    def forward(
        self, hidden: torch.Tensor, routing: Routing, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        text, audio = hidden[: routing.num_text], hidden[routing.num_text :]
        normed = torch.cat([self.input_layernorm(text), self.audio_input_layernorm(audio)])
        return self.attend_and_feed(hidden, normed, routing, position_embeddings)

    def attend_and_feed(
        self,
        hidden: torch.Tensor,
        normed: torch.Tensor,
        routing: Routing,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Apply what follows the first norms: the attention over all positions, and the two FFNs."""
        attended, _ = self.self_attn(routing.to_sequences(normed), position_embeddings=position_embeddings)
        hidden = hidden + routing.to_places(attended)
        text, audio = hidden[: routing.num_text], hidden[routing.num_text :]
        text = text + self.mlp(self.post_attention_layernorm(text))
        audio = audio + self.audio_mlp(self.audio_post_attention_layernorm(audio))
        return torch.cat([text, audio])


class RoutedAudioAttentionLayer(AudioAttentionLayer, RoutedLayer):
    """A decoder layer for places (N, H) whose audio positions attend to each other first."""

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, routing: Routing, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        text, audio = hidden[: routing.num_text], hidden[routing.num_text :]
        rows = routing.to_audio_rows(self.audio_input_layernorm(audio))
        attended, _ = self.audio_attn(rows, routing.audio_rotations)
        audio = audio + routing.to_audio_places(attended)
        normed = torch.cat([self.input_layernorm(text), self.audio_post_audio_attn_layer_norm(audio)])
        return self.attend_and_feed(torch.cat([text, audio]), normed, routing, position_embeddings)


# Classes of the decoder's modules in training. They are subclasses: a loaded module is converted by changing its class,
# keeps its weights and names, and works with transformers' activation checkpointing, unlike a replaced `forward`.
TRAINING_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    HiggsAudioV2DecoderLayer: RoutedLayer,
    AudioAttentionLayer: RoutedAudioAttentionLayer,
    HiggsAudioV2MLP: LeanMLP,
    HiggsAudioV2RMSNorm: LeanNorm,
}


class LossHead(nn.Linear):
    """A head that returns its loss. A loaded head is converted by changing its class.

    The loss is computed here because ZeRO-3 gathers a head's weight only around calls of its module.
    """

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `head_loss` of hidden states (K, H) and targets (K, P)."""
        return head_loss(hidden, self.weight, targets, target_weights)


# Classes that the modules are changed back to for generation.
GENERATION_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    RoutedLayer: HiggsAudioV2DecoderLayer,
    RoutedAudioAttentionLayer: AudioAttentionLayer,
    LossHead: nn.Linear,
}
