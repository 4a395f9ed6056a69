"""Numbers and names in messages: plurals, lists of numbers, names that are too long."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in singular or plural: "1 sample", "2,000 samples". The plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(numbers: Sequence[int]) -> str:
    """Return ascending numbers with their ranges in short: "0, 2 to 5, 7 and 8"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def shortened(text: str, width: int) -> str:
    """Return a text with its middle left out where it is longer than `width` characters."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"
