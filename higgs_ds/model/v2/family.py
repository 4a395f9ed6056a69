"""Higgs Audio v2: a Llama trunk with an FFN for text and one for audio in each layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as TextEncoder

from higgs_ds.common.errors import InputError
from higgs_ds.model.family import Family
from higgs_ds.model.parts import ATTENTION_MODULES, Parts
from higgs_ds.model.prompt import Prompt, Segment, Stretch, Tokenizer
from higgs_ds.model.sample import Message
from higgs_ds.model.stream import AudioStream
from higgs_ds.model.v2 import layouts, prompt
from higgs_ds.model.v2.stream import FramedStream
from higgs_ds.options.fields import EMBEDDINGS, HEADS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from higgs_ds.model.loss_model import LossModel

# What the data depends on, with the defaults of transformers' HiggsAudioV2Config. All are whole numbers.
DEFAULTS = {
    "num_codebooks": 8, "codebook_size": 1024, "audio_stream_bos_id": 1024, "audio_stream_eos_id": 1025,
    "pad_token_id": 128001, "audio_token_id": 128016, "audio_delay_token_id": 128014, "audio_bos_token_id": 128013,
}  # fmt: skip
TEXT_HEAD = "text_lm_head.weight"


class HiggsAudioV2(Family):
    """The models that transformers calls HiggsAudioV2, and boson_multimodal HiggsAudio."""

    title = "Higgs Audio v2"
    tag = "higgs-audio-v2"
    suffix = ""
    in_transformers = True
    model_types = layouts.MODEL_TYPES
    name_prefixes = ("model.", "text_lm_head.", "audio_lm_head.")
    layers = "model.layers"
    # Only some models of the family have `audio_attn`.
    groups = {
        "self_attn": ("attention",),
        "audio_attn": ("attention",),
        "mlp": ("text_mlp",),
        "audio_mlp": ("audio_mlp",),
    }
    # A norm belongs to the module whose input it normalizes.
    norms = {
        "input_layernorm": "attention",
        "audio_input_layernorm": "attention",
        ATTENTION_MODULES[1]: "attention",
        "post_attention_layernorm": "text_mlp",
        "audio_post_attention_layernorm": "audio_mlp",
    }
    outside_layers = {
        "model.embed_tokens": EMBEDDINGS,
        "model.embed_audio_tokens.embed_audio_tokens": EMBEDDINGS,
        "model.norm": HEADS,
        "text_lm_head": HEADS,
        "audio_lm_head": HEADS,
    }
    text_targets = 3  # start and end of its audio, end of the turn
    # It must be asked for explicitly: otherwise transformers silently drops its weights.
    load_arguments = {"use_text_head": True}

    def native_config(self, values: Mapping[str, Any], token_ids: Mapping[str, int], where: str) -> dict[str, Any]:
        return layouts.native_config(values, token_ids, where)

    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return DEFAULTS | dict(values)

    def config_of(self, values: Mapping[str, Any]) -> Any:
        from higgs_ds.model.v2.config import config_of

        return config_of(values)

    def base_problems(self, folder: Path, values: Mapping[str, Any], tokenizer: TextEncoder) -> list[str]:
        may_be_null = ("pad_token_id",)
        return [
            f"{folder / 'config.json'}: {name} is {values[name]!r}; it must be a whole number"
            for name in DEFAULTS
            if type(values[name]) is not int and not (values[name] is None and name in may_be_null)
        ] or _tokenizer_problems(folder, values, tokenizer)

    def native_name(self, name: str) -> str | None:
        return layouts.native_name(name)

    def original_name(self, name: str) -> str | None:
        return layouts.original_name(name)

    def original_config(self, native: Mapping[str, Any], token_ids: Mapping[str, int]) -> dict[str, Any]:
        return layouts.original_config(native, token_ids)

    def part_of_rows(self, name: str) -> int:
        return layouts.part_of_rows(name)

    def processor_files(self, native: Mapping[str, Any], codec: str) -> dict[str, dict[str, Any] | str]:
        from higgs_ds.model.v2.processor import processor_files

        return processor_files(native, codec)

    def source_of(self, name: str) -> str:
        return name.removeprefix(layouts.DUPLICATE_PREFIX) if self.is_unused(name) else name

    def is_unused(self, name: str) -> bool:
        return name in layouts.DUPLICATE_HEADS

    def missing_weight(self, names: Collection[str]) -> str | None:
        if TEXT_HEAD in names:
            return None
        return f"holds no {TEXT_HEAD}, which the text loss needs; use a base that was saved with its text head"

    def pad_id(self, values: Mapping[str, Any]) -> int:
        return values["pad_token_id"] or 0

    def codebook_size(self, values: Mapping[str, Any]) -> int:
        return values["codebook_size"]

    def stream(self, values: Mapping[str, Any], train_fill: bool = False) -> AudioStream:
        if train_fill:
            raise InputError(f"--train_fill: {self.title} has no codes that its runtimes force; omit this option")
        return FramedStream(values["num_codebooks"], values["audio_stream_bos_id"], values["audio_stream_eos_id"])

    def render(self, messages: Sequence[Message], start_index: int) -> Iterator[Segment]:
        return prompt.render(messages, start_index)

    def render_generation(self, messages: Sequence[Message], vocabulary: Collection[str]) -> Iterator[Segment]:
        return prompt.render_generation(messages)

    def tokenize(
        self,
        segments: Iterator[Segment],
        num_frames: Sequence[int],
        tokenizer: Tokenizer,
        stream: AudioStream,
        heard: Sequence[Sequence[Stretch]] = (),
    ) -> Prompt:
        return prompt.tokenize(segments, num_frames, tokenizer, stream, heard)

    def describe(self, config: Any) -> str:
        from higgs_ds.model.v2.loss_model import describe_model

        return describe_model(config)

    def model_class(self, config: Any) -> type[Any]:
        from higgs_ds.model.v2.part_modules import model_class

        return model_class(config)

    def build(self, config: Any) -> Any:
        return self.model_class(config)(config, use_text_head=True)

    def with_num_layers(self, config: Any, num_layers: int) -> Any:
        return self.config_of(config.to_dict() | {"num_hidden_layers": num_layers})

    def tiny(self) -> Any:
        from higgs_ds.model.v2 import tiny

        return tiny

    def loss_model(self, adapted: nn.Module, offload_checkpoints: bool = False) -> LossModel:
        from higgs_ds.model.v2.loss_model import DualLossModel

        return DualLossModel(adapted, offload_checkpoints)

    def offload_embeddings(self, model: Any) -> None:
        from higgs_ds.model.offload import HostModule

        model.model.embed_tokens = HostModule(model.model.embed_tokens.cpu())
        model.model.embed_audio_tokens = HostModule(model.model.embed_audio_tokens.cpu())

    def probe(self, model: Any, config: Any) -> torch.Tensor:
        from higgs_ds.model.v2.probe import probe

        return probe(model, config)

    def audio_mask(self, prompt: Prompt) -> torch.Tensor:
        import torch

        return torch.ones(1, len(prompt.audio_columns), dtype=torch.bool)

    def with_parts(self, config: Any, added: Parts) -> Any:
        from higgs_ds.model.v2.config import extended

        return extended(config, added) if added else config

    def ready_for_parts(self, config: Any, added: Parts) -> Any:
        from higgs_ds.model.v2.config import extended

        return extended(config, Parts()) if added else config


def _tokenizer_problems(folder: Path, values: Mapping[str, Any], tokenizer: TextEncoder) -> list[str]:
    missing = prompt.missing_tokens(tokenizer.get_vocab())
    if missing:
        return [f"{folder}: its tokenizer has no {', '.join(missing)}"]
    expected = {
        prompt.AUDIO_OUT: values["audio_token_id"],
        prompt.AUDIO_DELAY: values["audio_delay_token_id"],
        prompt.AUDIO_OUT_BOS: values["audio_bos_token_id"],
    }
    return [
        f"{folder}: {token} is {tokenizer.token_to_id(token)} in the tokenizer, {expected_id} in config.json"
        for token, expected_id in expected.items()
        if tokenizer.token_to_id(token) != expected_id
    ]
