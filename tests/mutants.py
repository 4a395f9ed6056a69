"""Trainers with wrong labels or gradients: each is this one with one part made wrong, which the tests must detect.

A mutant is enabled in its own process, by `worker.py --mutant NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from higgs_ds.data import collate, dataset, prompt
from higgs_ds.model.labels import IGNORE_INDEX

WRONG_GRADIENT = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
WRONG_GRADIENT_STEP = 3

apply_delay_pattern, delayed_labels, render = collate.apply_delay_pattern, collate.delayed_labels, prompt.render


def eos_masked() -> None:
    """No codebook learns its end, as with the labels of transformers' processor."""

    def labels_without_end(codes: torch.Tensor, stream: Any) -> torch.Tensor:
        labels = delayed_labels(codes, stream)
        return labels.masked_fill(labels == stream.eos_id, IGNORE_INDEX)

    collate.delayed_labels = labels_without_end


def delay_off() -> None:
    """All codebooks start in the same row."""

    def rows_side_by_side(codes: torch.Tensor, stream: Any) -> torch.Tensor:
        rows = torch.full_like(apply_delay_pattern(codes, stream), stream.eos_id)
        rows[0] = stream.bos_id
        rows[1 : 1 + codes.shape[1]] = codes.t()
        return rows

    def labels_side_by_side(codes: torch.Tensor, stream: Any) -> torch.Tensor:
        labels = torch.full_like(delayed_labels(codes, stream), IGNORE_INDEX)
        labels[1 : 1 + codes.shape[1]] = codes.t()
        labels[1 + codes.shape[1]] = stream.eos_id
        return labels

    collate.apply_delay_pattern, collate.delayed_labels = rows_side_by_side, labels_side_by_side


def audio_unshifted() -> None:
    """Each position learns its own input."""
    shifted = dataset.collate

    def collate_unshifted(*args: Any, **kwargs: Any) -> Any:
        batch = shifted(*args, **kwargs)
        unshifted = batch.places.flatten()[batch.positions[batch.audio_places] + 1]
        return replace(batch, audio_places=unshifted)

    dataset.collate = collate_unshifted


def reference_trained() -> None:
    """The speech before the target turn is learned, too."""

    def render_all_as_target(messages: Sequence[Any], start_index: int) -> Iterator[Any]:
        del start_index
        return render(messages, 0)

    prompt.render = render_all_as_target


def gradient_off() -> None:
    """The gradient of one matrix is 1 % too large, in one step."""
    from higgs_ds.training.engine import Engine  # here, since it takes seconds

    start = Engine.__init__

    def start_with_wrong_gradient(engine: Engine, *args: Any, **kwargs: Any) -> None:
        start(engine, *args, **kwargs)

        def change(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 1.01 if engine.scheduler.last_epoch == WRONG_GRADIENT_STEP - 1 else gradient

        engine.trained[WRONG_GRADIENT].register_hook(change)

    Engine.__init__ = start_with_wrong_gradient


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant for mutant in (eos_masked, delay_off, audio_unshifted, reference_trained)
}
# These change too little for tests of what a model has learned.
GRADIENT_MUTANTS: dict[str, Callable[[], None]] = {gradient_off.__name__: gradient_off}
