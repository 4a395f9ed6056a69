"""Higgs Audio v3 (Higgs TTS 3): a Qwen3 trunk, and one table of audio codes that is also the head."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as TextEncoder

from higgs_ds.common.errors import InputError
from higgs_ds.model.family import Family, Spoken
from higgs_ds.model.prompt import Prompt, Segment, Stretch, Tokenizer
from higgs_ds.model.sample import Message, Sample
from higgs_ds.model.stream import AudioStream
from higgs_ds.model.v3 import layout, prompt
from higgs_ds.model.v3.stream import BareStream
from higgs_ds.options.fields import EMBEDDINGS, HEADS, NATIVE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from higgs_ds.model.loss_model import LossModel


class HiggsAudioV3(Family):
    """The models whose `model_type` is higgs_multimodal_qwen3."""

    title = "Higgs Audio v3"
    tag = "higgs-audio-v3"
    suffix = "-v3"
    in_transformers = False
    model_types = {layout.MODEL_TYPE: NATIVE}
    name_prefixes = ("tied.", "body.")
    layers = "body.layers"
    groups = {"self_attn": ("attention",), "mlp": ("text_mlp", "audio_mlp")}
    norms = {"input_layernorm": "attention", "post_attention_layernorm": "text_mlp"}
    # The table of codes is the head, too, where they are tied, and is then trained as the head that it is.
    outside_layers = {
        layout.TEXT_EMBEDDING: EMBEDDINGS,
        layout.AUDIO_TABLE: HEADS,
        layout.AUDIO_HEAD: HEADS,
        "body.norm": HEADS,
    }
    max_references = 1
    text_targets = 0
    codec_prefix = layout.CODEC_PREFIX
    licence = (
        "Boson Higgs TTS 3 Research and Non-Commercial License",
        "https://huggingface.co/bosonai/higgs-tts-3-4b/blob/main/LICENSE",
        "It allows research and non-commercial use only.",
    )

    def native_config(self, values: Mapping[str, Any], token_ids: Mapping[str, int], where: str) -> dict[str, Any]:
        return dict(values)

    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(values)

    def config_of(self, values: Mapping[str, Any]) -> Any:
        from higgs_ds.model.v3.config import config_of

        return config_of(values)

    def base_problems(self, folder: Path, values: Mapping[str, Any], tokenizer: TextEncoder) -> list[str]:
        problems = layout.config_problems(folder, values)
        if problems:
            return problems
        size = values["text_config"]["vocab_size"]
        return layout.tokenizer_problems(folder, tokenizer, prompt.REQUIRED_TOKENS, size)

    def is_unused(self, name: str) -> bool:
        return name.startswith((layout.CODEC_PREFIX, layout.TEXT_HEAD))

    def codebook_size(self, values: Mapping[str, Any]) -> int:
        return values["audio_encoder_config"]["vocab_size"]

    def pad_id(self, values: Mapping[str, Any]) -> int:
        return 0

    def stream(self, values: Mapping[str, Any], train_fill: bool = False) -> AudioStream:
        return BareStream(values["audio_encoder_config"]["num_codebooks"], layout.BOC_ID, layout.EOC_ID, train_fill)

    def render(self, messages: Sequence[Message], start_index: int) -> Iterator[Segment]:
        return prompt.render(messages)

    def render_generation(self, messages: Sequence[Message], vocabulary: Collection[str]) -> Iterator[Segment]:
        spoken, faults, _ = prompt.spoken_messages(messages, vocabulary)
        if faults:
            raise InputError(faults)
        return prompt.render(spoken)

    def tokenize(
        self,
        segments: Iterator[Segment],
        num_frames: Sequence[int],
        tokenizer: Tokenizer,
        stream: AudioStream,
        heard: Sequence[Sequence[Stretch]] = (),
    ) -> Prompt:
        return prompt.tokenize(segments, num_frames, tokenizer, stream)

    def as_spoken(self, sample: Sample, vocabulary: Collection[str]) -> Spoken:
        return prompt.as_spoken(sample, vocabulary)

    def describe(self, config: Any) -> str:
        from higgs_ds.model.v3.loss_model import describe_model

        return describe_model(config)

    def model_class(self, config: Any) -> type[Any]:
        from higgs_ds.model.v3.modeling import HiggsMultimodalQwen3ForConditionalGeneration

        return HiggsMultimodalQwen3ForConditionalGeneration

    def build(self, config: Any) -> Any:
        return self.model_class(config)(config)

    def with_num_layers(self, config: Any, num_layers: int) -> Any:
        values = config.to_dict()
        trunk = values["text_config"] | {"num_hidden_layers": num_layers}
        return self.config_of(values | {"text_config": {k: v for k, v in trunk.items() if k != "layer_types"}})

    def tiny(self) -> Any:
        from higgs_ds.model.v3 import tiny

        return tiny

    def loss_model(self, adapted: nn.Module, offload_checkpoints: bool = False) -> LossModel:
        from higgs_ds.model.v3.loss_model import AudioLossModel

        return AudioLossModel(adapted, offload_checkpoints)

    def offload_embeddings(self, model: Any) -> None:
        from higgs_ds.model.offload import HostModule

        # The table of codes stays where it is needed as the head.
        model.tied.embedding.text_embedding = HostModule(model.text_embedding.cpu())

    def probe(self, model: Any, config: Any) -> torch.Tensor:
        from higgs_ds.model.v3.probe import probe

        return probe(model, config)
