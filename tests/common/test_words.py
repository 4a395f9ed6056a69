"""Numbers and names in messages."""

from __future__ import annotations

import pytest

from higgs_ds.common.words import counted, listed, shortened


def test_plurals() -> None:
    assert [counted(n, "training sample") for n in (0, 1, 2, 3000)] == [
        "0 training samples", "1 training sample", "2 training samples", "3,000 training samples",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([3, 4], "3 and 4"),
        ([3, 4, 5, 6, 7], "3 to 7"),
        ([0, 2, 3, 4, 6, 7], "0, 2 to 4, 6 and 7"),
    ],
)
def test_lists(numbers: list[int], text: str) -> None:
    assert listed(numbers) == text


def test_long_names_keep_both_ends() -> None:
    assert shortened("short", 5) == "short"
    assert shortened("a/long/name/of/a.jsonl", 12) == "a/lo...jsonl"
