"""Errors that a user can act on, each with the exit code of the process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
EXIT_OK = 0
EXIT_BUG = 1
EXIT_DOES_NOT_FIT = 1  # the code with which grep and diff answer "no"
EXIT_BAD_INPUT = 2
EXIT_SAVE_FAILED = 3
EXIT_NOT_FINITE = 4
EXIT_MERGE_FAILED = 5
EXIT_STOPPED = 6
EXIT_LOST_RANK = 7
EXIT_PUBLISH_FAILED = 8
EXIT_SIGNAL = 128  # plus the number of the signal that ended the command, as shells report it


class HiggsError(Exception):
    """An error with an exit code of its own, shown without a traceback."""

    exit_code = EXIT_BUG
    on_all_ranks = False  # True if every rank raises it, so that only rank 0 prints it


class MoreProblems(str):
    """A line that stands for `number` problems, which are listed elsewhere."""

    number: int

    def __new__(cls, text: str, number: int) -> MoreProblems:
        line = super().__new__(cls, text)
        line.number = number
        return line

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override] # str has one; ranks exchange these lines
        return str(self), self.number


class InputError(HiggsError):
    """Bad input or options. Holds every problem found, so that one run shows them all."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        number = sum(problem.number if isinstance(problem, MoreProblems) else 1 for problem in self.problems)
        return "\n".join([f"{number:,} problems:", *(f"  {problem}" for problem in self.problems)])


class DoesNotFitError(HiggsError):
    """A memory plan that must fit does not."""

    exit_code = EXIT_DOES_NOT_FIT


class SaveError(HiggsError):
    """Something could not be written, or it read back differently than written."""

    exit_code = EXIT_SAVE_FAILED


class NotFiniteError(HiggsError):
    """A loss or a parameter became NaN or infinite."""

    exit_code = EXIT_NOT_FINITE


class StoppedError(HiggsError):
    """A signal asked the run to end. It has saved a checkpoint to resume from."""

    exit_code = EXIT_STOPPED


class LostRankError(HiggsError):
    """Another rank has ended; only its own error has the reason. What was saved before is intact."""

    exit_code = EXIT_LOST_RANK


class MergeError(HiggsError):
    """Training is complete and its adapter is saved, but the requested merge at the end failed."""

    exit_code = EXIT_MERGE_FAILED


class PublishError(HiggsError):
    """Training is complete and its results are saved, but the upload failed."""

    exit_code = EXIT_PUBLISH_FAILED


def collect_problems(problems: list[str], action: Callable[[], T]) -> T | None:
    """Return the result of `action`; if it raises InputError, add its problems to `problems` and return None."""
    try:
        return action()
    except InputError as error:
        problems.extend(error.problems)
        return None


def exit_code_of(main: Callable[[], None]) -> int:
    """Run `main` and return the exit code of the command. Errors that a user can act on are printed to stderr."""
    try:
        main()
    except HiggsError as error:
        print_error(error)
        return error.exit_code
    return EXIT_OK


def print_error(error: object) -> None:
    """Print an error to stderr, after all earlier output if both go to one file."""
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
