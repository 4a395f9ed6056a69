"""Batches are made one ahead and in order; an error is raised at its own item."""

from __future__ import annotations

import threading

import pytest

from higgs_ds.data.prefetch import prefetched


def test_one_ahead_and_in_order() -> None:
    made: list[int] = []
    second_is_made = threading.Event()

    def make(item: int) -> int:
        made.append(item)
        if item == 1:
            second_is_made.set()
        return 10 * item

    pairs = prefetched(range(4), make)
    assert next(pairs) == (0, 0)
    assert second_is_made.wait(10)  # while the first one is still in use
    assert made == [0, 1]
    assert list(pairs) == [(1, 10), (2, 20), (3, 30)]
    assert list(prefetched([], make)) == []


def test_error_comes_at_its_item() -> None:
    pairs = prefetched([2, 1, 0, 5], lambda item: 4 // item)
    assert next(pairs) == (2, 2)
    assert next(pairs) == (1, 4)
    with pytest.raises(ZeroDivisionError):
        next(pairs)
