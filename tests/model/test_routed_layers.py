"""Compare routed layers and chunked heads with transformers' own layers and torch's cross entropy."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import native_inputs, speech_batch
from peft import PeftModel
from torch.profiler import ProfilerActivity, profile
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_ds.data.collate import Batch, EncodedSample, collate
from higgs_ds.model import head_loss
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.lean_ops import RMSNorm
from higgs_ds.model.loading import load_base
from higgs_ds.model.lora import add_lora
from higgs_ds.model.prompt import Prompt
from higgs_ds.model.v2.loss_model import DualLossModel
from higgs_ds.model.v2.stream import FramedStream
from higgs_ds.options.train import LoraOptions

STREAM = FramedStream(num_codebooks=8, bos_id=1024, eos_id=1025)
CPU = torch.device("cpu")
DECODED = ("text_ids", "codes", "positions", "places", "audio_rows", "audio_at")


def adapted(base: Path, dtype: torch.dtype, recompute: bool, dropout: float = 0.1, at_start: bool = False) -> PeftModel:
    """Return a model with adapters; `at_start`, they do not change its outputs."""
    higgs = load_base(base, dtype)
    if recompute:
        higgs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    model = add_lora(higgs, LoraOptions(lora_dropout=dropout), "base", dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not at_start:
                parameter.normal_(std=0.05)
    return model.train()


def batch_of(*lengths: tuple[int, int, int]) -> Batch:
    """Batch of samples, each given by its text positions, frames of audio and following text positions."""
    draw = torch.Generator().manual_seed(2)
    samples = []
    for before, frames, after in lengths:
        rows = STREAM.num_rows(frames) if frames else 0
        ids = torch.randint(256, (before + rows + after,), generator=draw).tolist()
        labels = [IGNORE_INDEX, *ids[1:before], *[IGNORE_INDEX] * rows, *ids[before + rows :]]
        clips = [torch.randint(1024, (8, frames), generator=draw)] if frames else []
        prompt = Prompt(ids, labels, list(range(before, before + rows)), [True] * len(clips))
        samples.append(EncodedSample(prompt, clips))
    return collate(samples, STREAM, pad_id=0)


BATCHES = {
    "speech and text": ((9, 20, 3), (30, 0, 0), (5, 11, 2)),
    "speech": ((6, 30, 2),),
    "text": ((12, 0, 0), (7, 0, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BATCHES)
def test_layers_are_bit_identical(base: Path, kind: str, dtype: torch.dtype) -> None:
    """Hidden states in training, with dropout, where adapters start: their products add zeros."""
    batch = batch_of(*BATCHES[kind])
    expected, found = hidden_states(base, batch, dtype, False, at_start=True)
    assert found.equal(expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BATCHES)
def test_layers_equal_peft(base: Path, kind: str, dtype: torch.dtype, recompute: bool) -> None:
    """Hidden states of adapters without dropout, and the adapters' gradients."""
    batch = batch_of(*BATCHES[kind])
    models: list[torch.nn.Module] = []
    expected, found = hidden_states(base, batch, dtype, recompute, dropout=0.0, models=models)
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    (expected * direction).sum().backward()
    (found * direction).sum().backward()
    native, adapted_model = models
    gradients = {name: p.grad for name, p in adapted_model.named_parameters() if p.requires_grad}
    for name, parameter in native.named_parameters():
        if parameter.requires_grad:
            assert (gradients[name] - parameter.grad).abs().max() <= tolerance * parameter.grad.abs().max(), name


def hidden_states(
    base: Path, batch: Batch, dtype: torch.dtype, recompute: bool, models: list[torch.nn.Module] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return those of transformers' model with PEFT, and of this project's; `models` gets the adapted models."""
    native = adapted(base, dtype, recompute, **options)
    routed = DualLossModel(adapted(base, dtype, recompute, **options))
    higgs, tensors = native.get_base_model(), batch.tensors(CPU)
    inputs = native_inputs(batch, higgs.config.audio_token_id)
    expected = higgs.model(**inputs, use_cache=False).last_hidden_state
    found = routed.higgs.model.norm(routed.decode(*(tensors[name] for name in DECODED)))[batch.places]
    if models is not None:
        models += [native, routed.adapted]
    return expected, found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_last_layer_feeds_only_what_predicts(base: Path, kind: str, recompute: bool) -> None:
    """The rest of the last layer's FFNs is left out; hidden states and gradients are those of the whole layer."""
    batch = batch_of(*BATCHES[kind])
    tensors = batch.tensors(CPU)
    sources = torch.cat([batch.text_places, batch.audio_places])
    assert sources.equal(
        torch.cat([batch.predicting_text, batch.predicting_audio + len(batch.text_ids)])[batch.predictions]
    )
    assert len(sources) == len(batch.predictions) < len(batch.positions)
    direction = torch.randn(len(sources), 1, generator=torch.Generator().manual_seed(4))
    states, gradients, num_rows = [], [], list[int]()
    for predicting in (None, (batch.predicting_text, batch.predicting_audio)):
        model = DualLossModel(adapted(base, torch.float32, recompute, dropout=0.0))
        layers = model.higgs.model.layers
        for ffn in (layers[0].mlp, layers[0].audio_mlp, layers[-1].mlp, layers[-1].audio_mlp) if predicting else ():
            ffn.register_forward_hook(lambda _, inputs, outputs, seen=num_rows: seen.append(len(outputs)))
        hidden = model.decode(*(tensors[name] for name in DECODED), predicting)
        states.append(hidden[sources if predicting is None else batch.predictions])
        forward_rows = num_rows[:4]
        (states[-1] * direction).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert forward_rows == [
        len(batch.text_ids),
        len(batch.codes),
        len(batch.predicting_text),
        len(batch.predicting_audio),
    ]
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_norm(dtype: torch.dtype) -> None:
    """Equal those of the formula in float64, for rows of very different sizes."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 64, generator=draw) * torch.tensor([1e-4, 1e-2, 1, 1e2, 1e4])[:, None]).to(dtype)
    weight, upstream = (torch.randn(size, generator=draw).to(dtype) for size in ((64,), (5, 64)))
    found = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    expected = [tensor.double().requires_grad_() for tensor in (x, weight)]
    RMSNorm.apply(*found, 1e-6)[0].backward(upstream)
    rows, scale = expected
    normed = rows * (rows.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    (normed * scale).backward(upstream.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        largest = theirs.grad.abs().amax(-1, keepdim=True)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert ((ours.grad.double() - theirs.grad).abs() <= tolerance * largest).all()


def test_a_norm_that_is_trained_gets_its_gradient(base: Path) -> None:
    model = DualLossModel(adapted(base, torch.float32, recompute=False))
    norms = {name: p for name, p in model.higgs.named_parameters() if "norm" in name}
    for parameter in norms.values():
        parameter.requires_grad_()
    model(**batch_of(*BATCHES["speech"]).tensors(CPU), target_weights=torch.ones(9))[0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in norms.values())


def test_offloaded_checkpoints(base: Path) -> None:
    """With copies in host memory, the inputs of recomputed layers are freed. The results do not change."""
    batch = batch_of(*BATCHES["speech and text"])
    losses, gradients, held = [], [], []
    for offload in (False, True):
        model = DualLossModel(adapted(base, torch.float32, recompute=True), offload)
        inputs: list[weakref.ref[torch.Tensor]] = []
        for layer in model.higgs.model.layers:
            layer.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(weakref.ref(args[0])))
        torch.manual_seed(3)
        loss_of_rows, *_ = model(**batch.tensors(CPU), target_weights=torch.ones(9))
        held.append([hidden() is not None for hidden in inputs])
        loss_of_rows.sum().backward()
        losses.append(loss_of_rows)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert held == [[True, True], [False, False]]
    assert losses[0].equal(losses[1])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("classes_at_once", [2**13, 40, 7, 1])
@pytest.mark.parametrize("at_once", [2**20, 11 * 40 * 3, 8 * 40, 40 * 3, 1])
@pytest.mark.parametrize("num_parts", [8, 1])
def test_head_loss(num_parts: int, at_once: int, classes_at_once: int) -> None:
    """Equals torch's cross entropy and its gradients, in one chunk, in chunks of a few or one part, row or class.

    The losses of the rows weigh differently in the gradients, as those of several samples do in DPO.
    """
    chunks = head_loss.Chunks(at_once, classes_at_once, at_once // 8)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 16, generator=draw, requires_grad=True)
    head = (2 * torch.randn(num_parts * 40, 16, generator=draw)).requires_grad_()
    targets = torch.randint(40, (11, num_parts), generator=draw)
    targets[:5] = (hidden[:5] @ head.T).detach().view(5, num_parts, 40).argmax(dim=2)
    targets[torch.rand(11, num_parts, generator=draw) < 0.3] = IGNORE_INDEX
    weights = torch.rand(num_parts, generator=draw)
    weighted, sums, hits = head_loss.head_loss(hidden, head, targets, weights, chunks)
    of_rows = torch.randn(11, generator=draw)
    gradients = torch.autograd.grad(of_rows @ weighted, (hidden, head))
    frozen, *_ = head_loss.head_loss(hidden, head.detach(), targets, weights, chunks)
    logits = (hidden @ head.T).view(11, num_parts, 40)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(11, num_parts)
    expected_gradients = torch.autograd.grad(of_rows @ (expected * weights).sum(1), (hidden, head))
    assert hits.equal(logits.argmax(dim=2) == targets)
    assert hits.any()
    torch.testing.assert_close(sums, expected.detach().sum(0), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(weighted, (expected * weights).sum(1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradients[0], expected_gradients[0], rtol=1e-5, atol=1e-5)
    # The rounding of a logit of about 30 changes a probability by about 4e-6.
    torch.testing.assert_close(gradients[1], expected_gradients[1], rtol=1e-5, atol=5e-5)
    assert torch.autograd.grad(of_rows @ frozen, hidden)[0].equal(gradients[0])
    with torch.no_grad():
        assert head_loss.head_loss(hidden, head, targets, weights, chunks)[1].equal(sums)


def test_head_loss_of_no_rows() -> None:
    hidden = torch.zeros(0, 16, requires_grad=True)
    weighted, sums, _ = head_loss.head_loss(
        hidden, torch.randn(24, 16), torch.zeros(0, 3, dtype=torch.long), torch.ones(3)
    )
    weighted.sum().backward()
    assert (weighted.shape, sums.tolist(), hidden.grad.shape) == ((0,), [0.0] * 3, (0, 16))


def count_synchronizations(num_layers: int) -> int:
    """Count the GPU synchronizations of a forward and backward pass: values read, and sizes that depend on values."""
    config = HiggsAudioV2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=num_layers, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, vocab_size=300, codebook_size=66, pad_token_id=0, audio_token_id=270,
        audio_delay_token_id=268,
    )  # fmt: skip
    higgs = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).requires_grad_(False)
    model = DualLossModel(add_lora(higgs, LoraOptions(), "", torch.float32)).train()
    batch = speech_batch(2, 40, 10, 8, 64).tensors(CPU)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        model(**batch, target_weights=torch.ones(9))[0].sum().backward()
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["aten::index_select"] > num_layers  # the profiler has recorded the layers
    return sum(
        counts.get(f"aten::{name}", 0)
        for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
    )


def test_no_layer_synchronizes() -> None:
    assert count_synchronizations(2) == count_synchronizations(7) <= 10
