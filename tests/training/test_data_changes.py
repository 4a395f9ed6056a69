"""Resuming: what has changed in the training data is said in numbers of samples; a finished run says that it is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import speech_sample, write_manifest
from launcher import RANDOM, run_script

from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common.run_files import TRAINING_DATA_FILE
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.preparation import Preparation
from higgs_ds.options.train import DataOptions, TrainOptions
from higgs_ds.training.data_changes import UNKNOWN, describe_data_change, record_training_data
from higgs_ds.training.resume import describe_finished

ENTRIES = [speech_sample(f"Clip {i}.", f"{name}_0{i}.flac", duration=0.5) for name in ("anna", "ben") for i in range(3)]


@pytest.fixture(scope="module")
def bundle(base: Path) -> Bundle:
    return open_bundle(str(base), None, None, base.parent)


def dataset(bundle: Bundle, entries: list[dict[str, Any]], folder: Path) -> Dataset:
    manifest = write_manifest(folder / "m.jsonl", entries)
    with Preparation(DataOptions(), bundle.coder(folder), folder) as preparation:
        checked = preparation.check(manifest)
        preparation.encode(checked, torch.device("cpu"))
        index = preparation.keep(checked)
        assert preparation.coder is not None
        return Dataset(index, np.arange(len(index)), preparation.coder)


def other_text(entry: dict[str, Any]) -> dict[str, Any]:
    messages = [dict(message) for message in entry["messages"]]
    messages[1]["content"] = "Something else."
    return {"messages": messages}


NEW = speech_sample("New.", "carla_00.flac")
CHANGES = {
    "new": ([NEW, *ENTRIES], "6 samples then and 7 now, by text and audio: 1 new, 6 unchanged"),
    "gone": (ENTRIES[2:], "6 samples then and 4 now, by text and audio: 2 gone, 4 unchanged"),
    "changed": (
        [ENTRIES[0], other_text(ENTRIES[1]), *ENTRIES[2:]],
        "6 samples then and 6 now, by text and audio: 1 changed, 5 unchanged",
    ),
    "all three": (
        [other_text(ENTRIES[0]), *ENTRIES[2:], NEW, NEW, NEW],
        "6 samples then and 8 now, by text and audio: 3 new, 1 gone, 1 changed, 4 unchanged",
    ),
    "repeated": ([*ENTRIES, ENTRIES[0]], "6 samples then and 7 now, by text and audio: 1 new, 6 unchanged"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_counted(change: str, bundle: Bundle, lone_rank: None, tmp_path: Path) -> None:
    before = dataset(bundle, ENTRIES, tmp_path)
    record_training_data(tmp_path, before)
    identity = before.digest()
    entries, expected = CHANGES[change]
    after = dataset(bundle, entries, tmp_path)
    assert describe_data_change(tmp_path, identity, after) == f"the training data has changed: of {expected}"


def test_order_and_what_is_not_recorded(bundle: Bundle, lone_rank: None, tmp_path: Path) -> None:
    data = dataset(bundle, ENTRIES, tmp_path)
    identity = data.digest()
    assert describe_data_change(tmp_path, identity, data) == UNKNOWN
    record_training_data(tmp_path, data)
    shuffled = dataset(bundle, random.Random(1).sample(ENTRIES, len(ENTRIES)), tmp_path)
    same = "the training data has the same 6 samples, but in another order"
    assert describe_data_change(tmp_path, identity, shuffled) == same
    assert describe_data_change(tmp_path, "0" * 64, shuffled) == UNKNOWN  # a checkpoint of another run
    path = tmp_path / TRAINING_DATA_FILE
    for content in (path.read_bytes()[:-20], b"", b"PK\3\4"):
        path.write_bytes(content)
        assert describe_data_change(tmp_path, identity, shuffled) == UNKNOWN


def test_finished() -> None:
    options, state = TrainOptions(), TrainerState(total_steps=10, settings={}, step=10)
    assert describe_finished(state, options) == (
        "this run is finished: all of its 10 steps are done, and none is trained now; to train further, resume it with "
        "more --epochs (2)"
    )
    assert "more --max_steps (10)" in describe_finished(state, options.replace(max_steps=10))
    state.step = 9
    assert describe_finished(state, options) == ""
    state.val_losses = {"3": 1.0, "6": 1.5, "9": 2.0}
    assert describe_finished(state, options.replace(early_stopping_patience=3)) == ""
    assert describe_finished(state, options.replace(early_stopping_patience=2)) == (
        "this run is finished: --early_stopping_patience 2 ended it at step 9 of 10, and no step is trained now; to "
        "train further, resume it with more patience"
    )


@pytest.mark.slow
def test_resuming_a_run(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", ENTRIES)
    line = (
        f"--train_manifest {manifest} --precision fp32 --batch_size 1 --grad_accum 3 --val_split 0 --no_report "
        "--resume auto --output_dir run --epochs 1"
    )
    first, again = (run_script("train", [*RANDOM, *line.split()], tmp_path) for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert "finished" not in first.stdout
    assert again.stdout.count("this run is finished: all of its 2 steps are done") == 1
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["step"] == 2
    write_manifest(manifest, [*ENTRIES[1:], NEW, NEW])
    changed = run_script("train", [*RANDOM, *f"{line} --max_steps 4".split()], tmp_path)
    assert changed.returncode == 2
    assert (
        "run/checkpoint-2: the training data has changed: of 6 samples then and 7 now, by text and audio: 2 new, "
        "1 gone, 5 unchanged\n"
    ) in changed.stderr
    assert "loading" not in changed.stdout.lower()
