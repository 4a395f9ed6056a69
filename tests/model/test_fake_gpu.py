"""A forward pass on a fake GPU: nothing waits for the GPU's values, mixes devices, or falls to float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, speech_batch
from torch._subclasses.fake_tensor import DataDependentOutputException

from higgs_ds.bases.conversion import native_folder
from higgs_ds.model.families import family_of
from higgs_ds.model.loading import load_base, load_base_in_4bit
from higgs_ds.model.lora import add_lora
from higgs_ds.model.recomputation import checkpoint_layers
from higgs_ds.model.v2.loss_model import DualLossModel
from higgs_ds.model.v2.routed_layers import LeanMLP
from higgs_ds.options.train import LoraOptions

CPU = torch.device("cpu")
BASES = ("released_flags", "audio_attention", "whisper_tower")
SIZE, LENGTH, NUM_TEXT, NUM_HEARD = 2, 64, 30, 25


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run a forward pass with adapters on a base in the original layout, and return what it did."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    from fake_gpu import GPU, operations

    def run(name: str, precision: str, option: str = "") -> Any:
        folder = native_folder(PROJECT / "tests" / "golden" / name, "--base_ckpt", tmp_path)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        higgs = load_base_in_4bit(folder, dtype, CPU, CPU)[0] if precision == "nf4" else load_base(folder, dtype)
        if option == "offload_embeddings":
            family_of(higgs.config.model_type).offload_embeddings(higgs)
        if option == "offload_checkpoints":
            checkpoint_layers(higgs, 1)
        adapted = add_lora(higgs, LoraOptions(lora_dropout=0.05), "", dtype)
        batch = speech_batch(SIZE, LENGTH, NUM_TEXT, 8, 64)
        if name == "whisper_tower":
            bins = higgs.model.audio_tower.config.num_mel_bins
            places = torch.arange(NUM_HEARD)
            batch = replace(
                batch, features=torch.zeros(1, bins, 4 * NUM_HEARD), feature_lengths=torch.tensor([4 * NUM_HEARD]),
                feature_rows=places, feature_places=places,
            )  # fmt: skip
        model = DualLossModel(adapted, option == "offload_checkpoints").train()
        return operations(model, batch.tensors(CPU), 9, GPU)

    return run


def check(done: Any, precision: str, transfers: list[str]) -> None:
    assert not done.mixed
    assert done.transfers == transfers
    if precision != "fp32":
        assert not done.float32_products


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("name", BASES)
def test_stays_on_the_gpu(forward: Callable[..., Any], name: str, precision: str) -> None:
    check(forward(name, precision), precision, [])


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_only_offloaded_embeddings_leave_the_gpu(forward: Callable[..., Any], precision: str) -> None:
    num_text, num_audio = SIZE * NUM_TEXT, SIZE * (LENGTH - NUM_TEXT)
    there_and_back = [
        f"cuda to cpu: ({num_text},)", f"cpu to cuda: ({num_text}, 64)",
        f"cuda to cpu: ({num_audio}, 8)", f"cpu to cuda: ({num_audio}, 64)",
    ]  # fmt: skip
    check(forward("released_flags", precision, "offload_embeddings"), precision, there_and_back)


@pytest.mark.parametrize("name", ["released_flags", "audio_attention"])
def test_only_offloaded_checkpoints_leave_the_gpu(forward: Callable[..., Any], name: str) -> None:
    check(forward(name, "bf16", "offload_checkpoints"), "bf16", [f"cuda to cpu: ({SIZE * LENGTH}, 64)"] * 2)


def add_item(ffn: Any, x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def add_cpu_tensor(ffn: Any, x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(x.shape[-1], dtype=x.dtype)


def add_cpu_index(ffn: Any, x: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(len(x), device=CPU)]


def add_copy(ffn: Any, x: torch.Tensor) -> torch.Tensor:
    return x + torch.ones(x.shape[-1], dtype=x.dtype).to(x.device)


def add_float32_product(ffn: Any, x: torch.Tensor) -> torch.Tensor:
    return (x.float() @ ffn.up_proj.weight.float().t() @ ffn.down_proj.weight.float().t()).to(x.dtype)


@pytest.mark.parametrize(
    ("planted", "error"),
    [
        (add_item, DataDependentOutputException),
        (add_cpu_tensor, RuntimeError),
        (add_cpu_index, AssertionError),
        (add_copy, AssertionError),
        (add_float32_product, AssertionError),
    ],
)
def test_finds_what_is_planted(
    forward: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, planted: Callable[..., torch.Tensor],
    error: type[Exception],
) -> None:  # fmt: skip
    original = LeanMLP.forward
    monkeypatch.setattr(LeanMLP, "forward", lambda ffn, *inputs: planted(ffn, original(ffn, *inputs)))
    with pytest.raises(error):
        check(forward("released_flags", "bf16"), "bf16", [])


def test_products_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four linear layers of attention and three of each FFN, in six groups with the same input.

    Forward, each has a product with its weight; the first factors of a group's adapters share one; the product with
    each second factor adds to the output. Backward, the gradients of a group's inputs are added up, those of its first
    factors share a product, and so do the inputs of its second factors.
    """
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    import fake_gpu

    calls = fake_gpu.layer_operations("bf16", 0.0)
    assert (calls["forward"]["aten.mm.default"], calls["forward"]["aten.addmm_.default"]) == (10 + 6, 10)
    backward = calls["backward"]
    assert (backward["aten.mm.default"], backward["aten.addmm_.default"]) == (6 + 10 + 6 + 6 + 10, 4 + 6)
    four_bit = fake_gpu.layer_operations("nf4", 0.0)["forward"]
    assert four_bit["bitsandbytes.dequantize_4bit.default"] == 10
    assert all(four_bit[name] == calls["forward"][name] for name in ("aten.mm.default", "aten.addmm_.default"))
