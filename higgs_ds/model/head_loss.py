"""The cross-entropy of a head and its gradient, computed in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from higgs_ds.model.labels import IGNORE_INDEX


@dataclass(frozen=True)
class Chunks:
    """How much is computed at once.

    logits: number of logits in memory at the same time.
    classes: number of rows of a text head's weight.
    half: number of logits above which a part's rows are processed in at least two halves.
    """

    logits: int
    classes: int
    half: int


# Of rows that weights of fp16 are scaled to; their product with a head has to stay below 65,504.
FP16_ROW_SUM = 2.0**12
CPU_CHUNKS = Chunks(2**20, 2**11, 2**18)  # at most 4 MiB each, at a width of 512, as caches hold little more
GPU_CHUNKS = Chunks(2**23, 2**17, 2**23)  # 32 MiB of logits: smaller products would take less time than their launch


def head_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    chunks: Chunks | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the cross entropy of a head in chunks, so that the logits of all rows are never in memory together.

    The gradient of `hidden` is computed chunk by chunk in the forward pass, from the same logits (as in Liger Kernel,
    Hsu et al. 2024, arXiv 2410.10989). For a frozen head, nothing else is kept for the backward pass. A head with one
    part, the text head, is also processed in chunks of classes, so that its weight is read once and memory does not
    grow with the vocabulary. The gradient of a trained head is computed in the backward pass, from recomputed logits.

    Args:
        hidden: (K, H).
        head: (P x S, H), for P parts of S classes each.
        targets: (K, P), -100 where there is no target.
        target_weights: float32 (P,), weight of one target of each part.
        chunks: by default, those for the device.

    Returns:
        The weighted loss of each row, float32 (K,); the detached sums of each part, float32 (P,); and whether each
        target had the highest logit of its part, bool (K, P).
    """
    if chunks is None:
        chunks = CPU_CHUNKS if hidden.device.type == "cpu" else GPU_CHUNKS
    return _HeadLoss.apply(hidden, head, targets, target_weights, chunks)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        target_weights: torch.Tensor,
        chunks: Chunks,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_rows, num_parts = targets.shape
        num_classes = len(head) // num_parts
        losses, sums = (torch.zeros(size, device=hidden.device) for size in (num_rows, num_parts))
        hits = torch.zeros_like(targets, dtype=torch.bool)
        log_totals = torch.zeros(targets.shape, device=hidden.device)
        gradient = torch.zeros(hidden.shape, device=hidden.device)
        # Parts in turn, because a processor reorders a weight once for all rows that it is multiplied with.
        at_once = chunks.logits
        if num_parts > 1:
            at_once = min(at_once, max(chunks.half, (num_rows + 1) // 2 * num_classes))
        rows_at_once = max(1, at_once // min(num_classes, chunks.classes))
        parts_at_once = max(1, at_once // (num_classes * max(1, min(num_rows, rows_at_once))))
        for part in range(0, num_parts, parts_at_once):
            parts = slice(part, part + parts_at_once)
            part_head = head[part * num_classes : (part + parts_at_once) * num_classes]
            for start in range(0, num_rows, rows_at_once):
                rows = slice(start, start + rows_at_once)
                of_chunk = hidden[rows], part_head, targets[rows, parts], target_weights[parts]
                if num_parts == 1:
                    chunk = _online_softmax_loss(*of_chunk, ctx.needs_input_grad[:2], chunks.classes)
                else:
                    chunk = _full_softmax_loss(*of_chunk, ctx.needs_input_grad[:2])
                losses[rows] += chunk.losses
                sums[parts] += chunk.sums
                hits[rows, parts] = chunk.hits
                if chunk.gradient is not None:
                    gradient[rows] += chunk.gradient
                if chunk.log_totals is not None:
                    log_totals[rows, parts] = chunk.log_totals
                del chunk  # before the next one
        if hidden.dtype != torch.float16:  # which cannot hold it before it is multiplied by the loss scale
            gradient = gradient.to(hidden.dtype)
        ctx.dtype, ctx.chunks = hidden.dtype, chunks
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(gradient, hidden, head, targets, target_weights, log_totals)
        else:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums, hits)
        return losses, sums, hits

    @staticmethod
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        gradient, *for_head = ctx.saved_tensors
        of_rows, chunks = gradients[0], ctx.chunks
        hidden_gradient = _scaled_rows(gradient, of_rows, ctx.dtype, chunks) if ctx.needs_input_grad[0] else None
        if not for_head:
            return hidden_gradient, None, None, None, None
        hidden, head, targets, target_weights, log_totals = for_head
        weights = target_weights * of_rows[:, None] * (targets != IGNORE_INDEX)
        head_gradient = _head_gradient(hidden, head, targets, weights, log_totals, chunks)
        return hidden_gradient, head_gradient, None, None, None


def _scaled_rows(rows: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype, chunks: Chunks) -> torch.Tensor:
    """Return rows (K, H) times factors, float32 (K,), in chunks: products are in float32 before they are cast."""
    scaled = torch.empty_like(rows, dtype=dtype)
    step = max(1, chunks.logits // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        scaled[some] = rows[some] * factors[some, None]
    return scaled


def _head_gradient(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    log_totals: torch.Tensor,
    chunks: Chunks,
) -> torch.Tensor:
    """Return the gradient of a head (P x S, H), in chunks of rows and classes, summed in float32.

    Args:
        weights: float32 (K, P), weight of each target.
        log_totals: (K, P), logarithms of the sums of exp(logit).
    """
    gradient = torch.empty_like(head)
    num_classes = len(head) // targets.shape[1]
    for part, part_targets in enumerate(targets.unbind(1)):
        for first in range(0, num_classes, chunks.classes):
            class_slice = slice(
                part * num_classes + first, part * num_classes + min(first + chunks.classes, num_classes)
            )
            head_chunk = head[class_slice]
            class_sums = torch.zeros(head_chunk.shape, device=head.device)
            step = max(1, chunks.logits // len(head_chunk))
            for start in range(0, len(hidden), step):
                row_slice = slice(start, start + step)
                rows, local_targets = hidden[row_slice], part_targets[row_slice] - first
                # The gradient of a cross entropy by its logits: the probabilities, minus 1 at the target.
                logit_gradient = (F.linear(rows, head_chunk).float() - log_totals[row_slice, part, None]).exp_()
                in_chunk = (local_targets >= 0) & (local_targets < len(head_chunk))
                logit_gradient.scatter_add_(
                    1, local_targets.clamp(0, len(head_chunk) - 1)[:, None], -in_chunk[:, None].float()
                )
                logit_gradient *= weights[row_slice, part, None]
                class_sums += (logit_gradient.to(head.dtype).t() @ rows).float()
            gradient[class_slice] = class_sums
    return gradient


@dataclass(frozen=True)
class _ChunkLoss:
    """Results for a chunk of n rows: weighted losses (n,), loss sums (P,) and hits (n, P).

    If needed, also the weighted gradient of the rows (n, H) and the logarithms of the sums of exp(logit), (n, P).
    """

    losses: torch.Tensor
    sums: torch.Tensor
    hits: torch.Tensor
    gradient: torch.Tensor | None = None
    log_totals: torch.Tensor | None = None


def _full_softmax_loss(
    rows: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    needs_grad: tuple[bool, bool],
) -> _ChunkLoss:
    """Compute the loss of a chunk of rows over all classes at once.

    Args:
        needs_grad: whether the gradients of the rows and of the head are needed.
    """
    logits = F.linear(rows, head).float().view(len(rows), len(target_weights), -1)
    is_target, at = targets != IGNORE_INDEX, targets.clamp(min=0)[..., None]
    highest = logits.amax(dim=2, keepdim=True)
    at_target = logits.gather(2, at)
    hits = (at_target >= highest)[..., 0] & is_target
    exps = logits.sub_(highest).exp_()
    total = exps.sum(dim=2, keepdim=True)
    log_totals = (total.log() + highest)[..., 0]
    losses = (log_totals - at_target[..., 0]) * is_target
    of_rows, sums = (losses * target_weights).sum(dim=1), losses.sum(dim=0)
    if not needs_grad[0]:
        return _ChunkLoss(of_rows, sums, hits, None, log_totals)
    # The gradient of a cross entropy by its logits: the probabilities, minus 1 at the target.
    weights = (target_weights * is_target)[..., None]
    logit_gradient = exps.mul_(weights / total).scatter_add_(2, at, -weights).flatten(1)
    scaled, scale = _in_dtype(logit_gradient, head.dtype)
    del logits, exps, logit_gradient  # before the product, which may need a copy of the head
    return _ChunkLoss(of_rows, sums, hits, _product(scaled, scale, head), log_totals)


def _online_softmax_loss(
    rows: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    needs_grad: tuple[bool, bool],
    classes_at_once: int,
) -> _ChunkLoss:
    """Compute the same for a head with one part, in chunks of classes, with an online softmax.

    The running sum is rescaled whenever a larger logit appears (Milakov and Gimelshein 2018, arXiv 1805.02867). So is
    the mean of the head's rows weighted by their probabilities, which is the gradient of the logarithm.
    """
    targets, shape = targets[:, 0], (len(rows), 1)
    highest = torch.full(shape, -torch.inf, device=rows.device)
    total = torch.zeros(shape, device=rows.device)
    at_target = torch.zeros(shape, device=rows.device)
    mean_row = torch.zeros(rows.shape, device=rows.device)
    for first in range(0, len(head), classes_at_once):
        head_chunk = head[first : first + classes_at_once]
        # In this order, because a processor would first reorder the second factor.
        logits = (head_chunk @ rows.t()).t().float()
        new_highest = torch.maximum(highest, logits.amax(dim=1, keepdim=True))
        local_targets = (targets - first).clamp(0, len(head_chunk) - 1)[:, None]
        in_chunk = (targets >= first) & (targets < first + len(head_chunk))
        at_target += logits.gather(1, local_targets) * in_chunk[:, None]
        exps, rescale = logits.sub_(new_highest).exp_(), (highest - new_highest).exp()
        total = total * rescale + exps.sum(dim=1, keepdim=True)
        if needs_grad[0]:
            mean_row = mean_row * rescale + _weighted_sums(exps, head_chunk).float()
        highest = new_highest
    is_target = (targets != IGNORE_INDEX)[:, None]
    log_totals = total.log() + highest
    losses = (log_totals - at_target) * is_target
    of_rows, sums = (losses * target_weights).sum(dim=1), losses.sum(dim=0)
    hits = (at_target >= highest) & is_target
    if not needs_grad[0]:
        return _ChunkLoss(of_rows, sums, hits, None, log_totals)
    gradient = (mean_row / total - head[targets.clamp(min=0)].float()) * (target_weights * is_target)
    dtype = torch.float32 if rows.dtype == torch.float16 else rows.dtype
    return _ChunkLoss(of_rows, sums, hits, gradient.to(dtype), log_totals)


def _weighted_sums(weights: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return the product of float32 weights (n, S) and a head (S, H), computed in the head's dtype."""
    return _product(*_in_dtype(weights, head.dtype), head)


def _in_dtype(weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return float32 weights (n, S) in a head's dtype; for fp16, each row scaled into its range, and the scales."""
    if dtype != torch.float16:
        return weights.to(dtype), None
    scale = FP16_ROW_SUM / weights.abs().sum(dim=1, keepdim=True).clamp(min=1e-30)
    return (weights * scale).to(dtype), scale


def _product(weights: torch.Tensor, scale: torch.Tensor | None, head: torch.Tensor) -> torch.Tensor:
    """Return the product of weights, as of `_in_dtype`, and a head (S, H); for fp16, in float32 and without scales."""
    product = weights @ head
    return product if scale is None else product.float() / scale
