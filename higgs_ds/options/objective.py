"""The options of the objective: supervised fine-tuning, or preference tuning on pairs of samples (DPO)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from higgs_ds.options.fields import DPO, DPO_LOSSES, IPO, OBJECTIVES, SFT, SIGMOID, option


@dataclass(frozen=True)
class ObjectiveOptions:
    """Objective"""

    objective: str = option(
        SFT, "what to learn: the samples (sft), or to prefer one sample of a pair to the other (dpo)", OBJECTIVES
    )
    pairs: tuple[Path, ...] | None = option(
        None, "for dpo, instead of --train_manifest: files of pairs, as launch/prefer.py writes them", metavar="FILE"
    )
    beta: float = option(0.1, "for dpo: how strongly the model is held to what it was at the start, above 0")
    dpo_loss: str = option(
        SIGMOID,
        "for dpo: the logistic loss of Rafailov et al. 2023 (sigmoid), or the squared one of Azar et al. 2023 (ipo)",
        DPO_LOSSES,
    )
    label_smoothing: float = option(
        0.0, "for dpo with sigmoid: share of the pairs that may be labelled the wrong way round, 0 to below 0.5"
    )
    length_normalization: bool = option(
        False, "for dpo: mean log-probabilities of a target instead of their sums, so that longer speech counts no more"
    )
    sft_weight: float = option(
        0.0, "for dpo: weight of the mean loss of the chosen samples' targets, added to the loss of the pairs"
    )

    @property
    def is_dpo(self) -> bool:
        return self.objective == DPO

    @property
    def group_size(self) -> int:
        """Number of samples that are trained on together: 2 for pairs."""
        return 2 if self.is_dpo else 1

    def describe(self) -> str:
        """Describe preference tuning in one line."""
        smoothed = f", label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        kind = "mean" if self.length_normalization else "summed"
        with_sft = f", and {self.sft_weight:g} times the loss of the chosen samples" if self.sft_weight else ""
        return f"DPO with the {self.dpo_loss} loss, beta {self.beta:g}{smoothed}, {kind} log-probabilities{with_sft}"


def check_objective(options: ObjectiveOptions) -> list[str]:
    """Return the problems of these options on their own; empty if there are none."""
    if not options.is_dpo:
        given = [name for name, value in vars(options).items() if value != getattr(ObjectiveOptions(), name)]
        return [f"--{name}: needs --objective {DPO}" for name in given]
    problems = []
    if not 0 < options.beta < math.inf:
        problems.append(f"--beta {options.beta}: must be above 0, for instance 0.1")
    if not 0 <= options.label_smoothing < 0.5:
        problems.append(f"--label_smoothing {options.label_smoothing}: must be from 0 to below 0.5")
    elif options.label_smoothing and options.dpo_loss == IPO:
        problems.append(f"--label_smoothing {options.label_smoothing}: --dpo_loss {IPO} has none; remove one of them")
    if not 0 <= options.sft_weight < math.inf:
        problems.append(f"--sft_weight {options.sft_weight}: must be 0 or more")
    return problems
