"""Outputs that a training can do without: the report page, samples, TensorBoard, W&B. Their failures do not end it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from higgs_ds.common.console import warn
from higgs_ds.common.errors import HiggsError, LostRankError, NotFiniteError, StoppedError

T = TypeVar("T")


class OptionalOutput:
    """Makes the attempts to write one output, and reports the first that fails. For work of rank 0 alone.

    A rank that ignored an error in the middle of a collective would leave the others waiting in it.
    """

    def __init__(self, work: str, consequence: str) -> None:
        """Name the work and the consequence of a failure, as the warning is to name them."""
        self.work, self.consequence = work, consequence
        self.failed = False  # in the last attempt
        self._reported = False

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Run `action` and return its result, or None if it fails.

        Raises:
            StoppedError, NotFiniteError, LostRankError: what ends a run also ends it here.
        """
        try:
            result = action()
        except (StoppedError, NotFiniteError, LostRankError):
            raise
        # Drawing, generation and trackers call large libraries, which raise all kinds of errors. None of them is worth
        # the steps since the last checkpoint.
        except Exception as error:  # noqa: BLE001 - the only place that ignores unknown errors, and it reports them
            self.failed = True
            if not self._reported:
                self._reported = True
                warn(f"warning: {self.work} failed: {_cause(error)}. The run goes on; {self.consequence}")
            return None
        self.failed = False
        return result


def _cause(error: Exception) -> str:
    """Describe an error in one line."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, HiggsError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
