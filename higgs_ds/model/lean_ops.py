"""Operations of a decoder layer that keep only their inputs for the backward pass, with gradients in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.activations import SiLUActivation
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import rotate_half


class Permute(torch.autograd.Function):
    """Reorder rows. The backward pass gathers by the inverse order, where torch would scatter-add into zeros."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].index_select(0, ctx.inverse), None, None


class RMSNorm(torch.autograd.Function):
    """The root mean square norm of x (..., H) in transformers' steps (Zhang and Sennrich 2019, arXiv 1910.07467).

    Returns the normed rows, and the inverse root mean square of each row (..., 1) in float32, for `scaled`.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return scaled(x, weight, scale), scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        gradient = gradients[0]
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * (x * scale)).flatten(0, -2).sum(0).to(weight.dtype)
        # With at most two tensors in float32 at the same time.
        of_normed = _float_copy(gradient).mul_(weight)
        mean = _float_copy(x).mul_(of_normed).mean(-1, keepdim=True)
        of_normed.sub_(_float_copy(x).mul_(mean.mul_(scale.square())))
        return of_normed.mul_(scale).to(x.dtype), weight_gradient, None


def _float_copy(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32, copy=True)


def scaled(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return rows (..., H), scaled by float32 (..., 1) and multiplied by a weight (H), in the weight's dtype."""
    return weight * (x * scale).to(weight.dtype)


class Rotate(torch.autograd.Function):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of x (B, T, heads, D) in transformers' steps.

    Cosines and sines are (B or 1, T, 1, D).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).add_(rotate_half(x).mul_(sin))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,), (cos, sin) = gradients, ctx.saved_tensors
        return (gradient * cos).sub_(rotate_half(gradient * sin)), None, None


class GatedActivation(torch.autograd.Function):
    """activation(gate) * up."""

    @staticmethod
    def forward(
        ctx: Any, activation: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return None, *gate_gradients_(ctx.activation, gate.clone(), up.clone(), gradients[0])


def gate_gradients_(
    activation: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up from that of activation(gate) * up. gate and up are overwritten."""
    up *= gradient  # the gradient of activation(gate)
    if isinstance(activation, SiLUActivation):
        gate_gradient = torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=up)
        return gate_gradient, F.silu(gate, inplace=True).mul_(gradient)
    with torch.enable_grad():
        activation_input = gate.detach().requires_grad_()
        activated = activation(activation_input)
    return torch.autograd.grad(activated, activation_input, up)[0], activated.detach().mul_(gradient)
