"""From a manifest to an index of checked samples whose clips are all encoded. All ranks work together.

The ranks divide the samples among them by number, and share the cache, whose folder must therefore be visible to all of
them. If a manifest has any problem, nothing of it is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import MoreProblems, SaveError
from higgs_ds.common.files import saving, write_text
from higgs_ds.common.forks import may_fork, run_in_forks
from higgs_ds.common.lock import OutputLock, lock_beside
from higgs_ds.common.process import quick_imports
from higgs_ds.common.words import counted
from higgs_ds.data.coder import Coder
from higgs_ds.data.flags import Flagged, find_flags
from higgs_ds.data.formats.folders import listed_once
from higgs_ds.data.index import Index, open_kept
from higgs_ds.data.index_writer import CheckedSample, PartWriter
from higgs_ds.data.kept_indexes import Identity, KeptIndexes, identity_of
from higgs_ds.data.problem_list import (
    LIST_FOLDER,
    open_problems,
    problem_lines,
    shown_problems,
    write_problem_list,
)
from higgs_ds.data.reference_choice import references_of
from higgs_ds.data.reference_index import add_references
from higgs_ds.data.summary import describe
from higgs_ds.data.survey import (
    Checker,
    MissingClips,
    Share,
    SurveyResult,
    describe_left_out,
    missing_clips,
    survey,
)
from higgs_ds.options.flags import FlagOptions
from higgs_ds.options.train import DataOptions

if TYPE_CHECKING:
    import torch

WHOLE = Share()
WORTH_BYTES, WORTH_FILES = 4 << 20, 4096  # of a manifest or a folder, above which processes are faster than threads
Keep = Callable[[list[CheckedSample]], None]


@dataclass
class CheckedManifest:
    """A manifest that has been checked, or whose kept index is still valid."""

    path: Path
    problems: list[str] = field(default_factory=list)  # of the whole; `Preparation.problems` adds those of samples
    index: Index | None = None  # set if there is a base, and no problem or --skip_bad
    findings: list[SurveyResult] = field(default_factory=list)  # of every rank; empty for a kept index
    missing: MissingClips = field(default_factory=MissingClips)  # of this rank's share
    folder: Path | None = None  # of an index that is not kept yet
    identity: Identity | None = None  # of the manifest before it was read

    @property
    def num_bad(self) -> int:
        return sum(findings.num_bad for findings in self.findings)


class Preparation:
    """Checks manifests for one base, then encodes clips that are not in the cache. Every rank must call every method.

    Use it as a context manager: on exit, it removes unfinished files.
    """

    def __init__(self, options: DataOptions, coder: Coder | None, cache_dir: Path, shard: Share = WHOLE) -> None:
        """With a `shard`, this run processes only that part of each manifest; other runs process the rest."""
        self.options = options
        self.coder = coder
        self.cache_dir = cache_dir
        self.shard = shard
        self.num_workers = options.num_workers or max(1, (os.cpu_count() or 1) // distributed.local_world_size())
        self.checker = Checker(options, self.coder)
        self._kept = KeptIndexes(cache_dir)
        self._scratch: list[Path] = []
        self._list_lock: OutputLock | None = None

    def __enter__(self) -> Preparation:
        """Raises InputError if another process writes the list of --skip_bad."""
        distributed.on_main(self._begin_list)
        return self

    def _begin_list(self) -> None:
        bad_list = self.options.skip_bad
        if bad_list is not None:
            lock = OutputLock(lock_beside(bad_list), f"--skip_bad {bad_list}")
            lock.acquire(warn)
            self._list_lock = lock
            try:
                with saving(bad_list):
                    write_text(bad_list, "")
            except SaveError:
                lock.release()
                raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                distributed.barrier()  # another rank may still read what is removed
        finally:
            if self._list_lock is not None:
                self._list_lock.release()
            if distributed.is_main():
                for folder in self._scratch:
                    shutil.rmtree(folder, ignore_errors=True)

    def check(self, path: Path) -> CheckedManifest:
        """Check a manifest, unless an earlier run has checked it and nothing has changed since."""
        with listed_once():
            return self._check(path)

    def _check(self, path: Path) -> CheckedManifest:
        identity, kept_index = self._kept_index(path)
        if kept_index is not None:
            self._add_references(kept_index)
            return CheckedManifest(path, index=kept_index)
        folder = self._scratch_folder()
        unshared = [] if folder.is_dir() else [self._not_shared()]
        unshared = [problem for problems in distributed.gather_objects(unshared) for problem in problems]
        if unshared:
            return CheckedManifest(path, unshared)
        findings, missing = self._survey(path, folder, identity.num_files)
        gathered = [one for of_rank in distributed.gather_objects(findings) for one in of_rank]
        checked = CheckedManifest(path, findings=gathered, missing=missing, folder=folder, identity=identity)
        for line in describe_left_out(gathered, self.coder):
            say(f"{path}: {line}")
        if checked.num_bad and self.options.skip_bad is not None:
            self._list_bad(folder, self.options.skip_bad)
            say(f"skipped {counted(checked.num_bad, 'bad sample')} of {path}, listed in {self.options.skip_bad}")
            if checked.num_bad == sum(findings.num_entries for findings in checked.findings):
                checked.problems.append(f"{path}: every sample is bad, see {self.options.skip_bad}")
        is_refused = checked.num_bad > 0 and self.options.skip_bad is None
        if self.coder is not None and not checked.problems and not is_refused:
            checked.index = Index(folder)
            self._add_references(checked.index)
        return checked

    def problems(self, checked: Sequence[CheckedManifest], list_file: Path | None = None) -> list[str]:
        """Return why these manifests cannot be used; empty if they can.

        If there are too many problems to print, all of them are listed in a file: `list_file`, or one in the cache.
        """
        of_manifests = [problem for manifest in checked for problem in manifest.problems]
        refused = [m for m in checked if m.num_bad and self.options.skip_bad is None]
        if list_file is None:
            name = hashlib.sha256(repr(([str(m.path.absolute()) for m in checked], self.shard)).encode()).hexdigest()
            list_file = self.cache_dir / LIST_FOLDER / f"{name[:16]}.txt"
        lines = shown_problems([m.findings for m in refused], list_file)
        if any(isinstance(line, MoreProblems) for line in lines):
            folders = [m.folder for m in refused if m.folder is not None]
            distributed.on_main(lambda: write_problem_list(folders, list_file))
        return of_manifests + lines

    def _survey(self, path: Path, folder: Path, num_files: int) -> tuple[list[SurveyResult], MissingClips]:
        """Check this rank's share of a manifest: in several processes if it is large, else in threads."""
        is_large = num_files > WORTH_FILES or (path.is_file() and path.stat().st_size > WORTH_BYTES)
        count = self.num_workers if is_large and may_fork() else 1
        first = (self.shard.index * distributed.world_size() + distributed.rank()) * count
        num_shares = self.shard.count * distributed.world_size() * count
        num_threads = self.num_workers if count == 1 else 1

        def check_share(number: int) -> tuple[SurveyResult, MissingClips]:
            with _open_part(folder, distributed.rank() * count + number) as (keep, report_invalid):
                share = Share(first + number, num_shares)
                return survey(path, self.checker, share, num_threads, keep, report_invalid)

        # What follows needs the codec: clips are encoded, or compared with what it makes of them.
        meanwhile = import_codec if self.coder is not None else None
        results = run_in_forks(check_share, count, meanwhile) if count > 1 else [check_share(0)]
        return [result for result, _ in results], MissingClips.merged([missing for _, missing in results])

    def encode(self, checked: CheckedManifest, device: torch.device | None = None) -> None:
        """Encode this rank's share of the missing clips, by default on its own device; wait for the other ranks."""
        missing = checked.missing
        if missing.keys:
            assert self.coder is not None
            from higgs_ds.data.encode import encode_clips

            encode_clips(
                missing_clips(checked.path, self.checker, missing),
                count=len(missing.keys),
                seconds=missing.seconds,
                coder=self.coder,
                device=device or distributed.device(),  # imports torch, which takes longer than the rest of a restart
                num_workers=self.num_workers,
                show_progress=distributed.is_main(),
            )
        distributed.barrier()

    def keep(self, checked: CheckedManifest) -> Index:
        """Move the index of a whole manifest into place for this and later runs. The index of a shard is not kept."""
        assert checked.index is not None
        if checked.folder is None or self.shard != WHOLE:
            return checked.index

        def publish() -> Path:
            assert checked.folder is not None
            assert checked.identity is not None
            return self._kept.keep(checked.folder, self._index_name(checked.path), checked.identity, checked.num_bad)

        checked.index = None  # release this mapping first: memory that is mapped twice counts twice
        target = distributed.on_main(publish)
        with saving(target):
            return Index(target)

    def describe(self, checked: CheckedManifest) -> str:
        """Return a summary of several lines."""
        assert checked.index is not None
        assert self.coder is not None
        codec = self.coder.codec
        frame_rate = codec.sample_rate / codec.hop_length
        lines = describe(checked.index, frame_rate, self.options.max_seq_len)
        checked.index.release_pages()
        rows = np.arange(len(checked.index))
        references = references_of(checked.index, rows, rows, self.options, seed=0) if self.shard == WHOLE else None
        return f"{lines}\nreferences: {references.describe(with_dropout=False)}" if references else lines

    def flagged(self, index: Index, options: FlagOptions) -> Flagged:
        """Find samples that may be bad. Unlike other methods, only rank 0 needs to call this."""
        assert self.coder is not None
        return find_flags(index, options, self.options.trim_silence, self.coder.codec.sample_rate)

    def _add_references(self, index: Index) -> None:
        """Add the columns to an index that only some options need."""
        coder = self.coder
        assert coder is not None

        def add() -> None:
            with saving(index.folder):
                add_references(index.folder, coder)

        if self.shard == WHOLE and (self.options.has_random_references or self.options.reference_dropout):
            distributed.on_main(add)

    def _kept_index(self, path: Path) -> tuple[Identity, Index | None]:
        """Return a manifest's identity, and the index of an earlier run if its files and their codes are unchanged."""
        found, stamps = identity_of(path) if distributed.is_main() else (None, {})
        identity = distributed.broadcast_object(found)
        if self.coder is None or self.shard != WHOLE:
            return identity, None
        folder = distributed.on_main(lambda: self._kept.find(self._index_name(path), identity))
        index = open_kept(folder) if folder is not None else None
        fresh = index and index.is_fresh(self.coder.has_outputs, distributed.rank(), distributed.world_size(), stamps)
        is_fresh = all(distributed.gather_objects(bool(fresh)))
        return identity, index if is_fresh else None

    def _index_name(self, path: Path) -> str:
        assert self.coder is not None
        return self._kept.name(path, self.options, self.coder.identity)

    def _scratch_folder(self) -> Path:
        def make() -> Path:
            self._scratch.append(self._kept.make_scratch())
            return self._scratch[-1]

        return distributed.on_main(make)

    def _not_shared(self) -> str:
        return (
            f"--cache_dir {self.cache_dir}: {socket.gethostname()} cannot see the files that rank 0 writes there; "
            "use a folder that all nodes share"
        )

    def _list_bad(self, folder: Path, target: Path) -> None:
        """Write the bad samples that each rank has skipped to one file, in manifest order."""

        def collect() -> None:
            with saving(target), target.open("a", encoding="utf-8") as file:
                file.writelines(problem_lines(folder))

        distributed.on_main(collect)


def import_codec() -> None:
    """Import torch and the codec's classes."""
    with quick_imports():
        importlib.import_module("higgs_ds.data.codec")


@contextlib.contextmanager
def _open_part(folder: Path, rank: int) -> Iterator[tuple[Keep, Callable[[int, str], None]]]:
    """Open the files of one rank; yield the functions that write its good samples and the problems of the others."""
    with saving(folder):
        writer = PartWriter(folder, rank)

    def keep(samples: list[CheckedSample]) -> None:
        with saving(folder):
            for sample in samples:
                writer.add(sample)

    with open_problems(folder, rank) as report_invalid:
        yield keep, report_invalid
    with saving(folder):
        writer.close()
