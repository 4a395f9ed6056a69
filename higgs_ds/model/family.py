"""What differs between the families of models, as one interface. `families` finds the family of a base.

Everything here can be used without importing torch or transformers, whose import takes seconds, except the methods that
return a model or a configuration object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tokenizers import Tokenizer as TextEncoder

from higgs_ds.common.errors import InputError
from higgs_ds.model.prompt import Prompt, Segment, Stretch, Tokenizer
from higgs_ds.model.sample import Message, Sample
from higgs_ds.model.stream import AudioStream

if TYPE_CHECKING:
    import torch
    from torch import nn

    from higgs_ds.model.loss_model import LossModel
    from higgs_ds.model.parts import Parts


class Spoken(NamedTuple):
    """A sample as a family can speak it: why it cannot, or what is left out of it, in words for users."""

    sample: Sample
    faults: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


class Family(ABC):
    """A family of models: its layouts, prompt, audio stream and classes."""

    title: ClassVar[str]  # for users
    tag: ClassVar[str]  # of model cards
    suffix: ClassVar[str]  # of the names of its built-in bases
    model_types: ClassVar[Mapping[str, str]]  # the layout of each `model_type` of config.json
    name_prefixes: ClassVar[tuple[str, ...]]  # of all weights, in the native layout
    layers: ClassVar[str]  # the decoder layers' name in a native model
    groups: ClassVar[Mapping[str, tuple[str, ...]]]  # --lora_targets and --train_groups by a module's name in a layer
    norms: ClassVar[Mapping[str, str]]  # the --train_groups group of each norm of a layer
    outside_layers: ClassVar[Mapping[str, str]]  # the --train_groups group of each module outside them, by its name
    max_references: ClassVar[int | None] = None  # for which the prompt has a place
    text_targets: ClassVar[int]  # of a speech sample
    codec_prefix: ClassVar[str | None] = None  # of the tensors of a codec in a base's own files
    in_transformers: ClassVar[bool]  # whether transformers has a class for its native layout
    # Name, address and conditions of the licence of the released weights, if it also holds for unnamed copies of them.
    licence: ClassVar[tuple[str, str, str] | None] = None

    # Configuration and files.

    @abstractmethod
    def native_config(self, values: Mapping[str, Any], token_ids: Mapping[str, int], where: str) -> dict[str, Any]:
        """Return a config.json of any of the family's layouts in the native one. Raises InputError."""

    @abstractmethod
    def with_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a native config.json with the defaults of values that the data depends on."""

    @abstractmethod
    def config_of(self, values: Mapping[str, Any]) -> Any:
        """Return the configuration object for the values of a native config.json."""

    @abstractmethod
    def base_problems(self, folder: Path, values: Mapping[str, Any], tokenizer: TextEncoder) -> list[str]:
        """Return where a native config.json, which has defaults, and a tokenizer do not fit the family."""

    def native_name(self, name: str) -> str | None:
        """Return a weight's native name, given its name in any layout; None if the native layout does not need it.

        Raises:
            KeyError: no layout of the family has such a weight.
        """
        if not name.startswith(self.name_prefixes):
            raise KeyError(name)
        return name

    def original_name(self, name: str) -> str | None:
        """Return a native weight's name in the original layout; None if that layout does not need it."""
        raise self._only_native()

    def original_config(self, native: Mapping[str, Any], token_ids: Mapping[str, int]) -> dict[str, Any]:
        """Return a native config.json in the original layout."""
        raise self._only_native()

    def _only_native(self) -> InputError:
        return InputError(f"{self.title} has one layout, native")

    def part_of_rows(self, name: str) -> int:
        """Return the order of a stored tensor among those that are parts of the rows of one native tensor."""
        return 0

    def processor_files(self, native: Mapping[str, Any], codec: str) -> dict[str, dict[str, Any] | str]:
        """Return the files of a processor, by their names, that other layouts than the native one do not have.

        Args:
            codec: the codec's path or hub id.
        """
        return {}

    def source_of(self, name: str) -> str:
        """Return the weight that a tensor in a native file is, or is a copy of."""
        return name

    def is_unused(self, name: str) -> bool:
        """Return whether a native file may hold a tensor of this name that the model does not load."""
        return False

    def missing_weight(self, names: Collection[str]) -> str | None:
        """Return what a base lacks for the loss, in words, if its files hold tensors of these names."""
        return None

    @abstractmethod
    def pad_id(self, values: Mapping[str, Any]) -> int:
        """Return the token id that pads the end of a row, where nothing is predicted."""

    @abstractmethod
    def codebook_size(self, values: Mapping[str, Any]) -> int:
        """Return the number of codes of a codebook, the stream's own ones included."""

    # Prompt and labels.

    @abstractmethod
    def stream(self, values: Mapping[str, Any], train_fill: bool = False) -> AudioStream:
        """Return the audio stream of a base, given its native config.json with defaults.

        Raises:
            InputError: `train_fill`, but the family has no codes that its runtimes force.
        """

    @abstractmethod
    def render(self, messages: Sequence[Message], start_index: int) -> Iterator[Segment]:
        """Yield the segments of a conversation. Each is tokenized separately."""

    @abstractmethod
    def render_generation(self, messages: Sequence[Message], vocabulary: Collection[str]) -> Iterator[Segment]:
        """Yield the segments of a conversation that ends where the model starts to generate speech.

        Raises:
            InputError: the prompt has no place for some of it.
        """

    @abstractmethod
    def tokenize(
        self,
        segments: Iterator[Segment],
        num_frames: Sequence[int],
        tokenizer: Tokenizer,
        stream: AudioStream,
        heard: Sequence[Sequence[Stretch]] = (),
    ) -> Prompt:
        """Return token ids and labels.

        Args:
            num_frames: length of each clip in codec frames, in order.
            heard: for a model with a Whisper tower, the stretches of each clip; empty for a clip it does not encode.
        """

    def prompt_of(
        self,
        sample: Sample,
        num_frames: Sequence[int],
        tokenizer: Tokenizer,
        stream: AudioStream,
        heard: Sequence[Sequence[Stretch]] = (),
    ) -> Prompt:
        """Return token ids and labels of a training sample. Arguments are those of `tokenize`."""
        segments = self.render(sample.messages, sample.start_index)
        return self.tokenize(segments, num_frames, tokenizer, stream, heard)

    def as_spoken(self, sample: Sample, vocabulary: Collection[str]) -> Spoken:
        """Return a sample with only what the prompt has a place for.

        Args:
            vocabulary: the tokens of the base.
        """
        return Spoken(sample)

    # The model.

    @abstractmethod
    def describe(self, config: Any) -> str:
        """Describe a model's architecture in one line."""

    @abstractmethod
    def model_class(self, config: Any) -> type[Any]:
        """Return the class of a model, a PreTrainedModel of transformers."""

    @abstractmethod
    def build(self, config: Any) -> Any:
        """Build a model with all weights that are trained or that the loss needs."""

    load_arguments: ClassVar[Mapping[str, Any]] = {}  # of `from_pretrained`, for the same weights as `build`

    @abstractmethod
    def with_num_layers(self, config: Any, num_layers: int) -> Any:
        """Return the configuration of a model that differs in the number of decoder layers."""

    @abstractmethod
    def loss_model(self, adapted: nn.Module, offload_checkpoints: bool = False) -> LossModel:
        """Wrap a model, with adapters or without, for training.

        Args:
            offload_checkpoints: keep the inputs of recomputed layers in host memory until the backward pass.
        """

    @abstractmethod
    def offload_embeddings(self, model: Any) -> None:
        """Keep embeddings that are only looked up in host memory: a step needs only a few rows of each."""

    @abstractmethod
    def probe(self, model: Any, config: Any) -> torch.Tensor:
        """Return the logits (N, K) of a model for a fixed random input, to compare two models of one configuration."""

    @abstractmethod
    def tiny(self) -> Any:
        """Return the module that makes small models of the family."""

    def audio_mask(self, prompt: Prompt) -> torch.Tensor:
        """Return the `audio_input_ids_mask` of the model's forward and `generate` for a prompt of one sequence."""
        import torch

        mask = torch.zeros(1, len(prompt.input_ids), dtype=torch.bool)
        mask[0, prompt.audio_columns] = True
        return mask

    # Optional parts.

    def with_parts(self, config: Any, added: Parts) -> Any:
        """Return a configuration with `added` parts, or the same object if there are none."""
        if added:
            raise InputError(f"{self.title} has no optional parts, but {added} is asked for")
        return config

    def ready_for_parts(self, config: Any, added: Parts) -> Any:
        """Return a configuration with its present parts, of a class that the `added` parts can be added to later."""
        return self.with_parts(config, added)
