"""Indexes of checked manifests that are kept in the cache for later runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_ds.common.files import flush_folder, saving, write_json
from higgs_ds.data.formats.folders import list_paths
from higgs_ds.data.index import Stamp, stamp_of
from higgs_ds.data.index_writer import DESCRIPTION, VERSION
from higgs_ds.options.speakers import read_descriptions
from higgs_ds.options.train import DataOptions

UNUSED_AFTER_S = 30 * 24 * 3600  # age at which an index that no run has used is removed
# Options that affect the content of an index.
INDEXED_OPTIONS = (
    "format", "reference_placement", "normalize_text", "allow_text_targets", "max_clip_s", "trim_silence", "silence_db",
    "speaker_prompt",
)  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """What a kept index is compared with: its manifest, and a digest of the sizes and times of the manifest's files.

    The files are the manifest itself, or all files of a folder.
    """

    manifest: Path
    digest: str
    num_files: int

    def described(self, num_bad: int) -> dict[str, Any]:
        """Return the description that is kept with an index."""
        return {
            "version": VERSION, "manifest": str(self.manifest.absolute()), "files": self.digest,
            "num_files": self.num_files, "num_bad": num_bad,
        }  # fmt: skip


def identity_of(manifest: Path) -> tuple[Identity, dict[str, Stamp | None]]:
    """Return a manifest's identity, and the size and time of each of its files."""
    paths, faults = list_paths(manifest) if manifest.is_dir() else ([str(manifest)], [])
    stamps = {name: stamp_of(name) for name in sorted(paths)}
    digest = hashlib.sha256(repr([*stamps.items(), *faults]).encode())
    return Identity(manifest, digest.hexdigest(), len(paths)), stamps


class KeptIndexes:
    """The folder of the kept indexes. Only rank 0 calls its methods."""

    def __init__(self, cache_dir: Path) -> None:
        self.folder = cache_dir / "index"

    def name(self, manifest: Path, options: DataOptions, coder: str) -> str:
        """Return the name of an index without its number: one for each manifest, base and set of options.

        `coder` is the identity of the base's tokenizer and codec.
        """
        values = [getattr(options, name) for name in INDEXED_OPTIONS]
        descriptions = options.speaker_descriptions
        values.append(dict(read_descriptions(descriptions)) if descriptions else None)
        return hashlib.sha256(json.dumps([str(manifest.absolute()), *values, coder]).encode()).hexdigest()[:32]

    def find(self, name: str, identity: Identity) -> Path | None:
        """Return the folder of the newest index without bad samples whose manifest is unchanged."""
        for folder in sorted(self.folder.glob(f"{name}-*"), reverse=True):
            with contextlib.suppress(OSError, ValueError):
                if json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")) == identity.described(num_bad=0):
                    os.utime(folder)
                    return folder
        return None

    def make_scratch(self) -> Path:
        """Make a folder for the parts of a new index; remove indexes that are no longer used.

        Raises SaveError.
        """
        with saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process has just renamed its own
                    if time.time() - old.stat().st_mtime > UNUSED_AFTER_S:
                        shutil.rmtree(old, ignore_errors=True)
            return Path(tempfile.mkdtemp(dir=self.folder, suffix=".tmp"))

    def keep(self, scratch: Path, name: str, identity: Identity, num_bad: int) -> Path:
        """Move a finished index into place. It gets a new number, since an index is never changed.

        Raises SaveError.
        """
        target = self.folder / f"{name}-{time.time_ns()}"
        with saving(target):
            write_json(scratch / DESCRIPTION, identity.described(num_bad))
            flush_folder(scratch)
            os.replace(scratch, target)
        return target
