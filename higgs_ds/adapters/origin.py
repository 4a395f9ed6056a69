"""Where an adapter comes from: its base, and the adapters that its run started from (`--init_from`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from higgs_ds.common.run_files import ADAPTER_COPY, ADAPTER_FOLDER, FINAL_MODEL


@dataclass(frozen=True)
class Origin:
    """An adapter that a run started from. A list of them begins with the latest.

    `name`: of its run and checkpoint, or of its folder, without the path; `sha256`: see `adapters.save.digest`.
    """

    name: str
    sha256: str

    @classmethod
    def of(cls, folder: Path, sha256: str) -> Origin:
        """Name an adapter's folder as its user knows it."""
        folder = folder.resolve()
        if folder.name in (ADAPTER_FOLDER, ADAPTER_COPY, FINAL_MODEL):
            folder = folder.parent
        name = f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
        return cls(name, sha256)


@dataclass(frozen=True)
class Record:
    """Where an adapter comes from.

    `sha256`: see `adapters.save.digest`; `is_ours`: whether this trainer wrote it; `base`: the name of its base;
    `base_weights`: that base's `Bundle.weights_digest`, if it was recorded; `origins`: see `Origin`.
    """

    sha256: str = ""
    is_ours: bool = False
    base: str | None = None
    base_weights: str | None = None
    origins: tuple[Origin, ...] = ()


def origins_to_json(origins: Sequence[Origin]) -> str:
    return json.dumps([asdict(origin) for origin in origins])


def origins_from_json(text: str) -> tuple[Origin, ...]:
    """Read `origins_to_json`. Raises ValueError or TypeError if another version wrote it."""
    return tuple(Origin(**values) for values in json.loads(text))


def describe_origins(origins: Sequence[Origin]) -> str:
    """Return a sentence of a model card, which names adapters but no folders of this machine."""
    names = [f"`{origin.name}` (SHA-256 {origin.sha256[:12]})" for origin in origins]
    return f"Started from the adapter {', which started from '.join(names)}."
