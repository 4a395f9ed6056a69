"""Splits of a corpus in the names of its files and folders: nobody trains on a test set without asking for it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from higgs_ds.data.formats.checks import printable
from higgs_ds.data.formats.folders import Listing, walk
from higgs_ds.model.sample import Entry
from higgs_ds.options.train import DataOptions

TRAIN = "train"
_SPLIT = re.compile(
    r"(?:^|[-_.])(?:(train|test)(?:ing)?|(validation|valid|val|dev)|(eval)(?:uation)?)(?=[-_.]|$)", re.IGNORECASE
)


def split_of(path: Path) -> str | None:
    """Return the split in the name of a file or, failing that, of the nearest folder: `train`, `dev`, `test`, ..."""
    found = next(filter(None, map(_SPLIT.search, reversed(path.parts))), None)
    return found[found.lastindex or 0].lower() if found else None


def split_fault(root: Path, paths: Iterable[Path]) -> str:
    """Return why the files or folders `paths` below `root` must not be read together; an empty string if they may.

    Of a folder that holds several splits, or only one that is not for training, the user has to name the one wanted.
    """
    found: dict[str, Path] = {}
    for path in paths:
        split = split_of(path.relative_to(root))
        if split:
            found.setdefault(split, path)
    if found.keys() <= {TRAIN}:
        return ""
    names = ", ".join(f"{split} ({path.relative_to(root)})" for split, path in sorted(found.items()))
    return f"folder: contains data of these splits: {names}; give the folder or the file of the split that is meant"


def split_folders(root: Path) -> Iterator[Path]:
    """Yield the folders whose own name is that of a split, one and two levels below `root`."""
    for folder in _folders_in(root):
        if split_of(Path(folder.name)):
            yield folder
        else:
            yield from (inner for inner in _folders_in(folder) if split_of(Path(inner.name)))


def read_split(
    path: Path,
    suffixes: tuple[str, ...],
    options: DataOptions,
    read_folder: Callable[[Listing, DataOptions], Iterator[Entry]],
) -> Iterator[Entry]:
    """Yield the entries of all folders of a corpus, and their faults; one fault if it must not be read together."""
    fault = split_fault(path, split_folders(path))
    if fault:
        yield Entry(printable(path), None, (printable(fault),))
        return
    for listing in walk(path, suffixes):
        yield from read_folder(listing, options)
        yield from listing.faults


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as scan:
            return sorted(Path(entry.path) for entry in scan if entry.name[:1] != "." and entry.is_dir())
    except OSError:
        return []  # the reader reports it
