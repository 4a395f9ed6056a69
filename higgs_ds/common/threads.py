"""Work in threads, or torch on one of them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


def map_in_threads(function: Callable[[T], Result], items: Iterable[T], num_threads: int) -> Iterator[Result]:
    """Yield the results of a function in order. Items are taken a few ahead, so that few of them are in memory.

    A single thread would only take turns with the caller's, which calls the function instead.
    """
    if num_threads == 1:
        yield from map(function, items)
        return
    ahead: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, torch computes on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
