"""Make batches ahead, in a thread, while the model works on the previous ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetched(items: Iterable[T], make: Callable[[T], U]) -> Iterator[tuple[T, U]]:
    """Yield each item with the result of `make`, computed one item ahead. An error of `make` is raised at its item."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        pending = None
        for item in items:
            submitted = item, thread.submit(make, item)
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = submitted
        if pending is not None:
            yield pending[0], pending[1].result()
