"""The log-probabilities of a run's pairs under its reference model: the model as the run starts, before its first step.

They are computed once, and kept with the run. A second model is never in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from higgs_ds.common import distributed
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import replaced_file, saving
from higgs_ds.common.run_files import REFERENCE_FILE
from higgs_ds.data.pairs import PairBatch, PairDataset
from higgs_ds.data.sampler import share_of_rank
from higgs_ds.training.engine import Engine
from higgs_ds.training.objectives import Preference

TRAIN, VAL = "train", "val"


def with_reference(
    engine: Engine,
    train: PairDataset,
    val: PairDataset,
    rows_per_batch: int,
    output_dir: Path,
    resume_from: Path | None,
) -> tuple[PairDataset, PairDataset]:
    """Return both datasets with the log-probabilities of their samples. Every rank must call this.

    A run that is resumed reads them from the file of its first start.

    Raises:
        InputError: that file is missing, damaged, or of other pairs.
        SaveError: it cannot be written.
    """
    datasets = {TRAIN: train, VAL: val}
    identity = {name: json.dumps(data.digest()) for name, data in datasets.items()}
    if resume_from is not None:
        folder = resume_from.parent
        found = distributed.on_main(lambda: _read(folder / REFERENCE_FILE, identity, resume_from))
    else:
        found = {name: log_probs(engine, data, rows_per_batch) for name, data in datasets.items()}
        folder = None
    if folder != output_dir:
        distributed.on_main(lambda: _write(output_dir / REFERENCE_FILE, found, identity))
    return replace(train, reference=found[TRAIN]), replace(val, reference=found[VAL])


def log_probs(engine: Engine, data: PairDataset, rows_per_batch: int) -> np.ndarray:
    """Compute the log-probability of each sample (N,), float64, on all ranks. Every rank must call this."""
    objective = engine.objective
    assert isinstance(objective, Preference)
    found = torch.zeros(len(data), dtype=torch.float64, device=engine.device)
    shares = share_of_rank(range(len(data)), rows_per_batch, distributed.rank(), distributed.world_size())

    def batches() -> Iterator[PairBatch]:
        hidden = None if distributed.is_main() else True  # None: no bar if stderr is not a terminal
        for indices in tqdm(shares, desc="reference", unit="batch", disable=hidden, dynamic_ncols=True):
            yield data.batch(indices)

    for indices, (batch, losses) in zip(shares, engine.losses_of(batches()), strict=True):
        found[indices] = objective.log_probs(losses, batch)
    return distributed.sum_over_ranks(found).cpu().numpy()


def _write(path: Path, found: dict[str, np.ndarray], identity: dict[str, str]) -> None:
    with saving(path), replaced_file(path) as temporary:
        save_file({name: torch.from_numpy(values) for name, values in found.items()}, temporary, identity)


def _read(path: Path, identity: dict[str, str], checkpoint: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            saved = cast(dict[str, str], file.metadata() or {})
            found = {name: file.get_tensor(name) for name in identity}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}), and {checkpoint} cannot be resumed without the log-probabilities of "
            "its pairs under the model that the run started from; start a new run in another --output_dir"
        ) from error
    differing = [name for name in identity if saved.get(name) != identity[name]]
    if differing:
        raise InputError(
            f"{path}: is of other pairs ({', '.join(differing)}) than this run has; to resume {checkpoint}, give the "
            "same --pairs, --val_manifest, --val_split and --max_seq_len"
        )
    return found
