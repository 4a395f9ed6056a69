"""Batches made ahead, in a thread, while the model works on those before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetched(items: Iterable[T], make: Callable[[T], U]) -> Iterator[tuple[T, U]]:
    """Each item with what `make` makes of it, one ahead of what is asked for. An error of `make` comes at its item."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        coming = None
        for item in items:
            following = item, thread.submit(make, item)
            if coming is not None:
                yield coming[0], coming[1].result()
            coming = following
        if coming is not None:
            yield coming[0], coming[1].result()
