"""Errors that a user can act on, and the exit code that each one ends the process with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
EXIT_OK = 0
EXIT_BUG = 1
EXIT_BAD_INPUT = 2
EXIT_SAVE_FAILED = 3
EXIT_NOT_FINITE = 4
EXIT_MERGE_FAILED = 5
EXIT_STOPPED = 6
EXIT_LOST_RANK = 7
EXIT_PUBLISH_FAILED = 8


class HiggsError(Exception):
    """An error with an exit code of its own, shown without a traceback."""

    exit_code = EXIT_BUG
    on_all_ranks = False  # True once every rank raises it, so that one of them may speak for all


class InputError(HiggsError):
    """Bad input or options. Holds every problem found, so that one run shows them all."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join([f"{len(self.problems)} problems:", *(f"  {problem}" for problem in self.problems)])


class SaveError(HiggsError):
    """Something could not be written, or what was written did not read back the same."""

    exit_code = EXIT_SAVE_FAILED


class NotFiniteError(HiggsError):
    """A loss or a parameter became NaN or infinite."""

    exit_code = EXIT_NOT_FINITE


class StoppedError(HiggsError):
    """A signal asked the run to end; it has saved a checkpoint and can go on from it."""

    exit_code = EXIT_STOPPED


class LostRankError(HiggsError):
    """Another rank has ended, for a reason that only it can tell; what was saved before is whole."""

    exit_code = EXIT_LOST_RANK


class MergeError(HiggsError):
    """Training ended well and its adapter is in place, but the merge asked for at its end failed."""

    exit_code = EXIT_MERGE_FAILED


class PublishError(HiggsError):
    """Training ended well and all of it is in place, but uploading it failed."""

    exit_code = EXIT_PUBLISH_FAILED


def collect_problems(problems: list[str], action: Callable[[], T]) -> T | None:
    """The answer of `action`; where it raises InputError, None, and what was wrong is added to `problems`."""
    try:
        return action()
    except InputError as error:
        problems.extend(error.problems)
        return None


def exit_code_of(main: Callable[[], None]) -> int:
    """Run `main` and return the exit code of a command; errors that a user can act on go to stderr."""
    try:
        main()
    except HiggsError as error:
        sys.stdout.flush()  # where both go to one file, the error comes behind what was said before it
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return EXIT_OK
