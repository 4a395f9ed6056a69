"""Higgs Audio v3 in training, compared with Qwen3Model, F.embedding, F.linear and F.cross_entropy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain_v3
import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_v3 import PlainModel
from torch import nn

from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base
from higgs_ds.common.errors import InputError
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data.collate import Batch, EncodedSample, collate
from higgs_ds.model.full import group_of, unfreeze_groups
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.loading import load_base, load_base_in_4bit
from higgs_ds.model.lora import add_lora, discover_targets
from higgs_ds.model.loss import LossWeights, mean_losses, target_weights
from higgs_ds.model.prompt import Prompt
from higgs_ds.model.recomputation import checkpoint_layers
from higgs_ds.model.v3.loss_model import AudioLossModel
from higgs_ds.model.v3.stream import BareStream
from higgs_ds.options.train import LoraOptions

STREAM = BareStream(8, 1024, 1025)
CPU = torch.device("cpu")
WEIGHTS = LossWeights.of(1.0, 1.0, 8, [4, 2, 1, 0.5, 0.5, 0.5, 0.5, 0.5])
# Text positions, frames of the reference (0 for none), text positions, frames of the target.
SAMPLES = ((3, 0, 4, 11), (5, 6, 7, 4), (2, 9, 3, 20))


@pytest.fixture(scope="module")
def v3_base() -> Path:
    return builtin_base(f"{RANDOM_BASE}-v3", default_cache_dir())


def samples_of(stream: BareStream, shapes: Sequence[tuple[int, int, int, int]] = SAMPLES) -> list[EncodedSample]:
    draw = torch.Generator().manual_seed(1)
    samples = []
    for before, reference, between, frames in shapes:
        codes = [torch.randint(1024, (8, count), generator=draw) for count in (reference, frames) if count]
        ids = torch.randint(256, (before,), generator=draw).tolist()
        columns: list[int] = []
        for clip, text in zip(codes, [between, 0] if reference else [0], strict=True):
            rows = stream.num_rows(clip.shape[1])
            columns += range(len(ids), len(ids) + rows)
            ids += [0] * rows + torch.randint(256, (text,), generator=draw).tolist()
        is_target = [False] * (len(codes) - 1) + [True]
        samples.append(EncodedSample(Prompt(ids, [IGNORE_INDEX] * len(ids), columns, is_target), codes))
    return samples


def batch_of(stream: BareStream = STREAM) -> Batch:
    return collate(samples_of(stream), stream, pad_id=0)


def expected_sums(plain: PlainModel, stream: BareStream) -> tuple[torch.Tensor, torch.Tensor]:
    found = [
        plain_v3.loss_sums(plain, s.prompt.input_ids, s.codes, s.prompt.audio_columns, stream.train_fill)
        for s in samples_of(stream)
    ]
    return sum(sums for sums, _ in found), sum(counts for _, counts in found)  # type: ignore[return-value]


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients(v3_base: Path, fill: bool, recompute: bool) -> None:
    """The loss, and the gradients of every weight of the trunk, and of the table by both of its uses."""
    stream = replace(STREAM, train_fill=fill)
    model = load_base(v3_base, torch.float32).requires_grad_()
    if recompute:
        checkpoint_layers(model, 1)
    batch, dual = batch_of(stream), AudioLossModel(model).train()
    counts = batch.target_counts()
    weights = target_weights(counts, WEIGHTS)
    num_rows = list[int]()
    for layer in (model.body.layers[0], model.body.layers[-1]):
        layer.mlp.register_forward_hook(lambda _, inputs, outputs: num_rows.append(len(outputs)))
    losses, sums, hits = dual(**batch.tensors(CPU), target_weights=weights)
    assert num_rows == [len(batch.positions), len(batch.audio_places)]  # the last one feeds only what predicts
    loss = losses.sum()
    loss.backward()

    plain = PlainModel(v3_base)
    plain.trunk.requires_grad_()
    plain.table.requires_grad_()
    plain_sums, plain_counts = expected_sums(plain, stream)
    assert counts.tolist() == [0, *plain_counts.tolist()]
    assert (sums[1:] - plain_sums).abs().max() < 1e-5 * plain_sums.max()
    expected = (plain_sums * weights[1:]).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    losses = mean_losses(sums, counts, WEIGHTS)
    assert losses.total == pytest.approx(expected.item(), rel=1e-5)
    assert hits[-1] == len(SAMPLES) * (8 if fill else 1) or fill
    expected.backward()
    theirs = {f"body.{name}": p.grad for name, p in plain.trunk.named_parameters() if "embed_tokens" not in name}
    theirs["tied.embedding.text_embedding.weight"] = plain.trunk.embed_tokens.weight.grad
    theirs["tied.embedding.modality_embeddings.0.embedding.weight"] = plain.table.grad.flatten(0, 1)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_adapters_equal_peft(v3_base: Path) -> None:
    """On all linear layers of the decoder, without dropout: outputs and the adapters' gradients are plain PEFT's."""
    batch = batch_of()
    model = add_lora(load_base(v3_base, torch.float32), LoraOptions(lora_dropout=0.0), "", torch.float32)
    plain = PlainModel(v3_base)
    targets = sorted({name.rpartition(".")[2] for name, m in plain.trunk.named_modules() if isinstance(m, nn.Linear)})
    adapted = get_peft_model(plain.trunk, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    draw = torch.Generator().manual_seed(3)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = {
        name.replace("model.layers", "model.body.layers"): p
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }
    assert own.keys() == theirs.keys()
    with torch.no_grad():
        for name in sorted(own):
            own[name].copy_(torch.randn(own[name].shape, generator=draw) * 0.05)
            theirs[name].copy_(own[name])
    weights = target_weights(batch.target_counts(), WEIGHTS)
    losses, sums, _ = AudioLossModel(model).train()(**batch.tensors(CPU), target_weights=weights)
    losses.sum().backward()
    plain.trunk = adapted.base_model.model
    plain_sums, _ = expected_sums(plain, STREAM)
    assert (sums[1:] - plain_sums).abs().max() < 1e-5 * plain_sums.max()
    (plain_sums * weights[1:]).sum().backward()
    for name, parameter in theirs.items():
        assert (own[name].grad - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), name


@pytest.mark.parametrize("kind", ["bf16", "fp16", "4bit"])
def test_other_precisions(v3_base: Path, kind: str) -> None:
    """Losses are those in float32 up to rounding, with gradients for every adapter."""
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    if kind == "4bit":
        base: Any = load_base_in_4bit(v3_base, torch.float32, CPU, CPU)[0]
    else:
        base = load_base(v3_base, dtype)
    model = add_lora(base, LoraOptions(), "", torch.float32 if kind == "4bit" else dtype)
    batch = batch_of()
    weights = target_weights(batch.target_counts(), WEIGHTS)
    losses, _, _ = AudioLossModel(model).train()(**batch.tensors(CPU), target_weights=weights)
    exact = AudioLossModel(load_base(v3_base, torch.float32)).eval()
    with torch.no_grad():
        expected = exact(**batch.tensors(CPU), target_weights=weights)[0].sum()
    loss = losses.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=0.1 if kind == "4bit" else 0.02)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_an_empty_batch_runs_every_module(v3_base: Path) -> None:
    """As on a rank without samples: a loss of 0 that has a gradient."""
    model = AudioLossModel(add_lora(load_base(v3_base, torch.float32), LoraOptions(), "", torch.float32)).train()
    empty = collate([], STREAM, pad_id=0)
    losses, sums, hits = model(**empty.tensors(CPU), target_weights=torch.ones(9))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert not sums.any()
    assert not hits.any()


def test_groups_of_weights(v3_base: Path) -> None:
    model = load_base(v3_base, torch.float32)
    assert discover_targets(model, ["attention"]) == [f"self_attn.{p}_proj" for p in "koqv"]
    ffn = [f"mlp.{p}_proj" for p in ("down", "gate", "up")]
    # There is one FFN for both kinds of positions.
    assert discover_targets(model, ["text_mlp"]) == discover_targets(model, ["audio_mlp"]) == ffn
    found = {group_of(name) for name, _ in model.named_parameters()}
    assert found == {"attention", "text_mlp", "embeddings", "heads"}
    trained = unfreeze_groups(model, ["heads"])
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == {
        "tied.embedding.modality_embeddings.0.embedding.weight",
        "body.norm.weight",
    }
    with pytest.raises(InputError, match="no such linear layers"):
        discover_targets(nn.Linear(2, 2), ["attention"])
