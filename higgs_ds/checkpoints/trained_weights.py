"""`checkpoint-N/trained_weights/`: the float32 masters of weights that are trained in full, as they are gathered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from higgs_ds.adapters.save import check_finite
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import write_json
from higgs_ds.common.run_files import TRAINED_FOLDER
from higgs_ds.common.tensor_files import StoredTensors, shard_files, write_shards
from higgs_ds.model.parts import NO_PARTS, Parts

FACTS_FILE = "trained.json"


@dataclass(frozen=True)
class FullFormat:
    """What is to be known of weights that were trained in full, beside them.

    `groups`: those of --train_groups; `base`: how the base was called, `base_identity`: `Bundle.identity` of it.
    `full_parts`: optional parts of the model that are among them.
    """

    groups: tuple[str, ...]
    base: str
    base_identity: str
    full_parts: Parts = NO_PARTS

    def to_json(self) -> dict[str, Any]:
        return {
            "groups": self.groups,
            "base": self.base,
            "base_identity": self.base_identity,
            "in_full": self.full_parts.to_json(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FullFormat:
        """Raises KeyError, TypeError, ValueError: something else has written it."""
        parts = Parts.from_json(values["in_full"])
        return cls(tuple(values["groups"]), str(values["base"]), str(values["base_identity"]), parts)


def write_trained(folder: Path, sizes: Mapping[str, int], tensors: Iterator[torch.Tensor], form: FullFormat) -> None:
    """Write masters as they come, about a gigabyte of them in memory at a time.

    Args:
        folder: an empty one, which takes its final place only if this returns.
        sizes: bytes of each by its name in a native model, in the order in which they come.

    Raises NotFiniteError where one holds NaN or infinity; SaveError where one reads back otherwise than written.
    """

    def finite() -> Iterator[torch.Tensor]:
        for name, tensor in zip(sizes, tensors, strict=True):
            check_finite({name: tensor})
            yield tensor

    folder.mkdir(parents=True, exist_ok=True)
    write_shards(sizes, finite(), folder)
    write_json(folder / FACTS_FILE, form.to_json())


def read_trained(checkpoint: Path) -> tuple[StoredTensors, FullFormat]:
    """The masters in a checkpoint, and what is known of them. Raises InputError: there are none, or damaged ones."""
    folder = checkpoint / TRAINED_FOLDER
    if not folder.is_dir():
        raise InputError(
            f"{checkpoint}: holds no {TRAINED_FOLDER}/; give a checkpoint-N/ of a run with --finetune full"
        )
    try:
        form = FullFormat.from_json(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its {FACTS_FILE} cannot be read ({type(error).__name__})") from error
    return StoredTensors(shard_files(folder)), form
