"""What a preparation needs before it can begin: folders that can be written to, and manifests."""

from __future__ import annotations

import os
from pathlib import Path

from higgs_ds.common.files import check_folders
from higgs_ds.options.train import DataOptions


def scratch_problems(options: DataOptions, cache_dir: Path) -> list[str]:
    """Return the problems that prevent manifests from being checked at all.

    One of several manifests that is not there is named at once, and not after the others have been checked.
    """
    bad_list = options.skip_bad
    manifests = (*options.train_manifests, *(options.val_manifest or ()))
    missing = [path for path in manifests if len(manifests) > 1 and not os.path.lexists(path)]
    problems = [f"{path}: no such file or folder" for path in missing]
    problems += check_folders(cache_dir=cache_dir, skip_bad=bad_list.parent if bad_list is not None else None)
    if bad_list is not None and not _may_be_replaced(bad_list):
        problems.append(f"--skip_bad {bad_list}: exists, and is not a list of bad samples; choose another file")
    return problems


def _may_be_replaced(path: Path) -> bool:
    """Return whether a file does not exist or looks like an earlier list: lines "SOURCE: REASON", not a manifest."""
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(1 << 16)
    lines = start.decode(errors="replace").splitlines()
    return b"\0" not in start and all(": " in line and not line.startswith(("{", "[")) for line in lines[:-1] or lines)
