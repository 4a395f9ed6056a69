"""Decoder layers for batches in which text and audio are each contiguous, and heads that compute their loss.

transformers' layer selects text and audio by a mask, again in every layer, which synchronizes with the GPU each time.
Here all layers share the order in which the batch is packed (`data.collate.Batch`). Results are bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2Attention,
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2MLP,
    HiggsAudioV2RMSNorm,
    eager_attention_forward,
)

from higgs_ds.model.fused_lora import Recipe, fused_ffn, fused_linears
from higgs_ds.model.gathering import GatheringLinear
from higgs_ds.model.head_loss import Chunks, head_loss
from higgs_ds.model.lean_ops import Permute, RMSNorm, Rotate, scaled
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
        return Permute.apply(x, self.places.flatten(), self.positions).view(*self.places.shape, -1)

    def to_places(self, x: torch.Tensor) -> torch.Tensor:
        """Reorder positions (B, T, H) to places (N, H)."""
        return Permute.apply(x.flatten(0, 1), self.positions, self.places.flatten())

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


class LeanNorm(HiggsAudioV2RMSNorm):
    """A norm that keeps only its input for the backward pass; transformers' norm also keeps float32 copies."""

    def forward(self, x: torch.Tensor, with_recipe: bool = False) -> Any:
        """Return the normed rows; `with_recipe`, also how to compute them again."""
        normed, scale = RMSNorm.apply(x, self.weight, self.variance_epsilon)
        if not with_recipe:
            return normed
        # A copy of the weight, because ZeRO-3 takes its values away after this call.
        return normed, Recipe(scaled, (x.detach(), self.weight.detach().clone(), scale))


class LeanAttention(HiggsAudioV2Attention):
    """transformers' attention, without a cache and with fused projections."""

    def forward(
        self, x: torch.Tensor, rotations: tuple[torch.Tensor, torch.Tensor], recipe: Recipe | None = None
    ) -> torch.Tensor:
        """Return the outputs (B, T, H) of the attention over x (B, T, H).

        Args:
            rotations: cosines and sines (B or 1, T, D).
            recipe: how to compute `x` again.
        """
        projected = fused_linears([self.q_proj, self.k_proj, self.v_proj], x, recipe)
        query, key, value = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        cos, sin = (rotation.unsqueeze(2) for rotation in rotations)
        query, key = Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        by_head = (heads.transpose(1, 2) for heads in (query, key, value))
        attended, _ = attend(self, *by_head, None, dropout=dropout, scaling=self.scaling)
        return fused_linears([self.o_proj], attended.flatten(2).contiguous())[0]


class LeanMLP(HiggsAudioV2MLP):
    """A fused FFN, for x (N, H)."""

    def forward(self, x: torch.Tensor, recipe: Recipe | None = None) -> torch.Tensor:
        return fused_ffn((self.gate_proj, self.up_proj, self.down_proj), self.act_fn, x, recipe)


class RoutedLayer(HiggsAudioV2DecoderLayer):
    """A decoder layer for places (N, H)."""

    def forward(
        self, hidden: torch.Tensor, routing: Routing, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        text, audio = hidden[: routing.num_text], hidden[routing.num_text :]
        normed, recipe = _normed_sequences(routing, text, audio, self.input_layernorm, self.audio_input_layernorm)
        return self.attend_and_feed(hidden, normed, recipe, routing, position_embeddings)

    def attend_and_feed(
        self,
        hidden: torch.Tensor,
        normed: torch.Tensor,
        recipe: Recipe,
        routing: Routing,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Apply what follows the first norms: the attention over all positions, and the two FFNs."""
        hidden = hidden + routing.to_places(self.self_attn(normed, position_embeddings, recipe))
        text, audio = hidden[: routing.num_text], hidden[routing.num_text :]
        text = text + self.mlp(*self.post_attention_layernorm(text, with_recipe=True))
        audio = audio + self.audio_mlp(*self.audio_post_attention_layernorm(audio, with_recipe=True))
        return torch.cat([text, audio])


def _normed_sequences(
    routing: Routing, text: torch.Tensor, audio: torch.Tensor, text_norm: LeanNorm, audio_norm: LeanNorm
) -> tuple[torch.Tensor, Recipe]:
    """Return the normed positions (B, T, H), and how to compute them again."""
    normed_text, text_recipe = text_norm(text, with_recipe=True)
    normed_audio, audio_recipe = audio_norm(audio, with_recipe=True)
    recipe = Recipe(partial(_compute_sequences, routing), (*text_recipe.inputs, *audio_recipe.inputs))
    return routing.to_sequences(torch.cat([normed_text, normed_audio])), recipe


def _compute_sequences(routing: Routing, *inputs: torch.Tensor) -> torch.Tensor:
    """Compute normed positions from the inputs of the two norms' recipes."""
    return routing.to_sequences(torch.cat([scaled(*inputs[:3]), scaled(*inputs[3:])]))


class RoutedAudioAttentionLayer(AudioAttentionLayer, RoutedLayer):
    """A decoder layer for places (N, H) whose audio positions attend to each other first."""

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, routing: Routing, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        assert routing.audio_rotations is not None
        text, audio = hidden[: routing.num_text], hidden[routing.num_text :]
        rows = routing.to_audio_rows(self.audio_input_layernorm(audio))
        audio = audio + routing.to_audio_places(self.audio_attn(rows, routing.audio_rotations))
        normed, recipe = _normed_sequences(
            routing, text, audio, self.input_layernorm, self.audio_post_audio_attn_layer_norm
        )
        return self.attend_and_feed(torch.cat([text, audio]), normed, recipe, routing, position_embeddings)


# Classes of the decoder's modules in training. They are subclasses: a loaded module is converted by changing its class,
# keeps its weights and names, and works with transformers' activation checkpointing, unlike a replaced `forward`.
TRAINING_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    HiggsAudioV2DecoderLayer: RoutedLayer,
    AudioAttentionLayer: RoutedAudioAttentionLayer,
    HiggsAudioV2Attention: LeanAttention,
    HiggsAudioV2MLP: LeanMLP,
    HiggsAudioV2RMSNorm: LeanNorm,
    nn.Linear: GatheringLinear,
}


class LossHead(nn.Linear):
    """A head that returns its loss. A loaded head is converted by changing its class.

    The loss is computed here because ZeRO-3 gathers a head's weight only around calls of its module.
    """

    chunks: Chunks | None = None  # those for the device

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `head_loss` of hidden states (K, H) and targets (K, P)."""
        return head_loss(hidden, self.weight, targets, target_weights, self.chunks)


# Classes that the modules are changed back to for generation.
GENERATION_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    RoutedLayer: HiggsAudioV2DecoderLayer,
    RoutedAudioAttentionLayer: AudioAttentionLayer,
    LeanAttention: HiggsAudioV2Attention,
    LossHead: nn.Linear,
}
