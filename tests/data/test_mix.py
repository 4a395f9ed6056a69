"""--mix: the samples of each epoch against counts, for any ranks and accumulation, and from any step."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from higgs_ds.data.mix import Mix, mix_of
from higgs_ds.data.sampler import WindowSampler, split_speakers, split_validation

# Samples of each manifest, --mix, and after how many epochs all of it has been in whole numbers of times.
MIXES: list[tuple[tuple[int, ...], tuple[str, ...], int]] = [
    ((10, 6, 5), ("1", "0.5", "2"), 2),
    ((7, 9), ("0.5", "1.5"), 2),
    ((7, 11), ("0.1", "2.3"), 10),
    ((3, 1), ("0.25", "0.05"), 20),
    ((12,), ("0.75",), 4),
]


@pytest.mark.parametrize(("counts", "numbers", "period"), MIXES, ids=str)
def test_samples_of_epochs_are_counted(counts: tuple[int, ...], numbers: tuple[str, ...], period: int) -> None:
    mix = Mix(counts, tuple(map(float, numbers)), seed=5)
    epochs = [Counter(mix.samples_in(epoch)) for epoch in range(3 * period)]
    first = 0
    for place, (count, number) in enumerate(zip(counts, numbers, strict=True)):
        samples, per_epoch = range(first, first + count), Fraction(number)
        first += count
        sizes = [sum(epoch[sample] for sample in samples) for epoch in epochs]
        assert sizes == [mix.num_samples(epoch)[place] for epoch in range(3 * period)]
        # Each epoch has the share, and sums over epochs from the first are rounded up.
        assert all(abs(size - per_epoch * count) < 1 for size in sizes)
        assert all(0 <= total - per_epoch * count * (n + 1) < 1 for n, total in enumerate(itertools.accumulate(sizes)))
        for epoch in epochs:
            assert {epoch[sample] for sample in samples} <= {int(per_epoch), int(per_epoch) + 1}
        for start in range(2 * period):
            seen = sum(epochs[start : start + period], Counter())
            if (per_epoch * count * start).denominator == 1:
                assert {seen[sample] for sample in samples} == {per_epoch * period}
    assert set().union(*epochs) == set(range(sum(counts)))


def test_shares_follow_the_seed_and_are_drawn_for_each_manifest() -> None:
    halves = {tuple(sorted(Mix((20, 20), (0.5, 0.5), seed).samples_in(0))) for seed in (1, 2, -1)}
    assert len(halves) == 3
    assert all([i for i in half if i < 20] != [i - 20 for i in half if i >= 20] for half in halves)
    assert all(half != (*range(10), *range(20, 30)) for half in halves)


def test_no_mix_where_each_sample_is_in_each_epoch_once() -> None:
    assert mix_of([3, 4], None, 0) is mix_of([3, 4], (1.0, 1.0), 0) is None
    assert mix_of([3, 4], (1.0, 2.0), 0) == Mix((3, 4), (1.0, 2.0), 0)


def sampler(batch: int, accum: int, ranks: int, rank: int = 0, **mode: Any) -> WindowSampler:
    draw = random.Random(1)
    lengths = [draw.randrange(60, 600) for _ in range(31)]
    mix = Mix((20, 11), (0.35, 1.5), seed=3)
    return WindowSampler(lengths, batch, accum, rank, ranks, seed=3, bucket_size=16, mix=mix, **mode)


@pytest.mark.parametrize("mode", [{}, {"max_tokens": 1500}], ids=str)
def test_same_epochs_for_any_layout_and_from_any_step(mode: dict[str, Any]) -> None:
    def steps(batch: int, accum: int, ranks: int) -> list[Counter[int]]:
        every = [sampler(batch, accum, ranks, rank, **mode).windows(0, last) for rank in range(ranks)]
        return [
            Counter(i for window in windows for micro_batch in window.micro_batches for i in micro_batch)
            for windows in zip(*every, strict=True)
        ]

    one = sampler(1, 4, 1, **mode)
    last = one.num_steps(5)
    assert steps(1, 4, 1) == steps(1, 2, 2)
    if not mode:
        assert steps(1, 4, 1) == steps(2, 1, 2) == steps(4, 1, 1)
    whole = list(one.windows(0, last))
    for epoch in range(5):
        found = Counter(i for w in whole if w.epoch_number == epoch for batch in w.micro_batches for i in batch)
        assert found == Counter(one.mix.samples_in(epoch))
    assert whole[-1].epoch == 5
    for first in range(last):
        assert list(sampler(1, 4, 1, **mode).windows(first, last)) == whole[first:]


def test_epochs_without_a_sample_have_no_step() -> None:
    few = WindowSampler([9, 9, 9], 1, 1, 0, 1, seed=0, mix=Mix((3,), (0.1,), seed=0))
    assert [len(few.micro_batches(epoch)) for epoch in range(10)] == [1, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert few.num_steps(10) == len(list(few.windows(0, 3))) == 3
    assert [window.epoch_number for window in few.windows(0, 5)] == [0, 3, 6, 10, 13]


def test_speakers_of_several_manifests_are_on_one_side() -> None:
    draw = random.Random(0)
    for seed in range(200):
        manifests = [
            np.array([draw.randrange(first, first + 8) for _ in range(draw.randrange(1, 60))])
            for first in draw.choices(range(10), k=draw.randrange(1, 5))
        ]
        splits = split_speakers(manifests, 0.2, seed)
        sides = [{int(speakers[i]) for speakers, split in zip(manifests, splits, strict=True) for i in split[side]}
                 for side in (0, 1)]  # fmt: skip
        assert sides[0].isdisjoint(sides[1])
        for speakers, (train, val) in zip(manifests, splits, strict=True):
            assert sorted([*train, *val]) == list(range(len(speakers)))
            assert len(train)
    assert all(len(val) == 0 for _, val in split_speakers(manifests, 0, seed))


def test_speakers_are_split_as_alone_where_manifests_share_none() -> None:
    one, other = np.arange(200) % 10, 10 + np.arange(50) % 5
    for seed in range(5):
        alone = [split_validation(speakers, 0.2, seed) for speakers in (one, other)]
        for found in (
            split_speakers([one, other], 0.2, seed),
            [split_speakers([s], 0.2, seed)[0] for s in (one, other)],
        ):
            assert [[side.tolist() for side in split] for split in found] == [
                [side.tolist() for side in split] for split in alone
            ]
    # The only speaker of a manifest stays in training, and the other one is held out.
    splits = split_speakers([np.array([0, 1, 1]), np.array([1])], 0.5, 0)
    assert [(train.tolist(), val.tolist()) for train, val in splits] == [([1, 2], [0]), ([0], [])]
