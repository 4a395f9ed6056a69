"""The progress of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.common.words import counted
from higgs_ds.options.metrics import METRICS, VAL_LOSS, Metric


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
    evaluation_due: bool = False  # whether a signal came before the evaluation of this step was done
    # Metrics of each evaluation so far, by its step; None: was asked for, but could not be measured. And its settings.
    evaluations: dict[str, dict[str, float | None]] = field(default_factory=dict)
    evaluated_with: dict[str, Any] = field(default_factory=dict)
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

    @property
    def compared_by(self) -> Metric:
        """The metric by which steps are compared."""
        return METRICS[self.metric]

    def values(self) -> dict[int, float | None]:
        """Return this metric of each step at which it was asked for, but not of step 0, which has no checkpoint."""
        if self.metric == VAL_LOSS:
            found: dict[str, float | None] = dict(self.val_losses)
        else:
            evaluations = self.evaluations.items()
            found = {step: of_step[self.metric] for step, of_step in evaluations if self.metric in of_step}
        return {int(step): found[step] for step in sorted(found, key=int) if int(step)}

    def ranking(self) -> dict[int, float]:
        """Return a number for each step with a value: the lower, the better; infinite where it was not measurable."""
        sign = -1 if self.compared_by.is_highest_best else 1
        return {step: math.inf if value is None else sign * value for step, value in self.values().items()}

    @property
    def best_step(self) -> int | None:
        """The step with the best value so far, of equal ones the first; None if there is none."""
        measured = {step: rank for step, rank in self.ranking().items() if rank < math.inf}
        return min(measured, key=measured.__getitem__, default=None)

    @property
    def best_value(self) -> float | None:
        """The value of that step."""
        return None if self.best_step is None else self.values()[self.best_step]

    @property
    def better_start(self) -> float | None:
        """The value of step 0 if it is better than the best of all later ones; else None."""
        start, best = self.evaluations.get("0", {}).get(self.metric), self.best_value
        if start is None or best is None or best == start:
            return None
        return start if (start > best) == self.compared_by.is_highest_best else None

    def is_out_of_patience(self, patience: int | None, min_delta: float) -> bool:
        """Whether each of the last `patience` measurements failed to improve the best by more than `min_delta`."""
        if patience is None:
            return False
        best, without = math.inf, 0
        for rank in self.ranking().values():
            is_better = rank < best - min_delta
            best, without = (rank, 0) if is_better else (best, without + 1)
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
