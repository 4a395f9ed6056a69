"""`checkpoint-N/trained_weights/`: the float32 master weights of full fine-tuning, written while they are gathered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from higgs_ds.adapters.save import check_finite
from higgs_ds.adapters.speakers import NO_SPEAKERS, TrainedSpeakers, read_speakers
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import write_json
from higgs_ds.common.run_files import AVERAGED_TRAINED_FOLDER, TRAINED_FOLDER
from higgs_ds.common.tensor_files import StoredTensors, shard_files, write_shards
from higgs_ds.model.parts import NO_PARTS, Parts

FACTS_FILE = "trained.json"


@dataclass(frozen=True)
class FullFormat:
    """What is recorded with fully fine-tuned weights.

    `groups`: those of --train_groups; `base`: the reported name of the base; `base_identity`: its `Bundle.identity`;
    `full_parts`: optional parts of the model that are among the weights.
    """

    groups: tuple[str, ...]
    base: str
    base_identity: str
    full_parts: Parts = NO_PARTS
    speakers: TrainedSpeakers = NO_SPEAKERS

    def to_json(self) -> dict[str, Any]:
        return {
            "groups": self.groups,
            "base": self.base,
            "base_identity": self.base_identity,
            "in_full": self.full_parts.to_json(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FullFormat:
        """Read what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: something else wrote the values.
        """
        parts = Parts.from_json(values["in_full"])
        return cls(tuple(values["groups"]), str(values["base"]), str(values["base_identity"]), parts)


def write_trained(folder: Path, sizes: Mapping[str, int], tensors: Iterator[torch.Tensor], form: FullFormat) -> None:
    """Write master weights while they are gathered, with about a gigabyte of them in memory at a time.

    Args:
        folder: an empty folder, which the caller moves to its final place only if this returns.
        sizes: bytes of each tensor by its name in a native model, in the order of `tensors`.

    Raises:
        NotFiniteError: a tensor holds NaN or infinity.
        SaveError: a tensor reads back differently than written.
    """

    def checked_tensors() -> Iterator[torch.Tensor]:
        for name, tensor in zip(sizes, tensors, strict=True):
            check_finite({name: tensor})
            yield tensor

    folder.mkdir(parents=True, exist_ok=True)
    write_shards(sizes, checked_tensors(), folder)
    write_json(folder / FACTS_FILE, form.to_json())
    form.speakers.write(folder)


def read_trained(checkpoint: Path, averaged: bool = False) -> tuple[StoredTensors, FullFormat]:
    """Return the master weights in a checkpoint, or their averages, and what is recorded with them.

    Raises:
        InputError: the checkpoint has no such weights of full fine-tuning, or they are damaged.
    """
    folder = checkpoint / TRAINED_FOLDER
    if averaged and folder.is_dir():
        folder = checkpoint / AVERAGED_TRAINED_FOLDER
        if not folder.is_dir():
            raise InputError(f"{checkpoint}: holds no averaged weights: its run had no --ema_decay")
    if not folder.is_dir():
        raise InputError(
            f"{checkpoint}: holds no {TRAINED_FOLDER}/; give a checkpoint-N/ of a run with --finetune full"
        )
    try:
        form = FullFormat.from_json(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8")))
        form = replace(form, speakers=read_speakers(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: {FACTS_FILE} cannot be read ({type(error).__name__})") from error
    return StoredTensors(shard_files(folder)), form
