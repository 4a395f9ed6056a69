"""The cross-entropy of a head in chunks, with its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from higgs_ds.model.loss import IGNORE_INDEX

LOGITS_AT_ONCE = 2**20  # numbers that are in memory together, 4 MiB in float32
CLASSES_AT_ONCE = 2**13  # of a text head: rows of its weight that a processor's cache may hold


def head_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of a head's logits, in chunks: logits of all rows never are in memory together.

    The gradient of `hidden` is made chunk by chunk in the forward pass, while the logits are there (as in Liger Kernel,
    Hsu et al. 2024, arXiv 2410.10989); of a frozen head, nothing else is kept for the backward pass. A head of one
    part, the text's, also goes class by class, so that its weight is read once and the vocabulary's size costs no
    memory. The gradient of a head that is trained is made in the backward pass, from its logits once more.

    Args:
        hidden: (K, H); head: (P x S, H), for P parts of S classes each.
        targets: (K, P), -100 for none; target_weights: float32 (P,), what one target of each part weighs.

    Returns the weighted loss, a float32 scalar; the detached sums of each part, float32 (P,); and which targets (K, P)
    had the highest logit of their part, bool.
    """
    return _HeadLoss.apply(hidden, head, targets, target_weights)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_parts = targets.shape[1]
        sums = torch.zeros(num_parts, device=hidden.device)
        hits = torch.zeros_like(targets, dtype=torch.bool)
        log_totals = torch.zeros(targets.shape, device=hidden.device)
        gradient = torch.empty_like(hidden)
        of_chunk, classes = (_class_by_class, CLASSES_AT_ONCE) if num_parts == 1 else (_all_classes, len(head))
        step = max(1, LOGITS_AT_ONCE // min(len(head), classes))
        for start in range(0, len(hidden), step):
            rows, wanted = hidden[start : start + step], targets[start : start + step]
            chunk = of_chunk(rows, head, wanted, target_weights, ctx.needs_input_grad[:2])
            sums += chunk.sums
            hits[start : start + step] = chunk.hits
            if chunk.gradient is not None:
                gradient[start : start + step] = chunk.gradient
            if chunk.log_totals is not None:
                log_totals[start : start + step] = chunk.log_totals
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(gradient, hidden, head, targets, target_weights, log_totals)
        else:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums, hits)
        return (sums * target_weights).sum(), sums, hits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        gradient, *of_head = ctx.saved_tensors
        hidden_gradient = gradient * gradients[0] if ctx.needs_input_grad[0] else None
        if not of_head:
            return hidden_gradient, None, None, None
        hidden, head, targets, target_weights, log_totals = of_head
        weights = target_weights * gradients[0] * (targets != IGNORE_INDEX)
        return hidden_gradient, _head_gradient(hidden, head, targets, weights, log_totals), None, None


def _head_gradient(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, log_totals: torch.Tensor
) -> torch.Tensor:
    """The gradient of a head (P x S, H), some rows and classes at a time, each class summed up in float32.

    Args:
        weights: float32 (K, P), what each target weighs; log_totals: (K, P), logarithms of the sums of exp(logit).
    """
    gradient = torch.empty_like(head)
    num_classes = len(head) // targets.shape[1]
    for part, targets_of_part in enumerate(targets.unbind(1)):
        for first in range(0, num_classes, CLASSES_AT_ONCE):
            here = slice(part * num_classes + first, part * num_classes + min(first + CLASSES_AT_ONCE, num_classes))
            some = head[here]
            summed = torch.zeros(some.shape, device=head.device)
            step = max(1, LOGITS_AT_ONCE // len(some))
            for start in range(0, len(hidden), step):
                now = slice(start, start + step)
                rows, among = hidden[now], targets_of_part[now] - first
                # Of a cross entropy by its logits: the probabilities, less 1 at the target.
                slope = (F.linear(rows, some).float() - log_totals[now, part, None]).exp_()
                is_among = (among >= 0) & (among < len(some))
                slope.scatter_add_(1, among.clamp(0, len(some) - 1)[:, None], -is_among[:, None].float())
                slope *= weights[now, part, None]
                summed += (slope.to(head.dtype).t() @ rows).float()
            gradient[here] = summed
    return gradient


@dataclass(frozen=True)
class _Chunk:
    """Of some rows (n, H): sums (P,) and hits (n, P); as far as they are asked for, the rows' weighted gradient (n, H)
    and the logarithms of the sums of exp(logit), (n, P).
    """

    sums: torch.Tensor
    hits: torch.Tensor
    gradient: torch.Tensor | None = None
    log_totals: torch.Tensor | None = None


def _all_classes(
    rows: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    learning: tuple[bool, bool],
) -> _Chunk:
    """All classes at once. `learning`: whether gradients of the rows and of the head are asked for."""
    logits = F.linear(rows, head).float().view(len(rows), len(target_weights), -1)
    sums = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(dim=0)
    there = targets != IGNORE_INDEX
    hits = (logits.gather(2, targets.clamp(min=0)[..., None])[..., 0] >= logits.amax(dim=2)) & there
    log_totals = logits.logsumexp(dim=2) if learning[1] else None
    if not learning[0]:
        return _Chunk(sums, hits, None, log_totals)
    # Of a cross entropy by its logits: the probabilities, less 1 at the target.
    slope = logits.softmax(dim=-1)
    slope.scatter_add_(2, targets.clamp(min=0)[..., None], -torch.ones_like(slope[..., :1]))
    slope *= (target_weights * there)[..., None]
    return _Chunk(sums, hits, slope.flatten(1).to(head.dtype) @ head, log_totals)


def _class_by_class(
    rows: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor,
    learning: tuple[bool, bool],
) -> _Chunk:
    """The same for a head of one part, some classes at a time, with a softmax that is made up as they come.

    What was summed is scaled down whenever a larger logit appears (Milakov and Gimelshein 2018, arXiv 1805.02867), and
    so is the mean of the head's rows by their probabilities, which is the logarithm's gradient.
    """
    targets, shape = targets[:, 0], (len(rows), 1)
    highest = torch.full(shape, -torch.inf, device=rows.device)
    total = torch.zeros(shape, device=rows.device)
    at_target = torch.zeros(shape, device=rows.device)
    mean_row = torch.zeros(rows.shape, device=rows.device)
    for first in range(0, len(head), CLASSES_AT_ONCE):
        some = head[first : first + CLASSES_AT_ONCE]
        logits = F.linear(rows, some).float()
        higher = torch.maximum(highest, logits.amax(dim=1, keepdim=True))
        among = (targets - first).clamp(0, len(some) - 1)[:, None]
        is_among = (targets >= first) & (targets < first + len(some))
        at_target += logits.gather(1, among) * is_among[:, None]
        raised, shrunk = (logits - higher).exp_(), (highest - higher).exp()
        total = total * shrunk + raised.sum(dim=1, keepdim=True)
        if learning[0]:
            mean_row = mean_row * shrunk + (raised.to(head.dtype) @ some).float()
        highest = higher
    there = (targets != IGNORE_INDEX)[:, None]
    log_totals = total.log() + highest
    losses = (log_totals - at_target) * there
    hits = (at_target >= highest) & there
    if not learning[0]:
        return _Chunk(losses.sum(dim=0), hits, None, log_totals)
    gradient = (mean_row / total - head[targets.clamp(min=0)].float()) * (target_weights * there)
    return _Chunk(losses.sum(dim=0), hits, gradient.to(rows.dtype), log_totals)
