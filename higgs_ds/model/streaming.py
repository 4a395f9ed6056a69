"""A model that reads each weight from its source only when it needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import nn

from higgs_ds.model.families import family_of


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


def streaming_model(config: Any, source: WeightSource) -> Any:
    """Build a float32 model that holds only the weights it currently computes with.

    A module that does more than a linear layer or an embedding has a method `streamed`, which returns its replacement.
    """
    config.dtype = torch.float32
    with init_empty_weights():
        model = family_of(config.model_type).build(config)
    for name, module in list(model.named_modules()):
        if hasattr(module, "streamed"):
            model.set_submodule(name, module.streamed(source, name))
        elif isinstance(module, nn.Linear):
            model.set_submodule(name, _StreamedModule(source.linear, name))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, _StreamedModule(source.rows, f"{name}.weight"))
        else:
            for leaf in dict(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(source.tensor(f"{name}.{leaf}"), requires_grad=False))
    return model.eval()
