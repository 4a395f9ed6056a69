"""A model that reads each weight from its source when it needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_ds.model.part_modules import model_class


class WeightSource(Protocol):
    """Where `streaming_model` takes weights from, when they are needed and only as long."""

    def linear(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        """What a linear layer makes of x (..., in), float32 (..., out)."""

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """The rows of an embedding for ids (...), float32 (..., hidden)."""

    def tensor(self, name: str) -> torch.Tensor:
        """A small weight, float32."""


class _StreamedModule(nn.Module):
    """A linear layer or embedding whose weights lie elsewhere."""

    def __init__(self, function: Callable[[str, torch.Tensor], torch.Tensor], name: str) -> None:
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.name, x)


def streaming_model(config: HiggsAudioV2Config, source: WeightSource) -> HiggsAudioV2ForConditionalGeneration:
    """A model in float32 that never holds more than the weights it works with."""
    config.dtype = torch.float32
    with init_empty_weights():
        model = model_class(config)(config, use_text_head=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, _StreamedModule(source.linear, name))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, _StreamedModule(source.rows, f"{name}.weight"))
        else:
            for leaf in dict(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(source.tensor(f"{name}.{leaf}"), requires_grad=False))
    return model.eval()


@torch.no_grad()
def all_logits(
    model: HiggsAudioV2ForConditionalGeneration, input_ids: torch.Tensor, audio_input_ids: torch.Tensor, **heard: Any
) -> torch.Tensor:
    """Text and audio logits of every position of one sequence, as one vector per position (N, V + C x S).

    Args:
        heard: for a model with a tower, as its forward takes them, `audio_features` and `feature_lengths`.
    """
    outputs = model.model(input_ids=input_ids, audio_input_ids=audio_input_ids, use_cache=False, **heard)
    hidden = outputs.last_hidden_state[0]
    return torch.cat([model.text_lm_head(hidden), model.audio_lm_head(hidden)], dim=-1)
