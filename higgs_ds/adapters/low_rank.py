"""Weighted sums of low-rank products B A, and their truncated SVD, without forming a product."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from higgs_ds.adapters.files import Factors


@dataclass(frozen=True)
class Loss:
    """What a truncation lost: squared Frobenius norms of the part cut off, and of the whole product."""

    cut_off: float
    whole: float

    @property
    def relative(self) -> float:
        """The Frobenius norm of the error divided by that of the whole; 0 if there is nothing to lose."""
        return math.sqrt(self.cut_off / self.whole) if self.whole else 0.0


def total(losses: Iterable[Loss]) -> Loss:
    """Return the loss of several products together."""
    losses = list(losses)
    return Loss(sum(loss.cut_off for loss in losses), sum(loss.whole for loss in losses))


def weighted_sum(terms: Sequence[tuple[float, Factors]]) -> Factors:
    """Return factors of the sum of weight x B A over `terms`, in float64: each B, times its weight, beside the next."""
    a = torch.cat([factors.a.double() for _, factors in terms])
    return Factors(a, torch.cat([weight * factors.b.double() for weight, factors in terms], dim=1))


def truncate(factors: Factors, rank: int) -> tuple[Factors, Loss]:
    """Return the closest product of `rank` or less (Eckart and Young 1936), in float64, and what it lost.

    With B = Q R and A' = P S, the singular values of B A are those of the small R S'. Factors whose rank is small
    enough are returned unchanged.
    """
    q, r = torch.linalg.qr(factors.b.double())
    p, s = torch.linalg.qr(factors.a.double().T)
    u, values, vh = torch.linalg.svd(r @ s.T)
    squares = values.square()
    if len(factors.a) <= rank:
        return factors, Loss(0.0, float(squares.sum()))
    root = values[:rank].sqrt()
    cut = Factors(root[:, None] * (vh[:rank] @ p.T), q @ u[:, :rank] * root)
    return cut, Loss(float(squares[rank:].sum()), float(squares.sum()))
