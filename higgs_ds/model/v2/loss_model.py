"""Higgs Audio v2 in training. The quirks of transformers' model class are handled here."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import HiggsAudioV2Config

from higgs_ds.model.head_loss import Chunks
from higgs_ds.model.lean_layers import LossHead
from higgs_ds.model.loss_model import LossModel
from higgs_ds.model.offload import save_on_host
from higgs_ds.model.parts import parts_of
from higgs_ds.model.v2.routed_layers import GENERATION_CLASSES, TRAINING_CLASSES, Predicting, Routing


def describe_model(config: HiggsAudioV2Config) -> str:
    """Describe a model's architecture in one line. `check_weights` has ensured that it has a text head."""
    parts = parts_of(config)
    attention = "with" if parts.audio_self_attention else "no"
    tower = "a" if parts.audio_tower else "no"
    return (
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, an FFN for text and one for audio in each; "
        f"{config.num_codebooks} codebooks of {config.codebook_size}, delayed; text head; {attention} audio "
        f"self-attention, {tower} Whisper tower; {str(config.dtype).removeprefix('torch.')} in its files"
    )


class DualLossModel(LossModel):
    """The model with its loss, which is that of the text and of the audio."""

    training_classes = TRAINING_CLASSES
    generation_classes = GENERATION_CLASSES

    def __init__(self, adapted: Any, offload_checkpoints: bool = False) -> None:
        super().__init__(adapted, offload_checkpoints)
        self.higgs.text_lm_head.__class__ = LossHead
        self.higgs.audio_lm_head.__class__ = LossHead

    def set_chunks(self, chunks: Chunks) -> None:
        self.higgs.text_lm_head.chunks = self.higgs.audio_lm_head.chunks = chunks

    def forward(  # type: ignore[override]
        self,
        text_ids: torch.Tensor,
        codes: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        text_places: torch.Tensor,
        text_targets: torch.Tensor,
        audio_places: torch.Tensor,
        audio_targets: torch.Tensor,
        predicting_text: torch.Tensor,
        predicting_audio: torch.Tensor,
        predictions: torch.Tensor,
        target_weights: torch.Tensor,
        audio_rows: torch.Tensor,
        audio_at: torch.Tensor,
        **heard: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the loss, as `LossModel.forward`.

        Args:
            heard: for a model with a Whisper tower, the batch's mel features and where their outputs are inserted.
        """
        predicting = predicting_text, predicting_audio
        selected = self.higgs.model.norm(
            self.decode(text_ids, codes, positions, places, audio_rows, audio_at, predicting, **heard).index_select(
                0, predictions
            )
        )
        text, audio = selected.split([len(text_places), len(audio_places)])
        text_losses, text_sum, text_hits = self.higgs.text_lm_head(text, text_targets[:, None], target_weights[:1])
        audio_losses, audio_sums, audio_hits = self.higgs.audio_lm_head(audio, audio_targets, target_weights[1:])
        ends = audio_targets == self.higgs.config.audio_stream_eos_id
        end_hits = torch.stack([(audio_hits & ends).sum(), ends.sum()])
        hits = torch.cat([text_hits.sum(0), audio_hits.sum(0), end_hits]).float()
        return torch.cat([text_losses, audio_losses]), torch.cat([text_sum, audio_sums]), hits

    def _insert_tower_outputs(
        self,
        text: torch.Tensor,
        features: torch.Tensor,
        feature_lengths: torch.Tensor,
        feature_rows: torch.Tensor,
        feature_places: torch.Tensor,
    ) -> torch.Tensor:
        """Return the text embeddings (M, hidden) with the tower's outputs at `feature_places`."""
        outputs = self.higgs.model.encode_features(features, feature_lengths).flatten(0, 1)
        return text.index_copy(0, feature_places, outputs.index_select(0, feature_rows).to(text.dtype))

    def decode(
        self,
        text_ids: torch.Tensor,
        codes: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        audio_rows: torch.Tensor,
        audio_at: torch.Tensor,
        predicting: Predicting | None = None,
        **heard: torch.Tensor,
    ) -> torch.Tensor:
        """Return the hidden states (M + A, hidden) of all places, after the last layer and before the final norm.

        With `predicting`, they are those of some places (`RoutedLayer`). They are in the model's dtype, but in float32
        for a model in fp16.
        """
        model = self.higgs.model
        text = model.embed_tokens(text_ids)
        if heard:
            text = self._insert_tower_outputs(text, **heard)
        hidden = torch.cat([text, model.embed_audio_tokens(codes)])
        position_embeddings = model.rotary_emb(hidden, torch.arange(places.shape[1], device=places.device)[None])
        routing = Routing(len(text_ids), positions, places, audio_rows, audio_at)
        if parts_of(self.higgs.config).audio_self_attention:
            routing = routing.with_audio_rotations(position_embeddings)
        if hidden.dtype == torch.float16:
            # The sum of all layers' outputs may leave fp16's range, although none of them does. The norms return fp16.
            hidden = hidden.float()
        for layer in model.layers:
            offloaded = self.offload_checkpoints and layer.gradient_checkpointing
            with save_on_host() if offloaded else contextlib.nullcontext():
                hidden = layer(hidden, routing, position_embeddings, predicting if layer is model.layers[-1] else None)
        return hidden
