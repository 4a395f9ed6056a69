"""Early stopping: when a run ends, what it keeps, and that it can be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import read_metrics
from launcher import train_runs
from safetensors.torch import load_file

from higgs_ds.checkpoints.state import TrainerState

pytestmark = pytest.mark.slow

ADAPTER = "lora_adapters/adapter_model.safetensors"


def options(manifest: Path, ds_json: Path, folder: Path, *more: str) -> list[str]:
    line = (
        f"--deepspeed {ds_json} --output_dir {folder} --precision fp32 --train_manifest {manifest} --lr 1e-3 "
        "--allow_text_targets --val_split 0.34 --batch_size 1 --grad_accum 1 --max_steps 6 --log_steps 4 --val_steps 1 "
        "--save_steps 100"
    )
    return [*line.split(), *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> Path:
    """No loss is 100 below the first, so the run ends after the third; then it is resumed to its full length."""
    root = tmp_path_factory.mktemp("early")

    def run(name: str, *more: str) -> list[str]:
        return options(mixed_manifest, ds_file(2), root / name, *more)

    patience = "--early_stopping_patience 2 --early_stopping_min_delta 100 --keep_checkpoints 1".split()
    train_runs(2, [run("early", *patience), run("whole", "--keep_checkpoints", "1")])
    first = {name: (root / "early" / name).read_bytes() for name in ("trainer_state.json", ADAPTER, "metrics.jsonl")}
    train_runs(2, [run("early", *patience, "--resume", "auto")])
    assert {name: (root / "early" / name).read_bytes() for name in first} == first
    (root / "first.json").write_bytes(first["trainer_state.json"])
    (root / "first.jsonl").write_bytes(first["metrics.jsonl"])
    train_runs(2, [run("early", "--resume", "auto")])
    return root


def test_ends_when_patience_is_out(runs: Path) -> None:
    state = json.loads((runs / "first.json").read_text())
    assert (state["step"], state["total_steps"], state["finished"], state["stopped_early"]) == (3, 6, True, True)
    lines = [json.loads(line) for line in (runs / "first.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == [1, 2, 3]
    # The values that step 4 would have logged are logged at the end.
    assert [(line["step"], "train/loss" in line) for line in lines][-1] == (3, True)


def test_resumed_run_equals_an_uninterrupted_one(runs: Path) -> None:
    expected, found = (load_file(runs / name / ADAPTER) for name in ("whole", "early"))
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    losses = [{line["step"]: line["val/loss"] for line in read_metrics(runs / name) if "val/loss" in line}
              for name in ("whole", "early")]  # fmt: skip
    assert losses[0] == losses[1]
    assert json.loads((runs / "early" / "trainer_state.json").read_text())["stopped_early"] is False


def test_best_checkpoint_is_kept(runs: Path) -> None:
    """Each lowest loss is saved although no checkpoint is due; the best one is kept longer than the newest."""
    state = json.loads((runs / "first.json").read_text())
    best = min(state["val_losses"], key=state["val_losses"].get)
    assert (runs / "early" / f"checkpoint-{best}").is_dir() or int(best) == 3


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "is_out"),
    [
        ([3, 2, 1], 1, 0, False),
        ([3, 2, 2], 1, 0, True),
        ([3, 2, 2.5, 1.9], 1, 0, False),
        ([3, 2, 1.95, 1.92], 2, 0.1, True),
        ([3, 2, 1.95, 1.85], 2, 0.1, False),  # measured from the last improvement that counted
        ([], 1, 0, False),
        ([3, 4, 5], None, 0, False),
        ([math.inf, 4], 1, 0, False),
    ],
)
def test_patience(losses: list[float], patience: int | None, min_delta: float, is_out: bool) -> None:
    """Losses are in the order of steps; as strings, the steps would sort differently."""
    state = TrainerState(20, {}, val_losses={str(9 + i): loss for i, loss in enumerate(losses)})
    assert state.is_out_of_patience(patience, min_delta) is is_out
