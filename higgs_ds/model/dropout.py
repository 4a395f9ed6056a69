"""Dropout whose mask is drawn again in the backward pass, from the recorded state of the random generator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def draw_dropped(rows: torch.Tensor, share: float) -> torch.Tensor:
    """Draw the flat indices of elements to drop.

    They are drawn with replacement, as many as miss an element with a probability of 1 - share. That is several times
    faster than a random number for every element.
    """
    numel = rows.numel()
    draws = round(math.log1p(-share) / math.log1p(-1 / numel)) if numel > 1 else numel
    return torch.randint(max(numel, 1), (draws,), device=rows.device)


def drop_(rows: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    rows.view(-1).index_fill_(0, drawn, 0)
    return rows


def generator_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def generator_at(state: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Within the block, the device's random generator continues from `state`."""
    present = generator_state(device)
    set_generator_state(state, device)
    try:
        yield
    finally:
        set_generator_state(present, device)
