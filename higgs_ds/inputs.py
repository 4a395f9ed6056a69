"""What the checks before the first step have found good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_ds.bundle import Bundle
from higgs_ds.config import TrainOptions
from higgs_ds.data.dataset import Dataset
from higgs_ds.model.parts import Parts, parts_in_full


@dataclass(frozen=True)
class Inputs:
    """All that a run is made from, with all audio encoded."""

    options: TrainOptions
    ds_settings: dict[str, Any]
    output_dir: Path
    bundle: Bundle
    train: Dataset
    val: Dataset
    too_long: list[str]  # what --max_seq_len leaves out
    summary: str  # of the data, in lines
    resume_from: Path | None

    @property
    def in_full(self) -> Parts:
        """Optional parts of the model that are trained whole."""
        return parts_in_full(self.options.model, self.bundle.config)

    @property
    def zero_stage(self) -> int:
        return int(self.ds_settings["zero_optimization"]["stage"])

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max([*self.train.lengths, *self.val.lengths])
