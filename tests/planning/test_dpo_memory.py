"""Memory of preference tuning: planned as twice as many samples, and measured; there is no second model."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from conftest import PROJECT, speech_batch
from test_plan import real_model, settings_of

from higgs_ds.data.collate import Batch
from higgs_ds.data.pairs import PairBatch
from higgs_ds.model.loss import LossWeights
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.objective import ObjectiveOptions
from higgs_ds.planning import dry_run
from higgs_ds.planning.plan import plan
from higgs_ds.planning.zero_stages import Plan
from higgs_ds.training.objectives import Objective, Preference, Supervised

BIG = PROJECT / "benchmarks" / "3b"
MOST = 2.2  # times the memory of a step over the chosen samples alone
WEIGHTS = LossWeights.of(1, 1, 8, None)


def planned(options: str) -> Plan:
    line = f"--dry_run --base_ckpt {BIG} --max_seq_len 2048 --deepspeed {PROJECT}/ds_configs/zero2.json {options}"
    return plan(dry_run.make_setting(*parse_train_options(line.split())))


@pytest.mark.parametrize("recompute", ["none", "every_layer"])
@pytest.mark.parametrize("quantized", ["", "--load_in_4bit"])
def test_planned_at_the_released_geometry(quantized: str, recompute: str) -> None:
    common = f"--activation_checkpointing {recompute} {quantized} --lora_dropout 0"
    pairs, samples = (planned(f"{common} {objective} --batch_size 1") for objective in ("--objective dpo", ""))
    assert pairs == planned(f"{common} --batch_size 2")
    assert pairs.resident == samples.resident
    of_pass = [one.activations + one.logits + one.working for one in (pairs, samples)]
    assert 1.5 < of_pass[0] / of_pass[1] < MOST


@pytest.mark.parametrize("recompute", [None, 1])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_measured_on_a_cpu(kind: str, recompute: int | None) -> None:
    """The peak of a step over pairs, and over as many samples of the same length."""
    settings = settings_of(kind, recompute, 90)
    model = real_model(settings)
    objectives = {1: Supervised(WEIGHTS), 2: Preference(WEIGHTS, ObjectiveOptions(objective="dpo"))}
    peaks = {size: peak_bytes(model, objective, size) for size, objective in objectives.items()}
    print(peaks, peaks[2] / peaks[1])
    assert 1.5 < peaks[2] / peaks[1] < MOST


def peak_bytes(model: torch.nn.Module, objective: Objective, samples_per_place: int) -> int:
    """Return the bytes at the peak of a forward and backward pass over 3 places, a sample or a pair each."""
    size = 3 * samples_per_place
    batch = speech_batch(size, 90, 64, 8, 64)
    pairs = PairBatch(
        **{field.name: getattr(batch, field.name) for field in fields(Batch)},
        reference=torch.zeros(size, dtype=torch.float64),
    )
    sizes = objective.sizes(pairs)
    tensors = pairs.tensors(torch.device("cpu"))

    def step() -> None:
        losses, *_ = model(**tensors, target_weights=objective.target_weights(sizes))
        objective.loss(losses, pairs, sizes)[0].backward()

    step()  # allocates the gradients and everything that is allocated once
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    alive = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        alive += size
        peak = max(peak, alive)
    return peak
