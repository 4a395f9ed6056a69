"""Layers that are computed again in the backward pass, except for what that pass does not need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

_is_recomputing = ContextVar("_is_recomputing", default=False)


def checkpoint_layers(higgs: Any, every: int) -> None:
    """Recompute every `every`-th decoder layer, starting with the first, in the backward pass from its input."""
    higgs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts})
    for i, layer in enumerate(higgs.model.layers):
        layer.gradient_checkpointing = i % every == 0


def is_recomputing() -> bool:
    """Return whether a layer is computed again, for what it saves for the backward pass: its result is not used."""
    return _is_recomputing.get()


def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and of the recomputation, for torch's activation checkpointing."""
    return nullcontext(), _recomputation()


@contextmanager
def _recomputation() -> Iterator[None]:
    token = _is_recomputing.set(True)
    try:
        yield
    finally:
        _is_recomputing.reset(token)
