"""Atomic writes of files and folders, and checks of folders before they are needed."""

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
    """Write a text file atomically, through a temporary file beside it: a reader sees the old or the new text."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that is flushed to disk and replaces it if the block raises no error."""
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
    """Yield a temporary folder beside `path` that is flushed to disk and replaces it if the block raises no error.

    A folder that exists at `path` is moved aside first and removed last: at every moment one of the two is complete.
    """
    with _temporary_folder(path) as temporary:
        yield temporary
        flush_folder(temporary)
        aside = Path(f"{temporary}.old")
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, aside)
        os.rename(temporary, path)
        _sync(path.parent)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def restore_leftovers(folder: Path, names: re.Pattern[str], locked: re.Pattern[str]) -> None:
    """Clean up after killed processes: temporary files and folders of `replaced_file` and `replaced_folder`.

    A folder that was moved aside and not yet replaced is moved back. Everything else is deleted: at once, or, where a
    running process may still be writing it, once it is an hour old.

    Args:
        names: matches the final names of the files and folders that may be cleaned up.
        locked: matches those of them that only the holder of the folder's lock writes, which the caller must be.
    """
    for leftover in folder.glob(".*.tmp*") if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(leftover.name)
        if not match or not names.fullmatch(match["name"]):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process has just finished or deleted it
            if match["old"] and not (folder / match["name"]).exists():
                os.rename(leftover, folder / match["name"])
            elif leftover.is_symlink():
                leftover.unlink()
            elif locked.fullmatch(match["name"]) or time.time() - leftover.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder atomically: under its own name it is complete until it is gone."""
    with _temporary_folder(path) as temporary:
        os.rename(path, temporary / path.name)
        _sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that is flushed to disk and renamed to it if the block raises no error.

    If another process has created `path` in the meantime, that folder stays and this one is deleted.
    """
    with _temporary_folder(path) as temporary:
        yield temporary
        flush_folder(temporary)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
        _sync(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def release_freed_memory() -> None:
    """Return freed memory to the operating system, if the C library supports it.

    glibc keeps freed memory, and small objects that outlive large tensors fragment it so that the next tensors do not
    fit: reading a model of 2 GiB tensor by tensor left 1.2 GiB allocated.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def why_not_writable(folder: Path) -> str | None:
    """Return why `folder` cannot be written to or created, with the system's reason; None if it can."""
    try:
        os.fsencode(folder).decode()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)  # fails if the name is too long or contains a null character
        existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    except UnicodeDecodeError:
        return "its name is not UTF-8"
    except (OSError, ValueError) as error:
        return f"{error.strerror if isinstance(error, OSError) else error}"
    if not existing.is_dir():
        return f"{existing} is a file, not a folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"


def check_folders(**folders: Path | None) -> list[str]:
    """Return a problem for each folder that cannot be written to. Folders are given by the options that name them."""
    return [
        f"--{name} {folder}: cannot be written to: {reason}; choose another folder"
        for name, folder in folders.items()
        if folder is not None and (reason := why_not_writable(folder))
    ]


@contextlib.contextmanager
def saving(what: Path) -> Iterator[None]:
    """Turn a write failure in the block (full disk, permissions) into a SaveError that names `what`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"{what}: could not be written: {type(error).__name__}: {error}. What was saved before is unchanged"
        ) from error


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Set the usual mode on everything in a folder (libraries may have written private files), and sync it to disk."""
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
