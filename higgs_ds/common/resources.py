"""Locations of the project's own files and of its cache, and the memory of this process."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def _resource_folder(name: str) -> Path:
    """Return a folder that is next to the package in a checkout, and inside the package once it is installed."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


DS_CONFIGS, SAMPLES = _resource_folder("ds_configs"), _resource_folder("samples")
DEFAULT_DS_CONFIG = DS_CONFIGS / "zero2.json"
SAMPLE_MANIFEST = SAMPLES / "digits.jsonl"


def command(name: str) -> str:
    """Return how a command is called: its script in a checkout, a subcommand of `higgs-ds` once it is installed."""
    return f"python launch/{name}.py" if (_PACKAGE.parent / "launch" / f"{name}.py").is_file() else f"higgs-ds {name}"


def default_cache_dir() -> Path:
    """Return $HIGGS_DS_CACHE, or ~/.cache/higgs_ds if it is not set."""
    return Path(os.environ.get("HIGGS_DS_CACHE") or Path.home() / ".cache" / "higgs_ds")


def resident_bytes() -> int:
    """Return the memory of this process that is in use now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
