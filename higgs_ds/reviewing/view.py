"""What the page shows of a list: its rows by pages, as values of JSON."""

from __future__ import annotations

import bisect
from typing import Any

from higgs_ds.data.audio import AudioError, seconds_of_clip
from higgs_ds.reviewing.review_list import ReviewList

ROWS_PER_PAGE = 50


def page_of(review: ReviewList, words: str, shown: str, start: int | None, at: int | None) -> dict[str, Any]:
    """Return a page of the rows that `ReviewList.find` finds.

    Args:
        start: among these, of the page's first row; rounded down.
        at: without a `start`, the row that the page contains, or else the next one; by default, the last visited.
    """
    found = review.find(words, shown)
    if start is None:
        start = bisect.bisect_left(found, review.position if at is None else at)
    start = min(start, max(0, len(found) - 1)) // ROWS_PER_PAGE * ROWS_PER_PAGE
    rows = [row_of(review, number) for number in found[start : start + ROWS_PER_PAGE]]
    return counts_of(review) | {
        "rows": rows, "start": start, "matches": len(found), "position": review.position,
        "rows_per_page": ROWS_PER_PAGE, "generation": review.generation,
    }  # fmt: skip


def row_of(review: ReviewList, number: int) -> dict[str, Any]:
    """Return a row with what is wrong with it: faults that the reader reports, and audio that cannot be opened."""
    row, entry, clip, pair = review.rows[number], review.entry(number), review.clip(number), review.pair(number)
    faults, seconds = [*entry.faults], None
    of_pair: dict[str, Any] = {} if pair is None else {"pair": {"chosen": pair.chosen, "scores": pair.scores}}
    if clip is not None:
        try:
            seconds = seconds_of_clip(clip)
        except AudioError as error:
            faults.append(f"audio: {error}")
    if pair is not None:
        try:
            of_pair["pair"]["rejected_seconds"] = seconds_of_clip(pair.rejected) if pair.rejected else None
        except AudioError as error:
            faults.append(f"rejected audio: {error}")
    speaker = entry.sample.speaker if entry.sample else None
    return {
        "row": number, "text": row.text, "dropped": row.is_dropped, "speaker": speaker, "seconds": seconds,
        "has_audio": clip is not None, "faults": faults, **of_pair,
    }  # fmt: skip


def counts_of(review: ReviewList) -> dict[str, Any]:
    return {"total": len(review.rows), "num_dropped": review.num_dropped(), "noun": f"{review.form.noun}s"}
