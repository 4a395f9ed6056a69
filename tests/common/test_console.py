"""What libraries may print in a run."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist

from higgs_ds.common.console import quiet_libraries


def test_new_names_of_collectives_are_not_announced(lone_rank: None) -> None:
    """By torch 2.14; earlier versions warn of nothing here anyway."""
    part, whole = torch.ones(2), torch.empty(2)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_libraries()
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(whole, part)
    assert not shown
    assert torch.equal(whole, part)
