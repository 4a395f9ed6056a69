"""The lock of an output folder that all ranks write to: one command at a time."""

from __future__ import annotations

import contextlib
from pathlib import Path

from higgs_ds.common.console import warn
from higgs_ds.common.distributed import on_main
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import check_folders, saving
from higgs_ds.common.lock import OutputLock

RUN_LOCK, EVALUATION_LOCK, SLICING_LOCK, PREFERENCE_LOCK = (
    ".lock", ".evaluation.lock", ".slicing.lock", ".preference.lock",
)  # fmt: skip


class FolderLock:
    """Holds the lock of --output_dir, on rank 0 for all ranks, from `acquire` to the end of the block.

    A folder that was created for the lock and has stayed empty is removed.
    """

    def __init__(self, file_name: str = RUN_LOCK) -> None:
        """Commands with different lock files may write to the same folder: their outputs have different names."""
        self.file_name = file_name
        self._lock: OutputLock | None = None
        self._created: list[Path] = []  # innermost first

    def __enter__(self) -> FolderLock:
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
            InputError: another process writes there, or nothing can be written there.
            SaveError: the lock file cannot be written.
        """
        on_main(lambda: self._acquire(output_dir))

    def check(self) -> None:
        """Raise SaveError if another process has taken the lock over. Every rank must call this."""
        on_main(self._check)

    def _check(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def _acquire(self, output_dir: Path) -> None:
        problems = check_folders(output_dir=output_dir)
        if problems:
            raise InputError(problems)
        missing = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
        with saving(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        self._created = missing
        lock = OutputLock(output_dir / self.file_name, f"--output_dir {output_dir}")
        lock.acquire(warn)
        self._lock = lock
