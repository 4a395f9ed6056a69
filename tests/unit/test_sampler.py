"""Every sample once an epoch, on one rank, in windows that do not depend on how they are spread."""

from __future__ import annotations

import itertools
import random

import pytest

from higgs_ds.data.sampler import Window, WindowSampler, share_of_rank, split_validation


def windows_of(num_samples: int, batch: int, accum: int, ranks: int, steps: int, first: int = 0) -> list[list[Window]]:
    """The windows of each rank."""
    samplers = [WindowSampler(num_samples, batch, accum, rank, ranks, seed=3) for rank in range(ranks)]
    return [list(sampler.windows(first, steps)) for sampler in samplers]


@pytest.mark.parametrize(("batch", "accum", "ranks"), [(1, 4, 1), (1, 2, 2), (2, 1, 2), (3, 2, 4), (1, 1, 1)])
@pytest.mark.parametrize("num_samples", [1, 7, 9, 24, 48])
def test_each_sample_once_an_epoch(num_samples: int, batch: int, accum: int, ranks: int) -> None:
    per_epoch = WindowSampler(num_samples, batch, accum, 0, ranks, 3).windows_per_epoch
    by_rank = windows_of(num_samples, batch, accum, ranks, 2 * per_epoch)
    for epoch in (0, 1):
        seen = [
            index
            for window in itertools.chain(*by_rank)
            if window.epoch == epoch
            for micro_batch in window.micro_batches
            for index in micro_batch
        ]
        assert sorted(seen) == list(range(num_samples))
    for windows in zip(*by_rank, strict=True):
        assert len({len(window.micro_batches) for window in windows}) == 1  # as many forward passes on every rank
        assert all(len(micro_batch) <= batch for window in windows for micro_batch in window.micro_batches)
        assert len(windows[0].micro_batches) <= accum


def test_same_windows_however_spread() -> None:
    def sets(*layout: int) -> list[set[int]]:
        by_rank = windows_of(9, *layout, steps=6)
        return [
            {index for window in windows for micro_batch in window.micro_batches for index in micro_batch}
            for windows in zip(*by_rank, strict=True)
        ]

    assert sets(1, 4, 1) == sets(1, 2, 2) == sets(2, 1, 2)


def test_resumes_at_any_step() -> None:
    (whole,) = windows_of(9, 2, 1, 1, steps=12)
    for first in range(12):
        (rest,) = windows_of(9, 2, 1, 1, steps=12, first=first)
        assert rest == whole[first:]


def test_epochs_are_shuffled_differently() -> None:
    (windows,) = windows_of(24, 24, 1, 1, steps=2)
    first, second = (window.micro_batches[0] for window in windows)
    assert first != second
    assert first != sorted(first)


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
    train, val = split_validation(num_samples, fraction, seed=1)
    assert len(val) == expected
    assert sorted(train + val) == list(range(num_samples))
    assert split_validation(num_samples, fraction, seed=1) == (train, val)


def test_split_follows_the_seed_not_the_order() -> None:
    draws = {tuple(split_validation(100, 0.05, seed)[1]) for seed in range(5)}
    assert len(draws) == 5
    assert (95, 96, 97, 98, 99) not in draws
