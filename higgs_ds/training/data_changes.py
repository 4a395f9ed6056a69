"""What a run was trained on, kept beside its checkpoints, so that a refused resume says what has changed since."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from higgs_ds.common.files import replaced_file, saving
from higgs_ds.common.run_files import TRAINING_DATA_FILE
from higgs_ds.common.words import counted
from higgs_ds.data.dataset import Dataset

UNKNOWN = "the training data is not the same; which samples differ was not recorded"
Record = dict[str, np.ndarray]


def record_training_data(output_dir: Path, data: Dataset) -> None:
    """Write what identifies each training sample, 24 bytes a sample, unless the file has it. Raises SaveError."""
    path, identity = output_dir / TRAINING_DATA_FILE, data.digest()
    if _read(path, identity) is not None:
        return
    with saving(path), replaced_file(path) as temporary, temporary.open("wb") as file:
        record = _record_of(data)
        np.savez(file, identity=json.dumps(identity), digests=record["digests"], sources=record["sources"])


def describe_data_change(output_dir: Path, identity: Any, data: Dataset) -> str:
    """Say in words how training data differs from what a run in `output_dir` was trained on.

    Args:
        identity: the digest of that run's data, as its checkpoint has it.
    """
    saved = _read(output_dir / TRAINING_DATA_FILE, identity)
    if saved is None:
        return UNKNOWN
    now = _record_of(data)
    before, after = (Counter(record["digests"].tolist()) for record in (saved, now))
    new, gone = after - before, before - after
    if not new and not gone:
        in_order = np.array_equal(saved["digests"], now["digests"])
        what = "other references, or divided among the manifests differently" if in_order else "another order"
        return f"the training data has the same {counted(len(data), 'sample')}, but in {what}"
    changed = len(_sources(saved, gone) & _sources(now, new))
    parts = {"new": new.total() - changed, "gone": gone.total() - changed, "changed": changed}
    parts["unchanged"] = (before & after).total()
    numbers = ", ".join(f"{number:,} {name}" for name, number in parts.items() if number)
    total = f"of {counted(len(saved['digests']), 'sample')} then and {len(data):,} now"
    return f"the training data has changed: {total}, by text and audio: {numbers}"


def _record_of(data: Dataset) -> Record:
    sources = [hashlib.blake2b(source.encode(), digest_size=8).digest() for source in data.sources(range(len(data)))]
    return {"digests": data.index.digests()[data.rows], "sources": np.array(sources, "V8")}


def _sources(record: Record, digests: Counter[bytes]) -> set[bytes]:
    """Return where samples with these digests come from."""
    pairs = zip(record["digests"].tolist(), record["sources"].tolist(), strict=True)
    return {source for digest, source in pairs if digest in digests}


def _read(path: Path, identity: Any) -> Record | None:
    """Return the record of the data with this digest; None if the file is missing, damaged or of other data."""
    try:
        with np.load(path, allow_pickle=False) as file:
            matches = json.loads(str(file["identity"])) == identity
            return {name: file[name] for name in ("digests", "sources")} if matches else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
