"""SIGUSR1 and SIGTERM end a run between two steps, on all ranks at the same one: a flag, and the agreement on it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from higgs_ds.distributed import highest_over_ranks

# What a cluster's scheduler sends ahead of a time limit or a preemption.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopSignals:
    """While the block runs, the signals only are remembered.

    A handler must do no more: saving needs all ranks, and these do not get a signal at the same moment, if at all.
    """

    def __init__(self) -> None:
        self._received = 0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._earlier = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self) -> str | None:
        """The name of a signal that any rank has got, or None. Every rank must call this, at the same point."""
        number = highest_over_ranks(self._received)
        return signal.Signals(number).name if number else None
