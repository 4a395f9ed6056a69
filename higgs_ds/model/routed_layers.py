"""The decoder's layers on text and audio that each lie in one piece, and heads that know their loss.

transformers' layer finds text and audio by a mask, in each layer anew, and each time a GPU has to wait for the answer.
Here a batch comes in an order (`data.collate.Batch`) that all layers share. The numbers are the same to the bit.
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
    """Where each position of a batch is: `positions` (N,) of the places, `places` (B, T) of the positions.

    `audio_rows` (B, S) has the audio of each sample without its text, by number, and A, that of all audio, for padding;
    `audio_at` (A,) is where each is there; `audio_rotations` are the cosines and sines of their positions, (B, S, D),
    for a model whose layers attend among audio.
    """

    num_text: int
    positions: torch.Tensor
    places: torch.Tensor
    audio_rows: torch.Tensor
    audio_at: torch.Tensor
    audio_rotations: tuple[torch.Tensor, torch.Tensor] | None = None

    def to_sequences(self, x: torch.Tensor) -> torch.Tensor:
        """From places (N, H) to positions (B, T, H)."""
        return _Permute.apply(x, self.places.flatten(), self.positions).view(*self.places.shape, -1)

    def to_places(self, x: torch.Tensor) -> torch.Tensor:
        """From positions (B, T, H) to places (N, H)."""
        return _Permute.apply(x.flatten(0, 1), self.positions, self.places.flatten())

    def to_audio_rows(self, audio: torch.Tensor) -> torch.Tensor:
        """From audio places (A, H) to the audio of each sample (B, S, H), with zeros behind it."""
        padded = torch.cat([audio, audio.new_zeros(1, audio.shape[1])])
        return padded.index_select(0, self.audio_rows.flatten()).view(*self.audio_rows.shape, -1)

    def to_audio_places(self, rows: torch.Tensor) -> torch.Tensor:
        """From the audio of each sample (B, S, H) to audio places (A, H)."""
        return rows.flatten(0, 1).index_select(0, self.audio_at)

    def with_audio_rotations(self, rotations: tuple[torch.Tensor, torch.Tensor]) -> Routing:
        """With those of `audio_rows`, from the cosines and sines of all columns (1, T, D); those of padding are any."""
        columns = self.positions[self.num_text :] % self.places.shape[1]
        columns = torch.cat([columns, columns.new_zeros(1)])[self.audio_rows]
        cos, sin = rotations
        return replace(self, audio_rotations=(cos[0][columns], sin[0][columns]))


class _Permute(torch.autograd.Function):
    """Rows in another order; backward takes them back by the inverse order, where torch would add into zeros."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].index_select(0, ctx.inverse), None, None


class _Recompute(torch.autograd.Function):
    """A cheap function of tensors, run again in the backward pass: its inputs are kept, none of its steps.

    Whatever else the function works with gets no gradient.
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
        made = iter(torch.autograd.grad(output, [tensor for tensor in inputs if tensor.requires_grad], gradients))
        return None, *(next(made) if need else None for need in needed)


class LeanNorm(HiggsAudioV2RMSNorm):
    """A norm that keeps its input alone. transformers' keeps float32 copies, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Recompute.apply(self._normed, x, self.weight)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """transformers' own steps (Zhang and Sennrich 2019, arXiv 1910.07467), of a weight that may get a gradient."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return weight * scaled.to(x.dtype)


class LeanMLP(HiggsAudioV2MLP):
    """An FFN that does not keep its activation function's output, which costs nothing to make again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_Recompute.apply(self._gated, self.gate_proj(x), self.up_proj(x)))

    def _gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
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
        """What follows the first norms: the attention that all share, and the two FFNs."""
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


# What the decoder's modules are trained as. They are subclasses: a loaded module becomes one by its class alone, keeps
# its weights and names, and is found by transformers' activation checkpointing, as a replaced `forward` would not be.
TRAINING_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    HiggsAudioV2DecoderLayer: RoutedLayer,
    AudioAttentionLayer: RoutedAudioAttentionLayer,
    HiggsAudioV2MLP: LeanMLP,
    HiggsAudioV2RMSNorm: LeanNorm,
}


class LossHead(nn.Linear):
    """A head that gives its loss. A loaded head becomes one by its class.

    The loss is made in here because ZeRO-3 gathers a head's weight around the calls of its module.
    """

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`loss.head_loss` of hidden states (K, H) and targets (K, P)."""
        return head_loss(hidden, self.weight, targets, target_weights)


# What a model is spoken with again.
GENERATION_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    RoutedLayer: HiggsAudioV2DecoderLayer,
    RoutedAudioAttentionLayer: AudioAttentionLayer,
    LossHead: nn.Linear,
}
