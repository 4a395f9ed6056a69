"""Decoder layers of Higgs Audio v2 for batches in which text and audio are each contiguous.

transformers' layer selects text and audio by a mask, again in every layer, which synchronizes with the GPU each time.
Here all layers share the order in which the batch is packed (`data.collate.Batch`). Results are bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2Attention,
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2MLP,
    HiggsAudioV2RMSNorm,
)

from higgs_ds.model.fused_lora import Recipe
from higgs_ds.model.gathering import GatheringLinear
from higgs_ds.model.lean_layers import AttentionForward, FFNForward, LossHead, NormForward
from higgs_ds.model.lean_ops import Permute, scaled
from higgs_ds.model.v2.part_modules import AudioAttentionLayer

Predicting = tuple[torch.Tensor, torch.Tensor]


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

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the text and the audio of places (N, H)."""
        return x.split([self.num_text, len(x) - self.num_text])

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


class LeanNorm(NormForward, HiggsAudioV2RMSNorm):
    """A norm that keeps only its input."""


class LeanAttention(AttentionForward, HiggsAudioV2Attention):
    """An attention with fused projections."""


class LeanMLP(FFNForward, HiggsAudioV2MLP):
    """A fused FFN."""


class RoutedLayer(HiggsAudioV2DecoderLayer):
    """A decoder layer for places (N, H).

    With `predicting`, the numbers of some text places and of some audio places, each counted from the first one, the
    layer returns only their outputs (U + V, H), and applies its FFNs only to them.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        routing: Routing,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        predicting: Predicting | None = None,
    ) -> torch.Tensor:
        return self.attend_and_feed(hidden, self.audio_input_layernorm, routing, position_embeddings, predicting)

    def attend_and_feed(
        self,
        hidden: torch.Tensor,
        audio_norm: LeanNorm,
        routing: Routing,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        predicting: Predicting | None,
    ) -> torch.Tensor:
        """Apply the attention over all positions, after the norm of the text and one of the audio; then the two FFNs.

        What is not kept for the backward pass is freed at once, as no variable holds it.
        """
        attended = self.self_attn(
            *_normed_sequences(routing, hidden, self.input_layernorm, audio_norm), position_embeddings
        )
        text, audio = routing.split(hidden + routing.to_places(attended))
        del attended
        if predicting is not None:
            text, audio = text.index_select(0, predicting[0]), audio.index_select(0, predicting[1])
        text = text + self.mlp(*self.post_attention_layernorm(text, with_recipe=True))
        audio = audio + self.audio_mlp(*self.audio_post_attention_layernorm(audio, with_recipe=True))
        return torch.cat([text, audio])


def _normed_sequences(
    routing: Routing, hidden: torch.Tensor, text_norm: LeanNorm, audio_norm: LeanNorm
) -> tuple[torch.Tensor, Recipe]:
    """Return the normed positions (B, T, H) of places (N, H), and how to compute them again."""
    text, audio = routing.split(hidden)
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
        self,
        hidden: torch.Tensor,
        routing: Routing,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        predicting: Predicting | None = None,
    ) -> torch.Tensor:
        assert routing.audio_rotations is not None
        text, audio = routing.split(hidden)
        rows = routing.to_audio_rows(self.audio_input_layernorm(audio))
        audio = audio + routing.to_audio_places(self.audio_attn(rows, None, routing.audio_rotations))
        hidden = torch.cat([text, audio])
        return self.attend_and_feed(
            hidden, self.audio_post_audio_attn_layer_norm, routing, position_embeddings, predicting
        )


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


# Classes that the modules are changed back to for generation.
GENERATION_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    RoutedLayer: HiggsAudioV2DecoderLayer,
    RoutedAudioAttentionLayer: AudioAttentionLayer,
    LeanAttention: HiggsAudioV2Attention,
    LossHead: nn.Linear,
}
