"""The files of a folder and its sub-folders, the same for every reader and check.

Names that begin with a dot are skipped. Links to files are followed. A link to a folder is followed if that folder is
below the one that was given: a link that leads out of it or upwards would add clips that nobody has asked for. No
folder is read twice, and a folder that is reachable without links is read under its own path.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from higgs_ds.data.formats.checks import printable
from higgs_ds.model.sample import Entry

_NUMBERS = re.compile(r"([0-9]+)")


@dataclass
class Listing:
    """One folder: its path, the names of its files, its sub-folders and the links that are followed, in natural order.

    `faults` has an entry for each link that leads to no folder below the given one, or for a folder that is unreadable.
    """

    folder: Path
    names: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)
    faults: list[Entry] = field(default_factory=list)

    @cached_property
    def files(self) -> list[Path]:
        """The paths of the files, which take several times as long to make as `paths`."""
        return [self.folder / name for name in self.names]

    @property
    def paths(self) -> list[str]:
        folder = os.path.join(self.folder, "")
        return [folder + name for name in self.names]


def walk(root: Path, suffixes: tuple[str, ...] | None = None) -> Iterator[Listing]:
    """Yield the listings of a folder and its sub-folders, each folder before its sub-folders.

    Args:
        suffixes: of the files to list, in lower case; None lists every file.
    """
    real_root = Path(os.path.realpath(root))
    folders, links, seen = [root], deque[Path](), set[str]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        listing = _list_folder(folder, real_root, suffixes)
        yield listing
        folders += reversed(listing.folders)
        links += listing.links


def list_files(root: Path, suffixes: tuple[str, ...] | None = None) -> tuple[list[Path], list[Entry]]:
    """Return the files of a folder and its sub-folders, sorted by path, and the faults of the folder."""
    paths, faults = list_paths(root, suffixes)
    return sorted(map(Path, paths)), faults


def list_paths(root: Path, suffixes: tuple[str, ...] | None = None) -> tuple[list[str], list[Entry]]:
    """Return the paths of the files of a folder and its sub-folders, not sorted, and the faults of the folder."""
    listings = list(walk(root, suffixes))
    return [path for one in listings for path in one.paths], [fault for one in listings for fault in one.faults]


class _Found(NamedTuple):
    """What a folder has under one name."""

    name: str
    is_link: bool
    is_folder: bool  # or a link to one


_remembered: dict[Path, list[_Found]] | None = None


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """Within the block, each folder is listed once: whoever reads it sees the same files, also in forked processes."""
    global _remembered
    _remembered = {}
    try:
        yield
    finally:
        _remembered = None


def _scan(folder: Path) -> list[_Found]:
    """Return what is in a folder, in natural order."""
    found = None if _remembered is None else _remembered.get(folder)
    if found is None:
        with os.scandir(folder) as scan:
            shown = [entry for entry in scan if not entry.name.startswith(".")]
        shown.sort(key=lambda entry: entry.name)  # decides between 1 and 01, and leaves little to do for the next line
        shown.sort(key=lambda entry: _natural_key(entry.name))
        found = [
            _Found(entry.name, is_link, os.path.isdir(entry.path) if is_link else entry.is_dir())
            for entry in shown
            for is_link in [entry.is_symlink()]
        ]
        if _remembered is not None:
            _remembered[folder] = found
    return found


def _list_folder(folder: Path, real_root: Path, suffixes: tuple[str, ...] | None) -> Listing:
    listing = Listing(folder)
    try:
        found = _scan(folder)
    except OSError as error:
        listing.faults.append(_fault(folder, f"folder: cannot be read: {error.strerror}"))
        return listing
    for name, is_link, is_folder in found:
        if is_folder and not is_link:
            listing.folders.append(folder / name)
        elif not is_folder and (suffixes is None or name.lower().endswith(suffixes)):
            listing.names.append(name)  # its reader reports a link that is broken
        elif is_link and (reason := _why_not_followed(folder / name, real_root)):
            listing.faults.append(_fault(folder / name, reason))
        elif is_folder:
            listing.links.append(folder / name)
    return listing


def _why_not_followed(link: Path, real_root: Path) -> str:
    """Return the fault of a link, or an empty string for a link to a file or to a folder below the given one."""
    if not os.path.exists(link):  # unlike Path.exists, also without the right to see the target
        return f"link: leads to {os.readlink(link)}, which cannot be found; correct or remove the link"
    if not os.path.isdir(link):
        return ""
    target, container = Path(os.path.realpath(link)), Path(os.path.realpath(link.parent))
    if container.is_relative_to(target):
        return "folder: is a link to a folder that contains it; remove the link"
    if not target.is_relative_to(real_root):
        return (
            f"folder: is a link to {target}, outside of the given folder; replace the link by a copy, or by a folder "
            "of links to the files, or remove it"
        )
    return ""


def _fault(path: Path, fault: str) -> Entry:
    return Entry(printable(path), None, (printable(fault),))


def _natural_key(name: str) -> list[str | int]:
    """Return a sort key that orders names by the numbers in them."""
    pieces: list[str | int] = [*_NUMBERS.split(name)]
    pieces[1::2] = map(int, pieces[1::2])
    return pieces
