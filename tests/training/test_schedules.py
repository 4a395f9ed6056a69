"""Learning rates of every schedule of the engine against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from higgs_ds.options.optim import OptimOptions
from higgs_ds.training.learning_rates import make_schedule

STEPS, WARM_UP = 20, 4


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def after_warm_up(kind: str, step: int) -> float:
    """Return the share of the peak learning rate at a step after the warm-up."""
    progress = (step - WARM_UP) / (STEPS - WARM_UP)
    if kind == "linear":
        return 1 - progress
    if kind == "cosine":
        return cosine(progress)
    if kind == "cosine_with_restarts":
        return cosine((3 * progress) % 1)
    if kind == "warmup_stable_decay":
        return cosine((step - 15) / 5) if step >= 15 else 1
    return 1


@pytest.mark.parametrize(
    "kind", ["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "warmup_stable_decay"]
)
def test_schedule(kind: str) -> None:
    options = OptimOptions(
        lr=0.01, lr_scheduler_type=kind, warmup_ratio=WARM_UP / STEPS, lr_cycles=3, lr_decay_ratio=0.25
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.lr)
    schedule = make_schedule(options, optimizer, STEPS)
    for step in range(STEPS):
        share = step / WARM_UP if step < WARM_UP and kind != "constant" else after_warm_up(kind, step)
        assert schedule.get_last_lr()[0] == pytest.approx(0.01 * share, abs=1e-9), step
        optimizer.step()
        schedule.step()
