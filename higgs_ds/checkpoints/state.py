"""The progress of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.common.words import counted
from higgs_ds.options.fields import METRICS, VAL_LOSS


@dataclass
class TrainerState:
    """The progress of a run. `step` counts optimizer steps; it and the settings determine the position in the data."""

    total_steps: int
    settings: dict[str, Any]
    step: int = 0
    epoch: float = 0.0
    skipped: list[int] = field(default_factory=list)  # steps that were skipped because something was not finite
    overflows: int = 0  # of gradients in fp16; each window was run again at a lower loss scale
    loss_scaling: dict[str, Any] = field(default_factory=dict)  # the loss scale in fp16, and when it changes
    has_learned: bool = False  # whether any step so far had a learning rate above 0
    validation_due: bool = False  # whether a signal came before the validation of this step was done
    val_losses: dict[str, float] = field(default_factory=dict)  # loss of each validation so far, by its step
    evaluation_due: bool = False  # the same of the evaluation
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)  # metrics of each so far, by its step
    metric: str = VAL_LOSS  # by which steps are compared (--metric_for_best_model)
    stopped_early: bool = False  # whether --early_stopping_patience has ended the run before its last step
    warmup_steps: int | None = None  # of the learning rate; kept by a run that is made longer
    scheduler: dict[str, Any] = field(default_factory=dict)
    meters: list[dict[str, Any]] = field(default_factory=list)  # each rank's, of the steps since the last log line

    def skips(self) -> dict[str, float]:
        """Return the number of skipped steps for the log; empty if there are none."""
        return {"skipped_steps": len(self.skipped)} if self.skipped else {}

    def to_json(self) -> dict[str, Any]:
        return {"finished": self.stopped_early or self.step >= self.total_steps, **asdict(self)}

    def values(self) -> dict[int, float]:
        """Return the metric by which steps are compared, by step; NaN where it could not be measured."""
        if self.metric == VAL_LOSS:
            found = self.val_losses
        else:
            found = {step: values.get(self.metric, math.nan) for step, values in self.evaluations.items()}
        return {int(step): found[step] for step in sorted(found, key=int)}

    def losses(self) -> dict[int, float]:
        """Return the same with signs such that the lowest is the best, and infinity instead of NaN."""
        sign = -1 if METRICS[self.metric] else 1
        return {step: math.inf if math.isnan(value) else sign * value for step, value in self.values().items()}

    @property
    def best_step(self) -> int | None:
        """The step with the best metric so far, of equal ones the first; None if there is none."""
        losses = {step: loss for step, loss in self.losses().items() if loss < math.inf}
        return min(losses, key=losses.__getitem__, default=None)

    @property
    def metric_in_words(self) -> str:
        return "validation loss" if self.metric == VAL_LOSS else self.metric.removeprefix("eval/").replace("_", " ")

    @property
    def best_in_words(self) -> str:
        return "highest" if METRICS[self.metric] else "lowest"

    def is_out_of_patience(self, patience: int | None, min_delta: float) -> bool:
        """Whether each of the last `patience` measurements failed to improve the best by more than `min_delta`."""
        if patience is None:
            return False
        lowest, without = math.inf, 0
        for loss in self.losses().values():
            lower = loss < lowest - min_delta
            lowest, without = (loss, 0) if lower else (lowest, without + 1)
        return without >= patience


def check_same_run(
    saved: TrainerState, fresh: TrainerState, folder: Path, in_words: Mapping[str, str] | None = None
) -> None:
    """Raise InputError if a checkpoint's settings differ from those of the run that is to resume from it.

    Args:
        in_words: what to print instead of the values of a setting that differs.
    """
    words = in_words or {}
    problems = [
        f"{folder}: {words.get(name, f'was trained with {name} {before!r}, but this run has {after!r}')}"
        for name in sorted(saved.settings.keys() | fresh.settings.keys())
        if (before := saved.settings.get(name)) != (after := fresh.settings.get(name))
    ]
    if saved.total_steps > fresh.total_steps:
        problems.append(
            f"{folder}: is of a run of {counted(saved.total_steps, 'step')}, but this one has {fresh.total_steps}; "
            "--epochs and --max_steps can make a run longer, not shorter"
        )
    if problems:
        raise InputError([*problems, "--resume needs the same settings; start a new run in another --output_dir"])
