"""Fused LoRA compared with PEFT's own layers, with and without dropout; what the masks are, and what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import kept_bytes
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from higgs_ds.model import fused_lora
from higgs_ds.model.fused_lora import Recipe, fused_ffn, fused_linears
from higgs_ds.model.nf4 import fill, quantize, replace_linears
from higgs_ds.model.recomputation import contexts

WIDTH, INNER, ROWS = 48, 72, 41
SILU = ACT2FN["silu"]


class Block(nn.Module):
    """Projections that share an input, and an FFN, under the names of a decoder layer."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        widths = {"q_proj": WIDTH, "k_proj": 16, "v_proj": 16, "gate_proj": INNER, "up_proj": INNER}
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, width in widths.items():
            owner = self.mlp if width == INNER else self.self_attn
            owner.add_module(name, nn.Linear(WIDTH, width, bias=bias))
        self.mlp.add_module("down_proj", nn.Linear(INNER, WIDTH, bias=bias))


def block(bias: bool = False, dtype: torch.dtype = torch.float32, four_bit: bool = False, **options: Any) -> nn.Module:
    """Return a block with adapters, without zeros in their second factors."""
    torch.manual_seed(0)
    base = Block(bias).to(dtype).requires_grad_(False)
    if four_bit:
        model = nn.Module()
        model.model = nn.Module()
        model.model.layers = nn.ModuleList([base])
        weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        replace_linears(model, dtype)
        for name, weight in weights.items():
            fill(model.get_submodule(name), quantize(weight, dtype))
        base.is_loaded_in_4bit = True
    config: dict[str, Any] = {"r": 8, "lora_alpha": 12, "target_modules": r".*_proj"}
    adapted = get_peft_model(base, LoraConfig(**config | options), autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return adapted.train()


def outputs(
    model: nn.Module, x: torch.Tensor, fused: bool, recipe: Recipe | None = None, activation: Any = SILU
) -> tuple[torch.Tensor, ...]:
    attention, ffn = model.base_model.model.self_attn, model.base_model.model.mlp
    shared = attention.q_proj, attention.k_proj, attention.v_proj
    inner = ffn.gate_proj, ffn.up_proj, ffn.down_proj
    if fused:
        return *fused_linears(shared, x, recipe), fused_ffn(inner, activation, x, recipe)
    return *(layer(x) for layer in shared), ffn.down_proj(activation(ffn.gate_proj(x)) * ffn.up_proj(x))


def results(model: nn.Module, x: torch.Tensor, fused: bool, activation: Any = SILU) -> dict[str, torch.Tensor]:
    """Return outputs and gradients by name, with random gradients of the outputs."""
    x = x.detach().requires_grad_()
    found = outputs(model, x, fused, activation=activation)
    draw = torch.Generator().manual_seed(2)
    loss = sum((output.float() * torch.randn(output.shape, generator=draw)).sum() for output in found)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    return {f"output {i}": output.detach() for i, output in enumerate(found)} | {"x": x.grad} | gradients


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"k_proj": 3, "up_proj": 5}, "alpha_pattern": {"q_proj": 40, "down_proj": 2}},
    "biases of the base": {"bias": True},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "k": {"target_modules": ["k_proj"]},
    "up": {"target_modules": ["up_proj"]},
    "gate and down": {"target_modules": ["gate_proj", "down_proj"]},
    "down": {"target_modules": ["down_proj"]},
    "4 bits": {"four_bit": True},
}
LIKE_PEFT: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "biases of the adapters": {"lora_bias": True, "bias": True},
}


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (1, WIDTH), (0, WIDTH)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_peft(setting: str, shape: tuple[int, ...]) -> None:
    model = block(**SETTINGS[setting])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if not len(x):
        assert [output.shape for output in outputs(model, x, True)] == [o.shape for o in outputs(model, x, False)]
        return
    check_close(results(copy.deepcopy(model), x, True), results(model, x, False), 1e-6)


@pytest.mark.parametrize("name", ["gelu", "tanh"])
def test_other_activations(name: str) -> None:
    model, x = block(), torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = results(copy.deepcopy(model), x, False, ACT2FN[name])
    check_close(results(model, x, True, ACT2FN[name]), expected, 1e-6)


def test_sequences_equal_peft() -> None:
    """Inputs (B, T, H), for the layers that take them."""
    model = block()
    layers = [getattr(model.base_model.model.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    x = torch.randn(3, 7, WIDTH)
    for fused, layer in zip(fused_linears(layers, x), layers, strict=True):
        torch.testing.assert_close(fused, layer(x), rtol=1e-6, atol=1e-6)
    *_, ffn = outputs(model, x, True)
    torch.testing.assert_close(ffn, outputs(model, x, False)[-1], rtol=1e-5, atol=1e-5)


def bf16_results(**options: Any) -> tuple[nn.Module, torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Return a model in bf16, an input, and the results: fused, and of PEFT."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    model = block(dtype=torch.bfloat16, **options)
    return model, x, [results(copy.deepcopy(model), x, fused) for fused in (True, False)]


def test_4_bits_in_bf16_equal_peft() -> None:
    _, _, (fused, plain) = bf16_results(four_bit=True)
    check_close(fused, plain, 0.03)


def test_bf16_is_closer_to_float32_than_peft() -> None:
    """PEFT rounds the adapter's output three times before it is added."""
    model, x, both = bf16_results()
    expected = results(model.float(), x.float(), False)
    errors = [
        sum(((found[name] - tensor).norm() / tensor.norm()).item() for name, tensor in expected.items())
        for found in both
    ]
    assert errors[0] < errors[1]


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Tensor]]:
    """Record the shape of the inputs and the drawn indices of every call, in order."""
    recorded: list[tuple[torch.Size, torch.Tensor]] = []
    original = fused_lora.draw_dropped

    def record(rows: torch.Tensor, share: float) -> torch.Tensor:
        drawn = original(rows, share)
        recorded.append((rows.shape, drawn))
        return drawn

    monkeypatch.setattr(fused_lora, "draw_dropped", record)
    return recorded


def masks_of(draws: list[tuple[torch.Size, torch.Tensor]]) -> list[torch.Tensor]:
    """Return 1 for elements that are kept and 0 for those that are dropped."""
    return [torch.ones(shape).flatten().index_fill(0, drawn, 0).view(shape) for shape, drawn in draws]


class Masked(nn.Module):
    """PEFT's dropout with a mask that is given."""

    def __init__(self, mask: torch.Tensor, share: float) -> None:
        super().__init__()
        self.mask, self.share = mask, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask / (1 - self.share)


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("setting", ["all", "q and v", "gate and down"])
def test_equals_peft_with_the_same_masks(setting: str, share: float, draws: list[Any]) -> None:
    """The backward pass draws the masks of the forward pass again."""
    model = block(**SETTINGS[setting], lora_dropout=share)
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(model)
    found = results(model, x, True)
    targets = [module for name, module in plain.named_modules() if name.endswith("_proj") and "lora" not in name]
    adapted = [module for module in targets if hasattr(module, "lora_dropout")]
    assert len(draws) == 2 * len(adapted)
    for module, mask in zip(adapted, masks_of(draws[: len(adapted)]), strict=True):
        module.lora_dropout["default"] = Masked(mask, share)
    check_close(found, results(plain, x, False), 1e-6)


def test_masks(draws: list[Any]) -> None:
    """Each has the right share of zeros; those of targets, calls and seeds (of ranks) are independent."""
    share, x = 0.1, torch.randn(4000, WIDTH)
    model = block(lora_dropout=share)
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            outputs(model, x, True)
            outputs(model, x, True)
    masks = [1 - mask for mask in masks_of(draws) if mask.shape == x.shape]
    assert len(masks) == 4 * 5
    for i, mask in enumerate(masks):
        assert abs(mask.mean().item() - share) < 5 * (share * (1 - share) / mask.numel()) ** 0.5
        for other in masks[:i]:
            both = share**2
            assert abs((mask * other).mean().item() - both) < 5 * (both * (1 - both) / mask.numel()) ** 0.5
        rows, columns = mask.mean(1), mask.mean(0)  # no row and no column is preferred
        assert rows.var().item() == pytest.approx(share * (1 - share) / WIDTH, rel=0.15)
        assert columns.var().item() < 3 * share * (1 - share) / len(mask)


def test_eval_drops_nothing(draws: list[Any]) -> None:
    model, x = block(lora_dropout=0.3).eval(), torch.randn(ROWS, WIDTH)
    for fused, plain in zip(outputs(model, x, True), outputs(model, x, False), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
    assert not draws


def test_the_generator_goes_on() -> None:
    """The backward pass leaves the generator where the forward pass left it."""
    model, x = block(lora_dropout=0.3), torch.randn(ROWS, WIDTH)
    found = outputs(model, x, True)
    state = torch.get_rng_state()
    sum(output.sum() for output in found).backward()
    assert torch.get_rng_state().equal(state)


def test_recomputation_draws_the_same() -> None:
    x = torch.randn(ROWS, WIDTH)
    gradients = []
    for recompute in (False, True):
        model = block(lora_dropout=0.3)
        torch.manual_seed(5)

        def run(x: torch.Tensor, model: nn.Module = model) -> tuple[torch.Tensor, ...]:
            return outputs(model, x, True)

        found = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        sum(output.square().sum() for output in found).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_recomputed_layers_leave_out_the_last_product(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not needed for the gradients, but its random numbers are drawn: those of a second FFN follow them."""
    products = []
    base_outputs = fused_lora._Target.base_outputs
    monkeypatch.setattr(
        fused_lora._Target, "base_outputs", lambda of, rows: products.append(of.base) or base_outputs(of, rows)
    )
    gradients, counts = [], []
    for options in ({}, {"context_fn": contexts}):
        model, x = block(lora_dropout=share), torch.randn(ROWS, WIDTH, requires_grad=True)
        ffn = model.base_model.model.mlp
        layers = ffn.gate_proj, ffn.up_proj, ffn.down_proj

        def run(x: torch.Tensor, layers: Any = layers) -> torch.Tensor:
            return x + torch.cat([fused_ffn(layers, SILU, x[:10]), fused_ffn(layers, SILU, x[10:])])

        products.clear()
        checkpoint(run, x, use_reentrant=False, **options).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in ffn.parameters() if p.requires_grad)])
        counts.append([products.count(getattr(layer, "base_layer", layer)) for layer in layers])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))
    assert counts == [[4, 4, 4], [4, 4, 2]]


def test_a_second_backward_pass_is_an_error() -> None:
    """The first one has overwritten what the graph keeps."""
    found = sum(output.sum() for output in outputs(block(), torch.randn(ROWS, WIDTH), True))
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_only_gate_and_up_are_kept(share: float) -> None:
    """An input that can be computed again is not kept, and neither are masks."""
    model, source = block(lora_dropout=share), torch.randn(ROWS, WIDTH, requires_grad=True)
    parameters = [source, *model.parameters()]
    recipe = Recipe(lambda kept: kept * 2, (source.detach(),))
    doubled = source * 2
    assert kept_bytes(lambda: outputs(model, doubled, True, recipe), parameters) == 2 * 4 * ROWS * INNER
    assert kept_bytes(lambda: outputs(model, doubled, True), parameters) == 4 * ROWS * (2 * INNER + WIDTH)


@pytest.mark.parametrize("setting", LIKE_PEFT)
def test_other_adapters_are_left_to_peft(setting: str) -> None:
    model = block(**LIKE_PEFT[setting], lora_dropout=0.3)
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    found = []
    for fused in (True, False):
        torch.manual_seed(3)
        found.append(results(copy.deepcopy(model), x, fused))
    check_close(found[0], found[1], 1e-6)


@pytest.mark.parametrize("trained", ["self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_trained_weights_get_gradients(trained: str) -> None:
    model = block(target_modules=["q_proj"])
    weight = model.base_model.model.get_submodule(trained).weight.requires_grad_()
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = results(copy.deepcopy(model), x, False)
    check_close(results(model, x, True), expected, 1e-6)
    assert weight.grad is not None


def test_disabled_adapters_change_nothing() -> None:
    model, x = block(), torch.randn(ROWS, WIDTH)
    with model.disable_adapter():
        for fused, plain in zip(outputs(model, x, True), outputs(model, x, False), strict=True):
            assert fused.equal(plain)
