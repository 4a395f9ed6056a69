"""Trainers with wrong labels or gradients: each is this one with one part made wrong, which the tests must detect.

A mutant is enabled in its own process, by `worker.py --mutant NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from higgs_ds.data import collate, dataset
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.v2 import prompt
from higgs_ds.model.v2.stream import FramedStream
from higgs_ds.model.v3.stream import BareStream

WRONG_GRADIENT = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
WRONG_GRADIENT_STEP = 3

delay, delayed_labels, render = FramedStream.delay, FramedStream.labels, prompt.render


def eos_masked() -> None:
    """No codebook learns its end, as with the labels of transformers' processor."""

    def labels_without_end(stream: Any, codes: torch.Tensor) -> torch.Tensor:
        labels = delayed_labels(stream, codes)
        return labels.masked_fill(labels == stream.eos_id, IGNORE_INDEX)

    FramedStream.labels = labels_without_end  # type: ignore[method-assign]


def end_denied() -> None:
    """Where a codebook should end, it learns a code instead: what has learned to stop forgets it."""

    def labels_with_a_code(stream: Any, codes: torch.Tensor) -> torch.Tensor:
        labels = delayed_labels(stream, codes)
        return labels.masked_fill(labels == stream.eos_id, 0)

    FramedStream.labels = labels_with_a_code  # type: ignore[method-assign]


def delay_off() -> None:
    """All codebooks start in the same row."""

    def rows_side_by_side(stream: Any, codes: torch.Tensor) -> torch.Tensor:
        rows = torch.full_like(delay(stream, codes), stream.eos_id)
        rows[0] = stream.bos_id
        rows[1 : 1 + codes.shape[1]] = codes.t()
        return rows

    def labels_side_by_side(stream: Any, codes: torch.Tensor) -> torch.Tensor:
        labels = torch.full_like(delayed_labels(stream, codes), IGNORE_INDEX)
        labels[1 : 1 + codes.shape[1]] = codes.t()
        labels[1 + codes.shape[1]] = stream.eos_id
        return labels

    FramedStream.delay, FramedStream.labels = rows_side_by_side, labels_side_by_side  # type: ignore[method-assign]


def audio_unshifted() -> None:
    """Each position learns its own input."""
    shifted = dataset.collate

    def collate_unshifted(*args: Any, **kwargs: Any) -> Any:
        batch = shifted(*args, **kwargs)
        unshifted = batch.places.flatten()[batch.positions[batch.audio_places] + 1]
        predicting = collate.predicting_places(batch.text_places, unshifted, len(batch.text_ids))
        return replace(batch, audio_places=unshifted, **predicting)

    dataset.collate = collate_unshifted


def reference_trained() -> None:
    """The speech before the target turn is learned, too."""

    def render_all_as_target(messages: Sequence[Any], start_index: int) -> Iterator[Any]:
        del start_index
        return render(messages, 0)

    prompt.render = render_all_as_target


def v3_row_shifted() -> None:
    """Each position learns its own row."""
    audio_unshifted()


def v3_end_not_trained() -> None:
    """The first codebook's EOC is not learned."""
    labels_of = BareStream.labels

    def labels_without_end(stream: Any, codes: torch.Tensor) -> torch.Tensor:
        labels = labels_of(stream, codes)
        return labels.masked_fill(labels == stream.eos_id, IGNORE_INDEX)

    BareStream.labels = labels_without_end  # type: ignore[method-assign]


def v3_reference_trained() -> None:
    """The speech of the reference is learned, too."""
    from higgs_ds.model.v3 import prompt as v3_prompt

    tokenize = v3_prompt.tokenize

    def tokenize_all_as_target(*args: Any, **kwargs: Any) -> Any:
        tokens = tokenize(*args, **kwargs)
        return replace(tokens, target_clips=[True] * len(tokens.target_clips))

    v3_prompt.tokenize = tokenize_all_as_target


def v3_other_rotary_base() -> None:
    """The rotary embedding has transformers' default base."""
    from higgs_ds.model.v3 import config

    def with_other_base(trunk: Any) -> dict[str, Any]:
        return {**trunk, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}

    config.with_rope_theta = with_other_base


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
V3_MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (v3_row_shifted, v3_end_not_trained, v3_reference_trained, v3_other_rotary_base)
}
# These change too little for tests of what a model has learned.
GRADIENT_MUTANTS: dict[str, Callable[[], None]] = {gradient_off.__name__: gradient_off}
# What this one makes is a fault that an evaluation has to find.
SPOILING_MUTANTS: dict[str, Callable[[], None]] = {end_denied.__name__: end_denied}
