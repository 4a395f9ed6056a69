"""A model in training: transformers' modules, changed to this project's own classes, and its loss in one forward."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from higgs_ds.model.head_loss import Chunks


class LossModel(nn.Module, ABC):
    """A trained model and its loss in one forward; the heads are applied only at positions with a target.

    All heads are called in every forward, if necessary on zero rows, so that all ranks run the same collectives.
    """

    # Classes of the decoder's modules in training, and those that they are changed back to for generation. A loaded
    # module is converted by changing its class.
    training_classes: ClassVar[Mapping[type[nn.Module], type[nn.Module]]]
    generation_classes: ClassVar[Mapping[type[nn.Module], type[nn.Module]]]

    def __init__(self, adapted: Any, offload_checkpoints: bool = False) -> None:
        """Wrap a model with adapters, or one whose own weights are trained.

        Args:
            offload_checkpoints: keep the inputs of recomputed layers in host memory until the backward pass.
        """
        super().__init__()
        self.adapted = adapted
        self.offload_checkpoints = offload_checkpoints
        for module in self.higgs.model.modules():
            if type(module) in self.training_classes:
                module.__class__ = self.training_classes[type(module)]

    @property
    def higgs(self) -> Any:
        """The model without adapters around it."""
        return self.adapted.get_base_model() if isinstance(self.adapted, PeftModel) else self.adapted

    @abstractmethod
    def set_chunks(self, chunks: Chunks) -> None:
        """Set how much the heads compute at once; by default, it depends on the device."""

    @contextlib.contextmanager
    def generation_mode(self, folder: Path) -> Iterator[Any]:
        """Within the block, yield the model with transformers' own layers and the generation settings of `folder`."""
        changed = [(module, type(module)) for module in self.modules() if type(module) in self.generation_classes]
        was_training = self.training
        if (folder / GENERATION_CONFIG_NAME).is_file():
            self.higgs.generation_config = GenerationConfig.from_pretrained(folder)
        self.eval()
        for module, trained_as in changed:
            module.__class__ = self.generation_classes[trained_as]
        try:
            yield self.adapted
        finally:
            for module, trained_as in changed:
                module.__class__ = trained_as
            self.train(was_training)

    @abstractmethod
    def forward(self, **batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the losses, their unweighted sums and the number of correct predictions for a `data.collate.Batch`.

        `batch` also has `target_weights`, float32 (1 + C,): the weight in the loss of one target of the text and of
        each codebook.

        Returns:
            The weighted losses of `text_places`, then of `audio_places`, float32 (L + K,); the detached sums, float32
            (1 + C,); and hits, float32 (1 + C + 2,):
            targets with the highest logit, of the text, of each codebook and of the codes that end a stream, followed
            by the number of targets that end a stream.
        """
