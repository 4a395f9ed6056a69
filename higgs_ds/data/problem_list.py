"""The problems of manifests: the first ones for an error message, all of them in a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from higgs_ds.common.errors import MoreProblems
from higgs_ds.common.files import replaced_file, saving
from higgs_ds.common.words import counted
from higgs_ds.data.survey import MAX_SHOWN, SurveyResult

_PART = "bad-{:05d}.txt"  # in the folder of an index: the problems that one process has found
LIST_FOLDER = "invalid"  # in the cache, for commands without an output folder


@contextlib.contextmanager
def open_problems(folder: Path, number: int) -> Iterator[Callable[[int, str], None]]:
    """Yield the function that writes the problems of one process. It takes the number of the sample, and a line."""
    path = folder / _PART.format(number)
    with saving(folder):
        file = path.open("w", encoding="utf-8", errors="backslashreplace", buffering=1)

    def report_invalid(number: int, line: str) -> None:
        with saving(folder):
            print(number, " ".join(line.splitlines()), sep="\t", file=file)

    with file:
        yield report_invalid
    with saving(folder):
        if not path.stat().st_size:
            path.unlink()


def problem_lines(folder: Path) -> list[str]:
    """Return the lines of all processes in manifest order, each with its end."""
    lines = []
    for part in sorted(folder.glob(_PART.format(0).replace("00000", "*"))):
        lines += part.read_text(encoding="utf-8").splitlines(keepends=True)
    lines.sort(key=lambda line: int(line.split("\t", 1)[0]))
    return [line.split("\t", 1)[1] for line in lines]


def write_problem_list(folders: Sequence[Path], target: Path) -> None:
    """Write the problems of all manifests, by the folders of their indexes, to one file. Raises SaveError."""
    with saving(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(target) as temporary, temporary.open("w", encoding="utf-8") as file:
            for folder in folders:
                file.writelines(problem_lines(folder))


def shown_problems(found: Sequence[Sequence[SurveyResult]], list_file: Path) -> list[str]:
    """Return the first problems of several manifests, MAX_SHOWN in all, and a line for the others.

    Args:
        found: what the processes have found, of each manifest.
        list_file: where all problems are listed, if there are more.
    """
    total = sum(result.num_problems for results in found for result in results)
    lines = [line for results in found for _, line in sorted(problem for r in results for problem in r.problems)]
    if total <= MAX_SHOWN:
        return lines
    num_bad = sum(result.num_bad for results in found for result in results)
    left = total - MAX_SHOWN
    text = (
        f"and {counted(left, 'more problem')}: {total:,} in {counted(num_bad, 'sample')}, all of which are listed in "
        f"{list_file}; --skip_bad LIST_FILE leaves these samples out"
    )
    return [*lines[:MAX_SHOWN], MoreProblems(text, left)]
