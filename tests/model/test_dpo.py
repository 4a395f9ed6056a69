"""DPO and IPO compared with a plain implementation: two forward passes of one sample each, log_softmax, autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import plain_v3
import pytest
import torch
import torch.nn.functional as F
from conftest import native_inputs
from plain_v3 import PlainModel
from test_routed_layers import CPU
from test_routed_layers import batch_of as v2_batch
from test_v3_loss import STREAM as V3_STREAM
from test_v3_loss import samples_of, v3_base  # noqa: F401 - a fixture
from torch import nn

from higgs_ds.data.collate import Batch, collate
from higgs_ds.data.pairs import NO_REFERENCE, PairBatch
from higgs_ds.model.full import unfreeze_groups
from higgs_ds.model.loading import load_base
from higgs_ds.model.loss import LossWeights, Totals
from higgs_ds.model.v2.loss_model import DualLossModel
from higgs_ds.model.v3.loss_model import AudioLossModel
from higgs_ds.options.fields import TRAIN_GROUPS
from higgs_ds.options.objective import ObjectiveOptions
from higgs_ds.training.objectives import Preference

V2_SHAPES = ((9, 20, 3), (5, 11, 2), (6, 30, 2), (4, 8, 1))  # text positions, frames, text positions: two pairs
V3_SHAPES = ((3, 0, 4, 6), (3, 0, 4, 4), (2, 9, 3, 7), (2, 9, 3, 9))
OPTIONS = {
    "dpo": {"beta": 0.3},
    "means of targets": {"beta": 2.0, "length_normalization": True},
    "smoothed": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"dpo_loss": "ipo", "beta": 0.5, "length_normalization": True},
    "with the loss of the chosen": {"beta": 0.3, "sft_weight": 0.7},
}
EVEN = LossWeights.of(1, 1, 8, None)
UNEVEN = LossWeights.of(0.5, 2, 8, [4, 2, 1, 1, 1, 0.5, 0.5, 0])


def only(part: int) -> LossWeights:
    """Weights of the text alone (0), or of one codebook alone."""
    return (
        LossWeights.of(1, 0, 8, None) if part == 0 else LossWeights.of(0, 1 / 8, 8, [k == part - 1 for k in range(8)])
    )


def pairs_of(batch: Batch, reference: torch.Tensor = NO_REFERENCE) -> PairBatch:
    return PairBatch(**{field.name: getattr(batch, field.name) for field in fields(Batch)}, reference=reference)


def perturb(model: nn.Module) -> None:
    """Change all weights, in the same way for each model with the same names."""
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            draw = torch.Generator().manual_seed(len(name))
            weight += 0.1 * weight.abs().mean() * torch.randn(weight.shape, generator=draw)


def log_prob_sums(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the log-probabilities of the targets that are not -100, for logits (N, S)."""
    kept = targets != -100
    return F.log_softmax(logits[kept], dim=-1).gather(1, targets[kept, None]).sum()


def v2_log_probs(native: nn.Module, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and numbers of targets (9,) of one sample, by transformers' forward."""
    batch = v2_batch(*V2_SHAPES[: number + 1])  # the same random samples
    hidden = native.model(**native_inputs(batch, native.config.audio_token_id), use_cache=False).last_hidden_state
    width = batch.places.shape[1]
    found, counts = [], []
    for head, places, targets in (
        (native.text_lm_head, batch.text_places, batch.text_targets[:, None]),
        (native.audio_lm_head, batch.audio_places, batch.audio_targets),
    ):
        positions = batch.positions[places]
        mine = positions // width == number
        logits = head(hidden.flatten(0, 1)[positions[mine]]).view(int(mine.sum()), targets.shape[1], -1)
        for k in range(targets.shape[1]):
            found.append(log_prob_sums(logits[:, k], targets[mine, k]))
            counts.append((targets[mine, k] != -100).sum())
    return torch.stack(found), torch.stack(counts)


def v3_log_probs(plain: PlainModel, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same by Qwen3Model; there is no target of the text."""
    sample = samples_of(V3_STREAM, V3_SHAPES)[number]
    sums, counts = plain_v3.loss_sums(plain, sample.prompt.input_ids, sample.codes, sample.prompt.audio_columns)
    return torch.cat([torch.zeros(1), -sums]), torch.cat([torch.zeros(1, dtype=torch.long), counts])


def weights_of_targets(weights: LossWeights) -> torch.Tensor:
    """Return the weight of a target of each part, in float64: small changes of large sums must be kept."""
    return torch.tensor(
        [weights.text, *(8 * weights.audio * share for share in weights.codebooks)], dtype=torch.float64
    )


def plain_loss(
    policy: list[torch.Tensor], reference: list[torch.Tensor], counts: list[torch.Tensor], weights: LossWeights, o: dict
) -> torch.Tensor:
    """The loss of two pairs, from log-probabilities (9,) of chosen, rejected, chosen, rejected."""
    of_target = weights_of_targets(weights)
    losses = []
    for pair in (0, 2):
        ratios = []
        for i in (pair, pair + 1):
            log_prob, of_reference = (of_target * policy[i]).sum(), (of_target * reference[i]).sum()
            size = (of_target * counts[i]).sum() if o.get("length_normalization") else 1
            ratios.append(log_prob / size - of_reference / size)
        h = ratios[0] - ratios[1]
        beta, smoothing = o["beta"], o.get("label_smoothing", 0)
        if o.get("dpo_loss") == "ipo":
            losses.append((h - 1 / (2 * beta)) ** 2)
        else:
            likely = torch.sigmoid(beta * h)
            losses.append(-(1 - smoothing) * likely.log() - smoothing * (1 - likely).log())
    loss = (losses[0] + losses[1]) / 2
    if o.get("sft_weight"):
        chosen = sum((of_target * policy[i]).sum() for i in (0, 2))
        loss = loss - o["sft_weight"] * chosen / sum((of_target * counts[i]).sum() for i in (0, 2))
    return loss


def check(
    model: nn.Module, batch: Batch, weights: LossWeights, o: dict, expected: Callable[[], tuple[torch.Tensor, list]]
) -> dict[str, torch.Tensor]:
    """Check the loss, and return the gradients of the model's parameters."""
    plain, reference = expected()
    objective = Preference(weights, ObjectiveOptions(objective="dpo", **o))
    of_target = weights_of_targets(weights)
    pairs = pairs_of(batch, torch.stack([(of_target * values).sum() for values in reference]))
    sizes = objective.sizes(pairs)
    losses, sums, hits = model(**pairs.tensors(CPU), target_weights=objective.target_weights(sizes))
    loss, measures = objective.loss(losses, pairs, sizes)
    loss.backward()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    metrics = objective.metrics(Totals(sums, sizes[:9], hits, measures), "train")
    assert metrics["train/loss"] == pytest.approx(plain.item(), rel=1e-5)
    return {name: parameter.grad for name, parameter in model.higgs.named_parameters()}


def check_v2(base: Path, weights: LossWeights, o: dict) -> None:
    native = load_base(base, torch.float32).requires_grad_().train()
    with torch.no_grad():
        reference = [v2_log_probs(native, i)[0] for i in range(4)]
    perturb(native)
    trained = unfreeze_groups(load_base(base, torch.float32), TRAIN_GROUPS)
    perturb(trained)

    def expected() -> tuple[torch.Tensor, list]:
        policy, counts = zip(*(v2_log_probs(native, i) for i in range(4)), strict=True)
        return plain_loss(policy, reference, counts, weights, o), reference

    gradients = check(DualLossModel(trained).train(), v2_batch(*V2_SHAPES), weights, o, expected)
    largest = max(float(p.grad.abs().max()) for p in native.parameters() if p.grad is not None)
    for name, parameter in native.named_parameters():
        found, plain = gradients[name], parameter.grad
        plain = torch.zeros_like(parameter) if plain is None else plain
        # In float32, a gradient is the difference of two sums of about this size.
        assert (found - plain).abs().max() <= 1e-5 * max(float(plain.abs().max()), 0.1 * largest), name
    assert largest > 0


@pytest.mark.parametrize("weights", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_v2_equals_a_plain_implementation(base: Path, kind: str, weights: LossWeights) -> None:
    check_v2(base, weights, OPTIONS[kind])


@pytest.mark.parametrize("part", range(9))
def test_each_part_alone(base: Path, part: int) -> None:
    """The text, and each codebook with its end of the stream."""
    check_v2(base, only(part), OPTIONS["dpo"])


@pytest.mark.parametrize("weights", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_v3_equals_a_plain_implementation(v3_base: Path, kind: str, weights: LossWeights) -> None:  # noqa: F811
    plain = PlainModel(v3_base)
    with torch.no_grad():
        reference = [v3_log_probs(plain, i)[0] for i in range(4)]
    perturb(plain.trunk)
    plain.trunk.requires_grad_()
    plain.table.requires_grad_()
    trained = load_base(v3_base, torch.float32).requires_grad_()
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            own = name.removeprefix("body.").replace("tied.embedding.text_embedding", "embed_tokens")
            if own in plain.trunk.state_dict():
                weight.copy_(plain.trunk.state_dict()[own])

    def expected() -> tuple[torch.Tensor, list]:
        policy, counts = zip(*(v3_log_probs(plain, i) for i in range(4)), strict=True)
        return plain_loss(policy, reference, counts, weights, OPTIONS[kind]), reference

    batch = collate(samples_of(V3_STREAM, V3_SHAPES), V3_STREAM, pad_id=0)
    gradients = check(AudioLossModel(trained).train(), batch, weights, OPTIONS[kind], expected)
    theirs = {f"body.{name}": p.grad for name, p in plain.trunk.named_parameters() if "embed_tokens" not in name}
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * max(float(gradient.abs().max()), 0.1 * largest), name


def test_an_end_counts(base: Path) -> None:
    """The log-probability of a sample is that of its codes, plus that of the end of each codebook."""
    batch = pairs_of(v2_batch((9, 20, 3), (9, 20, 3)))
    ends = batch.audio_targets == 1025
    assert ends.sum() == 16
    model = DualLossModel(load_base(base, torch.float32)).eval()
    objective, found = Preference(LossWeights.of(0, 1, 8, None), ObjectiveOptions(objective="dpo")), []
    for is_target in (torch.ones_like(ends), ~ends, ends):
        pairs = replace(batch, audio_targets=batch.audio_targets.where(is_target, -100))
        with torch.no_grad():
            losses, *_ = model(**pairs.tensors(CPU), target_weights=objective.target_weights(torch.ones(1)))
        found.append(objective.log_probs(losses, pairs))
    torch.testing.assert_close(found[0], found[1] + found[2], rtol=1e-6, atol=1e-5)
    assert (found[2] < -8).all()
