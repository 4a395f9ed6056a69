"""Linear layers with LoRA that share an input, and whole FFNs, as operations that keep almost nothing.

For every target, PEFT's layer keeps a dropped copy of its input and a mask. Here the backward pass draws the dropped
elements again, from the recorded state of the random generator. The input itself is computed again where that is cheap,
from a tensor that is kept anyway. PEFT's modules stay the owners of all weights.

The formula is that of LoRA (Hu et al. 2021, arXiv 2106.09685), y = W x + s B A d(x), with its own dropout d for each
target. Gradients: of A, s (g B)^T d(x); of B, s g^T (d(x) A^T); of x, g W + d'(s g B A), where d' drops the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from higgs_ds.model.gathering import with_gathered
from higgs_ds.model.lean_ops import GatedActivation, gate_gradients


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor again in the backward pass. The inputs get no gradient from this.

    Only `inputs` may be tensors of the pass: autograd keeps them as other tensors that it saves, and frees them.
    """

    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]


def fused_linears(
    layers: Sequence[nn.Module], x: torch.Tensor, recipe: Recipe | None = None
) -> tuple[torch.Tensor, ...]:
    """Apply linear layers, with or without LoRA, to one input.

    Layers that need more than frozen weights and plain LoRA (trained weights, DoRA, adapters' biases) are applied one
    by one.

    Args:
        layers: frozen linear layers, or PEFT's layers around them.
        x: (..., in).
        recipe: computes `x` again; without it, x is kept if there are adapters.
    """
    if not all(_is_plain(layer) for layer in layers):
        return tuple(layer(x) for layer in layers)
    group = _Group([_Target(layer) for layer in layers])

    def apply(x: torch.Tensor) -> Any:
        return _FusedLinears.apply(group, recipe or _keep(x), x, *_adapters(group.adapted))

    return with_gathered(_modules(group.targets), apply, x)


def fused_ffn(
    layers: tuple[nn.Module, nn.Module, nn.Module],
    activation: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    recipe: Recipe | None = None,
) -> torch.Tensor:
    """Apply a gated FFN, down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202).

    Of its intermediate results, only those of `gate` and `up` are kept.

    Args:
        layers: gate, up and down, and otherwise as for `fused_linears`.
        recipe: its function returns rows (N, in).
    """
    if not all(_is_plain(layer) for layer in layers):
        return layers[2](GatedActivation.apply(activation, *fused_linears(layers[:2], x, recipe)))
    targets = [_Target(layer) for layer in layers]
    groups = _Group(targets[:2]), _Group(targets[2:])

    def apply(rows: torch.Tensor) -> Any:
        return _FusedFFN.apply(*groups, activation, recipe or _keep(rows), rows, *_adapters(targets))

    return with_gathered(_modules(targets), apply, x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _keep(x: torch.Tensor) -> Recipe:
    return Recipe(_itself, (x.detach(),))


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer computes W x + b with a frozen W and b, or the same with one adapter."""
    base = layer
    if isinstance(layer, LoraLayer):
        base, names = layer.get_base_layer(), layer.active_adapters
        if layer.merged or layer.disable_adapters or layer.lora_variant or len(names) != 1:
            return False
        if layer.lora_bias[names[0]]:
            return False
    return isinstance(base, nn.Linear) and not any(p.requires_grad for p in base.parameters(recurse=False))


class _Target:
    """A frozen linear layer and its adapter.

    Weights are read from their modules in both passes, because ZeRO-3 gathers them anew for each.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.base: Any = layer
        self.adapter: tuple[nn.Parameter, ...] = ()  # A (r, in), B (out, r)
        self.modules: list[Any] = [layer]
        self.scaling = self.dropout = 0.0
        if isinstance(layer, LoraLayer):
            self.base, (name,) = layer.get_base_layer(), layer.active_adapters
            self.modules = [self.base, layer.lora_A[name], layer.lora_B[name]]
            self.adapter = layer.lora_A[name].weight, layer.lora_B[name].weight
            dropout = layer.lora_dropout[name]
            if isinstance(dropout, nn.Dropout) and dropout.training:
                self.dropout = dropout.p
            self.scaling = layer.scaling[name] / (1 - self.dropout)  # instead of scaling the elements that are kept

    def weight(self) -> torch.Tensor:
        """Return the base's weight (out, in). A 4-bit weight is dequantized."""
        return self.base.dequantized() if hasattr(self.base, "dequantized") else self.base.weight

    def base_outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the base's outputs (N, out) for inputs (N, in)."""
        bias = self.base.bias
        return rows @ self.weight().t() if bias is None else torch.addmm(bias.to(rows.dtype), rows, self.weight().t())


class _Group:
    """Targets with the same input (N, in)."""

    def __init__(self, targets: Sequence[_Target]) -> None:
        self.targets = targets
        self.adapted = [target for target in targets if target.adapter]
        self.has_dropout = any(target.dropout for target in self.adapted)
        self.generator_state: torch.Tensor | None = None

    def outputs(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs (N, out) of each target."""
        if self.has_dropout:
            self.generator_state = generator_state(rows.device)
        outputs = [target.base_outputs(rows) for target in self.targets]
        of_adapted = (output for output, target in zip(outputs, self.targets, strict=True) if target.adapter)
        for output, target, inner in zip(of_adapted, self.adapted, self._inner(rows), strict=True):
            output.addmm_(inner, target.adapter[1].t(), alpha=target.scaling)
        return outputs

    def _inner(self, rows: torch.Tensor) -> Iterable[torch.Tensor]:
        """Return d(x) A^T (N, r) of each adapter; without dropout, all from one product."""
        if self.has_dropout:
            return (_drop_(_copy(rows), _drawn(rows, t.dropout)) @ t.adapter[0].t() for t in self.adapted)
        return (rows @ self._stacked().t()).split(self._ranks(), dim=1) if self.adapted else ()

    def _ranks(self) -> list[int]:
        return [len(target.adapter[0]) for target in self.adapted]

    def _stacked(self) -> torch.Tensor:
        return _cat([target.adapter[0] for target in self.adapted], dim=0)

    def gradients(
        self,
        gradients: Sequence[torch.Tensor],
        compute_rows: Callable[[], torch.Tensor],
        is_kept: bool,
        needs_rows: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return the gradient of the inputs, if it is needed, and those of A and B of each adapter.

        Args:
            gradients: of the outputs of each target.
            compute_rows: returns the inputs, which are needed if there are adapters.
            is_kept: whether the inputs must not be overwritten.
            needs_rows: whether the gradient of the inputs is needed.
        """
        rows_gradient = None
        for target, gradient in zip(self.targets, gradients if needs_rows else (), strict=needs_rows):
            if rows_gradient is None:
                rows_gradient = gradient @ target.weight()
            else:
                rows_gradient.addmm_(gradient, target.weight())
        of_adapted = [gradient for gradient, target in zip(gradients, self.targets, strict=True) if target.adapter]
        if not self.adapted:
            return rows_gradient, []
        rows = compute_rows()
        if self.has_dropout:
            return rows_gradient, self._add_with_dropout(of_adapted, rows, is_kept, rows_gradient)
        return rows_gradient, self._add_without_dropout(of_adapted, rows, rows_gradient)

    def _add_without_dropout(
        self, gradients: list[torch.Tensor], rows: torch.Tensor, rows_gradient: torch.Tensor | None
    ) -> list[torch.Tensor]:
        stacked, ranks = self._stacked(), self._ranks()
        inner_gradients = _cat([*map(_inner_gradient, self.adapted, gradients)], dim=1)
        a_gradients = (inner_gradients.t() @ rows).split(ranks)
        inners = (rows @ stacked.t()).split(ranks, dim=1)
        if rows_gradient is not None:
            rows_gradient.addmm_(inner_gradients, stacked)
        b_gradients = map(_b_gradient, self.adapted, gradients, inners)
        return [gradient for pair in zip(a_gradients, b_gradients, strict=True) for gradient in pair]

    def _add_with_dropout(
        self, gradients: list[torch.Tensor], rows: torch.Tensor, is_kept: bool, rows_gradient: torch.Tensor | None
    ) -> list[torch.Tensor]:
        adapter_gradients = []
        with _generator_at(self.generator_state, rows.device):
            drawn = [_drawn(rows, target.dropout) for target in self.adapted]
        for target, gradient in zip(self.adapted, gradients, strict=True):
            at = drawn.pop(0)
            dropped = _drop_(_copy(rows) if drawn or is_kept else rows, at)
            inner_gradient = _inner_gradient(target, gradient)
            adapter_gradients += [
                inner_gradient.t() @ dropped,
                _b_gradient(target, gradient, dropped @ target.adapter[0].t()),
            ]
            if rows_gradient is not None:
                rows_gradient += _drop_(torch.mm(inner_gradient, target.adapter[0], out=dropped), at)
        return adapter_gradients


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _inner_gradient(target: _Target, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient of d(x) A^T, (N, r)."""
    return (gradient @ target.adapter[1]).mul_(target.scaling)


def _b_gradient(target: _Target, gradient: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Return the gradient of B, (out, r). A product with fewer rows than columns is faster."""
    return (inner.t() @ gradient).mul_(target.scaling).t()


def _modules(targets: Iterable[_Target]) -> list[Any]:
    return [module for target in targets for module in target.modules]


def _adapters(targets: Iterable[_Target]) -> list[nn.Parameter]:
    return [weight for target in targets for weight in target.adapter]


class _FusedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: _Group, recipe: Recipe, x: torch.Tensor, *adapters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.function = group, recipe.function
        ctx.save_for_backward(*(recipe.inputs if adapters else ()))
        return tuple(outputs.unflatten(0, x.shape[:-1]) for outputs in group.outputs(x.flatten(0, -2)))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept = ctx.saved_tensors
        flat_gradients = [gradient.flatten(0, -2) for gradient in gradients]
        x_gradient, adapter_gradients = ctx.group.gradients(
            flat_gradients, lambda: ctx.function(*kept).flatten(0, -2), ctx.function is _itself, ctx.needs_input_grad[2]
        )
        if x_gradient is not None:
            x_gradient = x_gradient.unflatten(0, gradients[0].shape[:-1])
        return None, None, x_gradient, *adapter_gradients


class _FusedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inner: _Group,
        outer: _Group,
        activation: Callable[[torch.Tensor], torch.Tensor],
        recipe: Recipe,
        x: torch.Tensor,
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        gate, up = inner.outputs(x)
        ctx.inner, ctx.outer, ctx.activation, ctx.function = inner, outer, activation, recipe.function
        ctx.save_for_backward(gate, up, *(recipe.inputs if inner.adapted else ()))
        return outer.outputs(activation(gate).mul_(up))[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, *recipe_inputs = ctx.saved_tensors
        activated = ctx.activation(gate)
        compute_gated = partial(torch.mul, activated, up)
        gated_gradient, down_gradients = ctx.outer.gradients(gradients, compute_gated, is_kept=False, needs_rows=True)
        inner_gradients = gate_gradients(ctx.activation, gate, up, activated, gated_gradient)
        del gate, up, activated, compute_gated, gated_gradient  # of a recomputed layer, nothing else holds them
        x_gradient, adapter_gradients = ctx.inner.gradients(
            inner_gradients, lambda: ctx.function(*recipe_inputs), ctx.function is _itself, ctx.needs_input_grad[4]
        )
        return None, None, None, None, x_gradient, *adapter_gradients, *down_gradients


def _drawn(rows: torch.Tensor, share: float) -> torch.Tensor:
    """Draw the flat indices of elements to drop.

    They are drawn with replacement, as many as miss an element with a probability of 1 - share. That is several times
    faster than a random number for every element.
    """
    numel = rows.numel()
    draws = round(math.log1p(-share) / math.log1p(-1 / numel)) if numel > 1 else numel
    return torch.randint(max(numel, 1), (draws,), device=rows.device)


def _copy(rows: torch.Tensor) -> torch.Tensor:
    return rows.clone(memory_format=torch.contiguous_format)


def _drop_(rows: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    rows.view(-1).index_fill_(0, drawn, 0)
    return rows


def generator_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def _generator_at(state: torch.Tensor | None, device: torch.device) -> Iterator[None]:
    """Within the block, the device's random generator continues from `state`."""
    assert state is not None
    present = generator_state(device)
    set_generator_state(state, device)
    try:
        yield
    finally:
        set_generator_state(present, device)
