"""What decoder layers of all families do in training: norms, attention, FFNs and heads that keep almost nothing.

Each class here is combined with the class of transformers whose weights and names it keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import eager_attention_forward

from higgs_ds.model.fused_lora import Recipe, fused_ffn, fused_linears
from higgs_ds.model.head_loss import Chunks, head_loss
from higgs_ds.model.lean_ops import RMSNorm, Rotate, scaled


class NormForward(nn.Module):
    """A norm that keeps only its input for the backward pass; transformers' norm also keeps float32 copies."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: torch.Tensor, with_recipe: bool = False) -> Any:
        """Return the normed rows; `with_recipe`, also how to compute them again."""
        normed, scale = RMSNorm.apply(x, self.weight, self.variance_epsilon)
        if not with_recipe:
            return normed
        # A copy of the weight, because ZeRO-3 takes its values away after this call.
        return normed, Recipe(scaled, (x.detach(), self.weight.detach().clone(), scale))


class AttentionForward(nn.Module):
    """transformers' attention, without a cache and with fused projections."""

    def forward(
        self, x: torch.Tensor, recipe: Recipe | None, rotations: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Return the outputs (B, T, H) of the attention over x (B, T, H).

        Args:
            recipe: how to compute `x` again.
            rotations: cosines and sines (B or 1, T, D).
        """
        own: Any = self  # an attention of transformers, too
        projected = fused_linears([own.q_proj, own.k_proj, own.v_proj], x, recipe)
        query, key, value = (heads.unflatten(-1, (-1, own.head_dim)) for heads in projected)
        query, key = self.normed(query, key)
        cos, sin = (rotation.unsqueeze(2) for rotation in rotations)
        query, key = Rotate.apply(query, cos, sin), Rotate.apply(key, cos, sin)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(own.config._attn_implementation, eager_attention_forward)
        dropout = own.attention_dropout if self.training else 0.0
        by_head = (heads.transpose(1, 2) for heads in (query, key, value))
        attended, _ = attend(self, *by_head, None, dropout=dropout, scaling=own.scaling)
        return fused_linears([own.o_proj], attended.flatten(2).contiguous())[0]

    def normed(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys (B, T, heads, D) as they are rotated."""
        return query, key


class FFNForward(nn.Module):
    """A fused FFN, for x (..., H)."""

    def forward(self, x: torch.Tensor, recipe: Recipe | None = None) -> torch.Tensor:
        own: Any = self  # an FFN of transformers, too
        return fused_ffn((own.gate_proj, own.up_proj, own.down_proj), own.act_fn, x, recipe)


class LossHead(nn.Linear):
    """A head that returns its loss. A loaded head is converted by changing its class.

    The loss is computed here because ZeRO-3 gathers a head's weight only around calls of its module.
    """

    chunks: Chunks | None = None  # those for the device

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `head_loss` of hidden states (K, H) and targets (K, P)."""
        return head_loss(hidden, self.weight, targets, target_weights, self.chunks)
