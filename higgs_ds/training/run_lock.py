"""The lock of a run's output folder: one run at a time writes there."""

from __future__ import annotations

import contextlib
from pathlib import Path

from higgs_ds.common.console import warn
from higgs_ds.common.distributed import on_main
from higgs_ds.common.files import saving
from higgs_ds.common.lock import OutputLock

LOCK_FILE = ".lock"


class RunLock:
    """Holds the lock of an output folder, on rank 0 for all ranks, from `acquire` to the end of the block.

    A folder that was created for the lock and has stayed empty is removed.
    """

    def __init__(self) -> None:
        self._lock: OutputLock | None = None
        self._created: list[Path] = []  # innermost first

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
        for folder in self._created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()

    def acquire(self, output_dir: Path) -> None:
        """Every rank must call this.

        Raises:
            InputError: another run writes there.
            SaveError: the lock file cannot be written.
        """
        on_main(lambda: self._acquire(output_dir))

    def check(self) -> None:
        """Raise SaveError if the lock was taken over. Every rank must call this."""
        on_main(self._check)

    def _check(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def _acquire(self, output_dir: Path) -> None:
        missing = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
        with saving(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        self._created = missing
        lock = OutputLock(output_dir / LOCK_FILE, f"--output_dir {output_dir}")
        lock.acquire(warn)
        self._lock = lock
