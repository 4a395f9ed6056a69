"""Files and folders that are either there whole or not there at all, and folders checked before they are needed."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from higgs_ds.common.errors import SaveError

ABANDONED_AFTER_S = 3600
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[^.]+\.tmp(?P<old>\.old)?")


def write_text(path: Path, text: str) -> None:
    """Write a file by way of a temporary one beside it, so that a reader sees the old or the new text."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place, flushed to disk, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place, flushed to disk, when the block ends well.

    A folder that stood at `path` is moved aside first and removed last: at every moment one of the two is whole.
    """
    with _folder_beside(path) as temporary:
        yield temporary
        flush_folder(temporary)
        aside = Path(f"{temporary}.old")
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, aside)
        os.rename(temporary, path)
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


def restore_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Put in order what killed processes have left of files and folders of these names that are replaced as above.

    What had been moved aside, and nothing has come in its place, is moved back. The rest is deleted an hour later:
    until then, a process that still runs may be writing it.
    """
    for leftover in folder.glob(".*.tmp*") if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(leftover.name)
        if not match or not names.fullmatch(match["name"]):
            continue
        if match["old"] and not (folder / match["name"]).exists():
            os.rename(leftover, folder / match["name"])
        elif time.time() - leftover.stat().st_mtime > ABANDONED_AFTER_S:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder; under its name it is whole until it is gone."""
    with _folder_beside(path) as temporary:
        os.rename(path, temporary / path.name)
        _sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which becomes it, flushed to disk, when the block ends well.

    Where another process has made a folder there in the meantime, that one stays, and this one is dropped.
    """
    with _folder_beside(path) as temporary:
        yield temporary
        flush_folder(temporary)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
        _sync(path.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can.

    glibc keeps it, and small objects that outlive large tensors part it into pieces that the next ones do not fit in:
    passing over a model of 2 GiB tensor by tensor left 1.2 GiB behind.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk where a folder is, or is to be."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be written to `folder`, or made where it is to be, as the system says it; None where it can."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    if not existing.is_dir():
        return f"{existing} is a file, not a folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"


@contextlib.contextmanager
def saving(what: Path) -> Iterator[None]:
    """Turn a failure to write in the block (full disk, permissions) into a SaveError that names `what`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"{what}: could not be written: {type(error).__name__}: {error}. What was saved before is as it was"
        ) from error


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Give everything in a folder, which libraries may have written as private, the usual mode, and sync it."""
    for entry in [*folder.rglob("*"), folder]:
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~_umask())
        _sync(entry)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
