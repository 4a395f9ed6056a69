"""Every sample once per epoch, on one rank, in windows that do not depend on how ranks and accumulation divide them."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import pytest

from higgs_ds.data.sampler import Window, WindowSampler, share_of_rank, split_validation

LAYOUTS = [(1, 4, 1), (1, 2, 2), (2, 1, 2), (3, 2, 4), (1, 1, 1)]
MODES: list[dict[str, Any]] = [{}, {"bucket_size": 16}, {"bucket_size": 16, "max_tokens": 900}, {"max_tokens": 700}]


def speech_lengths(count: int) -> list[int]:
    """Tokens of utterances with log-normal durations, median 5 s: 25 rows of codes per second, and the prompt."""
    draw = random.Random(1)
    return [60 + round(25 * min(draw.lognormvariate(1.6, 0.6), 25)) for _ in range(count)]


def sampler(num_samples: int, layout: tuple[int, int, int], rank: int = 0, **mode: Any) -> WindowSampler:
    batch, accum, ranks = layout
    return WindowSampler(speech_lengths(num_samples), batch, accum, rank, ranks, seed=3, **mode)


def by_rank(num_samples: int, layout: tuple[int, int, int], last: int, first: int = 0, **mode: Any) -> list[Any]:
    """The windows of all ranks, step by step."""
    ranks = [sampler(num_samples, layout, rank, **mode).windows(first, last) for rank in range(layout[2])]
    return list(zip(*ranks, strict=True))


def indices_of(windows: tuple[Window, ...]) -> list[int]:
    return [i for window in windows for micro_batch in window.micro_batches for i in micro_batch]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("num_samples", [1, 9, 24, 100])
def test_each_sample_once_an_epoch(num_samples: int, layout: tuple[int, int, int], mode: dict[str, Any]) -> None:
    batch, accum, _ = layout
    steps = sampler(num_samples, layout, **mode).num_steps(2)
    windows = by_rank(num_samples, layout, steps, **mode)
    seen: dict[bool, list[int]] = {True: [], False: []}
    for step_windows in windows:
        assert len({window.epoch for window in step_windows}) == 1
        # The same number of forward passes on every rank.
        assert len({len(window.micro_batches) for window in step_windows}) == 1
        assert len(step_windows[0].micro_batches) <= accum
        if "max_tokens" not in mode:
            assert all(len(micro_batch) <= batch for window in step_windows for micro_batch in window.micro_batches)
        seen[step_windows[0].epoch <= 1] += indices_of(step_windows)
    assert windows[-1][0].epoch == 2
    assert sorted(seen[True]) == sorted(seen[False]) == list(range(num_samples))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_same_windows_for_any_layout(mode: dict[str, Any]) -> None:
    def sets(*layout: int) -> list[set[int]]:
        return [set(indices_of(windows)) for windows in by_rank(50, layout, 12, **mode)]

    assert sets(1, 4, 1) == sets(1, 2, 2)
    if "max_tokens" not in mode:
        assert sets(1, 4, 1) == sets(2, 1, 2)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_resumes_at_any_step(mode: dict[str, Any]) -> None:
    whole = list(sampler(30, (2, 2, 1), **mode).windows(0, 20))
    for first in range(20):
        assert list(sampler(30, (2, 2, 1), **mode).windows(first, 20)) == whole[first:]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_epochs_and_seeds_are_shuffled_differently(mode: dict[str, Any]) -> None:
    one = sampler(60, (2, 1, 1), **mode)
    epochs = [one.micro_batches(0), one.micro_batches(1), dataclasses.replace(one, seed=4).micro_batches(0)]
    orders = [tuple(i for window in epoch for batch in window for i in batch) for epoch in epochs]
    assert len({*orders, tuple(range(60))}) == 4


def test_micro_batches_stay_within_the_tokens() -> None:
    many = sampler(500, (1, 2, 2), bucket_size=64, max_tokens=1200)
    batches = [batch for window in many.micro_batches(0) for batch in window if batch]
    sizes = [len(batch) * max(many.lengths[i] for i in batch) for batch in batches]
    assert max(sizes) <= 1200
    assert np.mean(sizes) > 1000


def test_lengths_that_differ_between_epochs() -> None:
    """Each epoch is divided by its own lengths, so that micro-batches stay within the tokens, with little padding."""

    def lengths_in(epoch: int) -> list[int]:
        return random.Random(epoch).sample(speech_lengths(500), 500)

    one = dataclasses.replace(sampler(500, (1, 2, 2), bucket_size=64, max_tokens=1200), lengths_in=lengths_in)
    for epoch in range(3):
        fixed = dataclasses.replace(one, lengths=lengths_in(epoch), lengths_in=None)
        assert one.micro_batches(epoch) == fixed.micro_batches(epoch)
        batches = [batch for window in one.micro_batches(epoch) for batch in window if batch]
        assert max(len(batch) * max(lengths_in(epoch)[i] for i in batch) for batch in batches) <= 1200
    assert one.padding() == dataclasses.replace(one, lengths=lengths_in(0), lengths_in=None).padding() < 0.05
    assert one.num_steps(3) == sum(len(one.micro_batches(epoch)) for epoch in range(3))
    windows = list(one.windows(0, one.num_steps(2)))
    assert [window.epoch_number for window in windows] == [int(window.epoch - 1e-9) for window in windows]


@pytest.mark.parametrize("mode", [{}, {"max_tokens": 4096}], ids=str)
def test_little_padding(mode: dict[str, Any]) -> None:
    bucketed = sampler(5000, (8, 1, 2), bucket_size=512, **mode)
    assert bucketed.padding() < 0.05 < dataclasses.replace(bucketed, bucket_size=1, max_tokens=None).padding()


def test_shares_cover_everything_once() -> None:
    draw = random.Random(0)
    for _ in range(200):
        count, batch, ranks = draw.randrange(30), draw.randrange(1, 5), draw.randrange(1, 5)
        shares = [share_of_rank(range(count), batch, rank, ranks) for rank in range(ranks)]
        assert sorted(itertools.chain(*itertools.chain(*shares))) == list(range(count))
        assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize(
    ("num_samples", "fraction", "expected"),
    [(100, 0.05, 5), (24, 0.05, 1), (2, 0.05, 1), (1, 0.5, 0), (10, 0, 0), (2, 0.99, 1)],
)
def test_split(num_samples: int, fraction: float, expected: int) -> None:
    train, val = split_validation(range(num_samples), fraction, seed=1)
    assert len(val) == expected
    assert sorted([*train, *val]) == list(range(num_samples))
    again = split_validation(range(num_samples), fraction, seed=1)
    assert (again[0].tolist(), again[1].tolist()) == (train.tolist(), val.tolist())


def test_split_follows_the_seed_not_the_order() -> None:
    draws = {tuple(split_validation(range(100), 0.05, seed)[1]) for seed in range(5)}
    assert len(draws) == 5
    assert (95, 96, 97, 98, 99) not in draws


def test_split_by_group() -> None:
    speakers = [i % 10 for i in range(200)]
    for seed in range(5):
        train, val = split_validation(speakers, 0.2, seed)
        assert {speakers[i] for i in train}.isdisjoint(speakers[i] for i in val)
        assert len(val) == 40
