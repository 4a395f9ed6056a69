"""The options of launch/review.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from higgs_ds.options.fields import PAIRS, REQUIRED, option

LISTS = ("flat", "csv", "list", PAIRS)  # formats that hold the texts of their clips, line by line


@dataclass(frozen=True)
class ReviewOptions:
    """Review"""

    path: Path = option(
        REQUIRED,
        "list of clips or of preference pairs, or a folder with metadata.jsonl, metadata.csv or pairs.jsonl",
        metavar="FOLDER_OR_LIST",
        positional=True,
    )
    format: str = option("auto", "format of the list; auto: detected from its content", ("auto", *LISTS))
    port: int = option(0, "port of the page; 0: any that is free")
    host: str = option(
        "127.0.0.1", "address to serve at; with another one, whoever has the page's address can change the list"
    )


def check_review_options(options: ReviewOptions) -> list[str]:
    """Return the problems of the options; empty if there are none."""
    problems = [] if options.path.exists() else [f"{options.path}: no such file or folder; give a list of clips"]
    if not 0 <= options.port <= 65535:
        problems.append(f"--port {options.port}: must be from 1 to 65535, or 0 for any that is free")
    return problems
