"""Higgs Audio v2 as this trainer uses it. The quirks of transformers' model class are handled here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from transformers.utils import GENERATION_CONFIG_NAME

from higgs_ds.model.config import parts_of
from higgs_ds.model.offload import HostModule, save_on_host
from higgs_ds.model.routed_layers import GENERATION_CLASSES, TRAINING_CLASSES, LossHead, Routing


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


def checkpoint_layers(higgs: HiggsAudioV2ForConditionalGeneration, every: int) -> None:
    """Recompute every `every`-th decoder layer, starting with the first, in the backward pass from its input."""
    higgs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for i, layer in enumerate(higgs.model.layers):
        layer.gradient_checkpointing = i % every == 0


def offload_embeddings(higgs: HiggsAudioV2ForConditionalGeneration) -> None:
    """Keep the text and code embeddings in host memory: a step needs only a few rows of each."""
    higgs.model.embed_tokens = HostModule(higgs.model.embed_tokens.cpu())
    higgs.model.embed_audio_tokens = HostModule(higgs.model.embed_audio_tokens.cpu())


class DualLossModel(nn.Module):
    """The trained model and its loss in one forward; the heads are applied only at positions with a target.

    Both heads are called in every forward, if necessary on zero rows, so that all ranks run the same collectives.
    """

    def __init__(
        self, adapted: PeftModel | HiggsAudioV2ForConditionalGeneration, offload_checkpoints: bool = False
    ) -> None:
        """Wrap a model with adapters, or one whose own weights are trained.

        Args:
            offload_checkpoints: keep the inputs of recomputed layers in host memory until the backward pass.
        """
        super().__init__()
        self.adapted = adapted
        self.offload_checkpoints = offload_checkpoints
        for module in self.higgs.model.modules():
            if type(module) in TRAINING_CLASSES:
                module.__class__ = TRAINING_CLASSES[type(module)]
        self.higgs.text_lm_head.__class__ = LossHead
        self.higgs.audio_lm_head.__class__ = LossHead

    @contextlib.contextmanager
    def generation_mode(self, folder: Path) -> Iterator[PeftModel | HiggsAudioV2ForConditionalGeneration]:
        """Within the block, yield the model with transformers' own layers and the generation settings of `folder`."""
        changed = [(module, type(module)) for module in self.modules() if type(module) in GENERATION_CLASSES]
        was_training = self.training
        if (folder / GENERATION_CONFIG_NAME).is_file():
            self.higgs.generation_config = GenerationConfig.from_pretrained(folder)
        self.eval()
        for module, trained_as in changed:
            module.__class__ = GENERATION_CLASSES[trained_as]
        try:
            yield self.adapted
        finally:
            for module, trained_as in changed:
                module.__class__ = trained_as
            self.train(was_training)

    @property
    def higgs(self) -> HiggsAudioV2ForConditionalGeneration:
        return self.adapted.get_base_model() if isinstance(self.adapted, PeftModel) else self.adapted

    def forward(
        self,
        text_ids: torch.Tensor,
        codes: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        text_places: torch.Tensor,
        text_targets: torch.Tensor,
        audio_places: torch.Tensor,
        audio_targets: torch.Tensor,
        target_weights: torch.Tensor,
        audio_rows: torch.Tensor,
        audio_at: torch.Tensor,
        **heard: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the loss, its unweighted sums and the number of correct predictions for a `data.collate.Batch`.

        Args:
            target_weights: float32 (1 + C,), weight in the loss of one target of the text and of each codebook.
            heard: for a model with a Whisper tower, the batch's mel features and where their outputs are inserted.

        Returns:
            The weighted loss, a float32 scalar; the detached sums, float32 (1 + C,); and hits, float32 (1 + C + 2,):
            targets with the highest logit, of the text, of each codebook and of the codes that end a stream, followed
            by the number of targets that end a stream.
        """
        hidden = self.decode(text_ids, codes, positions, places, audio_rows, audio_at, **heard)
        selected = self.higgs.model.norm(hidden[torch.cat([text_places, audio_places])])
        text, audio = selected.split([len(text_places), len(audio_places)])
        text_loss, text_sum, text_hits = self.higgs.text_lm_head(text, text_targets[:, None], target_weights[:1])
        audio_loss, audio_sums, audio_hits = self.higgs.audio_lm_head(audio, audio_targets, target_weights[1:])
        ends = audio_targets == self.higgs.config.audio_stream_eos_id
        end_hits = torch.stack([(audio_hits & ends).sum(), ends.sum()])
        hits = torch.cat([text_hits.sum(0), audio_hits.sum(0), end_hits]).float()
        return text_loss + audio_loss, torch.cat([text_sum, audio_sums]), hits

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
        **heard: torch.Tensor,
    ) -> torch.Tensor:
        """Return the hidden states (M + A, hidden) of all places, after the last layer and before the final norm.

        They are in the model's dtype, but in float32 for a model in fp16.
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
                hidden = layer(hidden, routing, position_embeddings)
        return hidden
