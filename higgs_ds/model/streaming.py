"""A model that reads each weight from its source only when it needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_ds.model.part_modules import model_class


class WeightSource(Protocol):
    """The weights of a `streaming_model`. Each is held in memory only while it is needed."""

    def linear(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Return a linear layer's output for x (..., in), float32 (..., out)."""

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of an embedding for ids (...), float32 (..., hidden)."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return a small weight in float32."""


class _StreamedModule(nn.Module):
    """A linear layer or embedding whose weights are stored elsewhere."""

    def __init__(self, function: Callable[[str, torch.Tensor], torch.Tensor], name: str) -> None:
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.name, x)


def streaming_model(config: HiggsAudioV2Config, source: WeightSource) -> HiggsAudioV2ForConditionalGeneration:
    """Build a float32 model that holds only the weights it currently computes with."""
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
    """Return the text and audio logits of one sequence, concatenated at every position (N, V + C x S).

    Args:
        heard: for a model with a tower, `audio_features` and `feature_lengths` of its forward.
    """
    outputs = model.model(input_ids=input_ids, audio_input_ids=audio_input_ids, use_cache=False, **heard)
    hidden = outputs.last_hidden_state[0]
    return torch.cat([model.text_lm_head(hidden), model.audio_lm_head(hidden)], dim=-1)
