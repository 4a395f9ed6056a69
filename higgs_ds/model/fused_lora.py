"""Linear layers with LoRA that share an input, and whole FFNs, as operations that keep almost nothing.

For every target, PEFT's layer keeps a dropped copy of its input and a mask. Here the backward pass draws the dropped
elements again, from the recorded state of the random generator. The input itself is computed again where that is cheap,
from a tensor that is kept anyway. PEFT's modules stay the owners of all weights.

The formula is that of LoRA (Hu et al. 2021, arXiv 2106.09685), y = W x + s B A d(x), with its own dropout d for each
target. Gradients: of A, s (g B)^T d(x); of B, s g^T (d(x) A^T); of x, g W + d'(s g B A), where d' drops the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from higgs_ds.model.dropout import draw_dropped, drop_, generator_at, generator_state
from higgs_ds.model.gathering import with_gathered
from higgs_ds.model.lean_ops import GatedActivation, gate_gradients_
from higgs_ds.model.recomputation import is_recomputing


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

    def outputs(self, rows: torch.Tensor, is_kept: bool = True) -> list[torch.Tensor]:
        """Return the outputs (N, out) of each target.

        Args:
            is_kept: whether the inputs must not be overwritten.
        """
        if self.has_dropout:
            self.generator_state = generator_state(rows.device)
        outputs = [target.base_outputs(rows) for target in self.targets]
        of_adapted = (output for output, target in zip(outputs, self.targets, strict=True) if target.adapter)
        for output, target, inner in zip(of_adapted, self.adapted, self._inner(rows, is_kept), strict=True):
            output.addmm_(inner, target.adapter[1].t(), alpha=target.scaling)
        return outputs

    def skip(self, rows_like: torch.Tensor, outputs_like: torch.Tensor) -> torch.Tensor:
        """Leave the random generator as `outputs` does, and return zeros in place of the outputs of one target.

        Args:
            rows_like: of the shape of the inputs.
            outputs_like: of that of the outputs.
        """
        if self.has_dropout:
            self.generator_state = generator_state(rows_like.device)
            for target in self.adapted:
                draw_dropped(rows_like, target.dropout)
        return outputs_like.new_zeros(()).expand_as(outputs_like)

    def _inner(self, rows: torch.Tensor, is_kept: bool) -> Iterable[torch.Tensor]:
        """Return d(x) A^T (N, r) of each adapter; without dropout, all from one product."""
        if self.has_dropout:
            return (
                self._dropped(rows, draw_dropped(rows, target.dropout), target, is_kept) @ target.adapter[0].t()
                for target in self.adapted
            )
        return (rows @ self._stacked().t()).split(self._ranks(), dim=1) if self.adapted else ()

    def _dropped(self, rows: torch.Tensor, drawn: torch.Tensor, target: _Target, is_kept: bool) -> torch.Tensor:
        """Return d(x) (N, in) of an adapter; that of the last one overwrites inputs that are not kept."""
        overwrites = target is self.adapted[-1] and not is_kept
        return drop_(rows if overwrites else rows.clone(memory_format=torch.contiguous_format), drawn)

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
        of_adapted = [gradient for gradient, target in zip(gradients, self.targets, strict=True) if target.adapter]
        adapter_gradients, add_adapters = self._adapter_gradients(of_adapted, compute_rows, is_kept)
        if not needs_rows:
            return None, adapter_gradients
        rows_gradient = gradients[0] @ self.targets[0].weight()
        for target, gradient in zip(self.targets[1:], gradients[1:], strict=True):
            rows_gradient.addmm_(gradient, target.weight())
        add_adapters(rows_gradient)
        return rows_gradient, adapter_gradients

    def _adapter_gradients(
        self, gradients: list[torch.Tensor], compute_rows: Callable[[], torch.Tensor], is_kept: bool
    ) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], object]]:
        """Return the gradients of A and B of each adapter, and what adds those of the inputs to a tensor (N, in)."""
        if not self.adapted:
            return [], lambda _: None
        if self.has_dropout:
            return self._with_dropout(gradients, compute_rows(), is_kept)
        return self._without_dropout(gradients, compute_rows())

    def _without_dropout(
        self, gradients: list[torch.Tensor], rows: torch.Tensor
    ) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], object]]:
        stacked, ranks = self._stacked(), self._ranks()
        inner_gradients = _cat([*map(_inner_gradient, self.adapted, gradients)], dim=1)
        a_gradients = (inner_gradients.t() @ rows).split(ranks)
        inners = (rows @ stacked.t()).split(ranks, dim=1)
        b_gradients = map(_b_gradient, self.adapted, gradients, inners)
        adapter_gradients = [gradient for pair in zip(a_gradients, b_gradients, strict=True) for gradient in pair]
        return adapter_gradients, lambda rows_gradient: rows_gradient.addmm_(inner_gradients, stacked)

    def _with_dropout(
        self, gradients: list[torch.Tensor], rows: torch.Tensor, is_kept: bool
    ) -> tuple[list[torch.Tensor], Callable[[torch.Tensor], object]]:
        assert self.generator_state is not None
        with generator_at(self.generator_state, rows.device):
            drawn = [draw_dropped(rows, target.dropout) for target in self.adapted]
        adapter_gradients, inner_gradients = [], []
        for target, gradient, at in zip(self.adapted, gradients, drawn, strict=True):
            dropped = self._dropped(rows, at, target, is_kept)
            inner_gradients.append(_inner_gradient(target, gradient))
            adapter_gradients += [
                inner_gradients[-1].t() @ dropped,
                _b_gradient(target, gradient, dropped @ target.adapter[0].t()),
            ]
            del dropped  # before the next copy

        def add_to(rows_gradient: torch.Tensor) -> None:
            flat = rows_gradient.view(-1)
            # The product is added to all elements, in one pass, and those that were dropped are put back.
            for target, inner_gradient, at in zip(self.adapted, inner_gradients, drawn, strict=True):
                of_dropped = flat.index_select(0, at)
                rows_gradient.addmm_(inner_gradient, target.adapter[0])
                flat.index_copy_(0, at, of_dropped)

        return adapter_gradients, add_to


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
        if is_recomputing():
            return outer.skip(gate, x)
        return outer.outputs(activation(gate).mul_(up), is_kept=False)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, *recipe_inputs = ctx.saved_tensors
        gated_gradient, down_gradients = ctx.outer.gradients(
            gradients, lambda: ctx.activation(gate).mul_(up), is_kept=False, needs_rows=True
        )
        # A second backward pass through this graph is an error of autograd, which knows that they were overwritten.
        inner_gradients = gate_gradients_(ctx.activation, gate, up, gated_gradient)
        del gated_gradient
        x_gradient, adapter_gradients = ctx.inner.gradients(
            inner_gradients, lambda: ctx.function(*recipe_inputs), ctx.function is _itself, ctx.needs_input_grad[4]
        )
        return None, None, None, None, x_gradient, *adapter_gradients, *down_gradients
