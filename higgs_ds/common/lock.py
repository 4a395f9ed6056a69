"""One writer per output: a lock file that names its owner, works between machines, and is taken over from the dead.

A lock is a small JSON file that its owner creates exclusively and touches every few seconds. Whether an owner is alive
is known at once on the same machine (its process) and for an earlier start of the same Slurm job; otherwise the file is
watched until it is touched or has been left alone for STALE_AFTER_S.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import psutil

from higgs_ds.common.errors import InputError, SaveError
from higgs_ds.common.files import saving, write_json

TOUCH_EVERY_S = 5.0
STALE_AFTER_S = 30.0
UNREADABLE_S = 5.0  # how long a lock file may stay without its content
LARGEST_FILE = 4096  # bytes; a lock file has a few hundred
LATEST_START = 1e11  # seconds since 1970
_SAME_START_S = 1.0  # by how much two readings of a process's start may differ


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock. `started` is in seconds since 1970, `namespace` that of its process ids."""

    host: str
    pid: int
    started: float
    boot: str
    namespace: str
    job: str
    restarts: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def this_process(cls) -> Owner:
        restarts = os.environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            boot=_text_of("/proc/sys/kernel/random/boot_id"),
            namespace=_link_of("/proc/self/ns/pid"),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(restarts) if restarts.isdecimal() else 0,
        )

    @classmethod
    def from_json(cls, text: str) -> Owner:
        """Read the content of a lock file. Raises ValueError, TypeError, KeyError or RecursionError for any other."""
        values = json.loads(text)
        owner = cls(**{f.name: values[f.name] for f in fields(cls)})
        texts = (owner.host, owner.boot, owner.namespace, owner.job, owner.token)
        numbers = (owner.pid, owner.restarts)
        if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
            raise TypeError("a value has the wrong type")
        if owner.pid <= 0 or not 0 <= owner.started <= LATEST_START:
            raise ValueError("a value is out of range")
        return owner

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {started}"


class OutputLock:
    """The lock of one output, held by this process from `acquire` to `release`."""

    def __init__(self, path: Path, output: str) -> None:
        """Prepare a lock.

        Args:
            path: the lock file.
            output: how messages name what is locked, with its option.
        """
        self.path, self.output = path, output
        self._owner: Owner | None = None
        self._ended = threading.Event()

    def acquire(self, report: Callable[[str], None]) -> None:
        """Take the lock, if need be from an owner that is no longer alive, which is reported.

        Raises:
            InputError: another process holds it; names host, process and start.
            SaveError: the lock file cannot be written.
        """
        if os.path.lexists(self.path) and (self.path.is_symlink() or not self.path.is_file()):
            raise InputError(f"{self.output}: {self.path} is not a lock file; remove it, or choose another path")
        owner = Owner.this_process()
        with saving(self.path):
            while not self._create(owner):
                holder = self._read()
                if holder is None:
                    continue  # released in the meantime
                reason = self._why_dead(holder, owner, report)
                if reason is None:
                    raise InputError(
                        f"{self.output}: {holder}, is writing there; wait until it has ended, stop it, or choose "
                        "another path"
                    )
                if self._replace(holder, owner):
                    report(f"note: {self.output}: the lock of {holder}, is taken over: {reason}")
                    break
        self._owner = owner
        self._ended.clear()
        threading.Thread(target=self._touch, name="output lock", daemon=True).start()

    def check(self) -> None:
        """Raise SaveError if another process has taken the lock over, which must not be disturbed."""
        holder = self._read()
        if self._owner is not None and (holder is None or holder.token != self._owner.token):
            by = "removed" if holder is None else f"taken over by {holder}"
            raise SaveError(f"{self.output}: the lock of this run was {by}; this run ends, and writes nothing more")

    def release(self) -> None:
        """Give the lock up; without effect if it is not held."""
        if self._owner is not None:
            self._ended.set()
            holder = self._read()
            if holder is not None and holder.token == self._owner.token:
                # On a disk that has become read-only, the file stays. It is recognized as left over.
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)
            self._owner = None

    def _create(self, owner: Owner) -> bool:
        """Create the lock file, or return False if there is one. Exclusive creation is atomic, also over NFS."""
        try:
            file = self.path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                json.dump(asdict(owner), file)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> Owner | None:
        """The present owner; None if there is no lock file. One that stays unreadable is removed."""
        deadline = time.monotonic() + UNREADABLE_S
        while True:
            try:
                if not self.path.is_file():
                    return None
                with self.path.open("rb") as file:
                    return Owner.from_json(file.read(LARGEST_FILE).decode())
            except (FileNotFoundError, IsADirectoryError):
                return None
            except (ValueError, TypeError, KeyError, RecursionError):
                # It is being written, or its writer was killed at that moment.
                if time.monotonic() > deadline:
                    self.path.unlink(missing_ok=True)
                    return None
                time.sleep(0.05)

    def _replace(self, dead: Owner, owner: Owner) -> bool:
        """Replace a dead owner's lock; False if another process was faster. One process at a time may do this."""
        right = self.path.with_name(f"{self.path.name}.takeover")
        try:
            right.open("x").close()
        except FileExistsError:
            time.sleep(0.05)
            with contextlib.suppress(FileNotFoundError):
                if time.time() - right.stat().st_mtime > STALE_AFTER_S:  # its process was killed in between
                    right.unlink()
            return False
        try:
            holder = self._read()
            if holder is None or holder.token != dead.token:
                return False
            write_json(self.path, asdict(owner))
            return True
        finally:
            right.unlink(missing_ok=True)

    def _why_dead(self, holder: Owner, own: Owner, report: Callable[[str], None]) -> str | None:
        """Why the holder cannot be alive; None if it is."""
        if (holder.host, holder.boot, holder.namespace) == (own.host, own.boot, own.namespace):
            if holder.pid == own.pid:
                return "it is this process"
            return None if _runs(holder) else "that process has ended"
        same_name = holder.host == own.host and holder.namespace == own.namespace
        # Two machines may have the same name. If this is the holder's, the lock has not been touched since it started.
        if same_name and (self._touched_at() or 0) < psutil.boot_time() * 1e9:
            return "that machine has been started again since"
        if holder.job and holder.job == own.job and holder.restarts < own.restarts:
            return f"Slurm has started job {own.job} again"
        report(f"{self.output}: locked by {holder}; watching for up to {STALE_AFTER_S:g} s whether it is alive")
        return self._why_stale(holder)

    def _why_stale(self, holder: Owner) -> str | None:
        """Watch the lock of an owner that cannot be asked; None once it was touched."""
        first = self._touched_at()
        deadline = time.monotonic() + STALE_AFTER_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_AFTER_S / 10))
            now = self._touched_at()
            if now is None:
                return "it has ended"
            if now != first:
                return None
        return f"it has given no sign of life for {STALE_AFTER_S:g} s"

    def _touched_at(self) -> int | None:
        """When the lock file was last touched. It is opened, so that a network file system asks its server."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
        return None

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH_EVERY_S):
            with contextlib.suppress(OSError):  # a file system that is away for a moment; `check` reports a lost lock
                os.utime(self.path)


@contextlib.contextmanager
def locked(path: Path, output: str, report: Callable[[str], None]) -> Iterator[OutputLock]:
    """Hold the lock of an output within the block. Raises as `OutputLock.acquire`."""
    lock = OutputLock(path, output)
    lock.acquire(report)
    try:
        yield lock
    finally:
        lock.release()


def lock_beside(output: Path) -> Path:
    """The lock file of an output that is written as a whole: next to it, hidden."""
    return output.absolute().with_name(f".{output.absolute().name}.lock")


def _runs(owner: Owner) -> bool:
    try:
        process = psutil.Process(owner.pid)
        same = abs(process.create_time() - owner.started) < _SAME_START_S
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _text_of(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="ascii").strip()
    return ""


def _link_of(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""
