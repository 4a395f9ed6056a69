"""A loss or gradient that is not finite on one rank: nothing is learned from it, and the samples are reported."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, read_metrics
from launcher import start_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

CASES = [(0, "fp32", "loss"), (0, "fp32", "gradient"), (1, "fp32", "gradient"), (2, "fp32", "loss")]
CASES += [(3, "fp32", "loss"), (3, "fp32", "gradient")]
CASES += [(0, "bf16", "gradient"), (1, "bf16", "loss"), (2, "bf16", "gradient"), (3, "bf16", "loss")]
STOPPED = [(0, "fp32", "gradient"), (1, "bf16", "loss"), (3, "fp32", "loss")]
RANKS = 2


def run_spoiled(cases: list[dict[str, object]]) -> list[str | None]:
    processes = start_ranks(RANKS, [sys.executable, str(PROJECT / "tests" / "spoiled_worker.py"), json.dumps(cases)])
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS, outputs[0][-6000:] + outputs[1][-3000:]
    return json.loads(next(line for line in outputs[0].splitlines() if line.startswith("errors:"))[len("errors:") :])


def options(base: Path, manifest: Path, ds_json: Path, folder: Path, precision: str, more: str) -> list[str]:
    return (
        f"--base_ckpt {base} --deepspeed {ds_json} --output_dir {folder} --precision {precision} "
        f"--train_manifest {manifest} --lr 1e-3 --allow_text_targets --batch_size 1 --grad_accum 2 "
        f"--max_steps 5 --log_steps 1 --val_steps 100 --save_steps 1 --lora_targets attention --ema_decay 0.5 {more}"
    ).split()


def learned(run: Path, step: int) -> dict[str, object]:
    """Return the adapter, its average and Adam's moments."""
    folder = run / f"checkpoint-{step}"
    averages = load_file(folder / "lora_adapters_ema" / "adapter_model.safetensors")
    found = load_file(folder / "lora_adapters" / "adapter_model.safetensors") | load_file(
        folder / "optimizer.safetensors"
    )
    return found | {f"average.{name}": tensor for name, tensor in averages.items()}


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def spoiled(
    tmp_path_factory: pytest.TempPathFactory, small_base: Path, mixed_manifest: Path, ds_file: Callable[[int], Path]
) -> tuple[Path, dict[str, str | None]]:
    """For each case a run that skips step 3; for some cases also a run that stops there."""
    root = tmp_path_factory.mktemp("spoiled")
    cases = {}
    for stage, precision, kind in CASES:
        for way in ("skip", "stop") if (stage, precision, kind) in STOPPED else ("skip",):
            name = f"{stage}-{precision}-{kind}-{way}"
            argv = options(small_base, mixed_manifest, ds_file(stage), root / name, precision, f"--on_nonfinite {way}")
            cases[name] = {"argv": argv, "steps": [3], "rank": 1, "kind": kind}
    argv = options(small_base, mixed_manifest, ds_file(2), root / "all", "fp32", "--on_nonfinite skip --max_steps 20")
    cases["all"] = {"argv": argv, "steps": list(range(2, 21)), "rank": 0, "kind": "loss"}
    return root, dict(zip(cases, run_spoiled(list(cases.values())), strict=True))


@pytest.mark.parametrize(("stage", "precision", "kind"), STOPPED)
def test_stops_before_the_optimizer(
    spoiled: tuple[Path, dict[str, str | None]], stage: int, precision: str, kind: str
) -> None:
    root, errors = spoiled
    error = errors[f"{stage}-{precision}-{kind}-stop"]
    assert error is not None
    run = root / f"{stage}-{precision}-{kind}-stop"
    assert error.startswith("step 3: " + ("the loss is NaN or infinite" if kind == "loss" else "all losses are finite"))
    named = [line.strip() for line in error.splitlines() if line.startswith("  rank")]
    assert [line[:7] for line in named] == (["rank 1:"] if kind == "loss" else ["rank 0:", "rank 1:"])
    assert all(line.count("mixed.jsonl:") == (1 if kind == "loss" else 2) for line in named)
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert same(learned(run, 2), learned(root / f"{stage}-{precision}-{kind}-skip", 2))


@pytest.mark.parametrize(("stage", "precision", "kind"), CASES)
def test_skips_a_step(spoiled: tuple[Path, dict[str, str | None]], stage: int, precision: str, kind: str) -> None:
    root, errors = spoiled
    run = root / f"{stage}-{precision}-{kind}-skip"
    assert errors[run.name] is None
    assert same(learned(run, 2), learned(run, 3))
    assert not same(learned(run, 3), learned(run, 4))
    lines = [line for line in read_metrics(run) if "lr" in line]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 4, 5]
    assert [line.get("skipped_steps") for line in lines] == [None, None, 1, 1, 1]
    cosine = [0.5e-3 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert [line["lr"] for line in lines] == pytest.approx(cosine)
    assert json.loads((run / "trainer_state.json").read_text())["skipped"] == [3]


def test_skips_a_limited_number_of_steps(spoiled: tuple[Path, dict[str, str | None]]) -> None:
    root, errors = spoiled
    assert errors["all"] is not None
    assert errors["all"].startswith("step 12: ")
    assert "steps skipped earlier: 10" in errors["all"]
    assert same(learned(root / "all", 1), learned(root / "all", 11))


def test_resumes_after_a_skipped_step(
    spoiled: tuple[Path, dict[str, str | None]],
    small_base: Path,
    mixed_manifest: Path,
    ds_file: Callable[[int], Path],
) -> None:
    """Adam counts only the applied steps; at stage 0, this project writes the count itself."""
    root, _ = spoiled
    cases = []
    for stage in (0, 3):
        whole, broken = root / f"{stage}-fp32-loss-skip", root / f"{stage}-again"
        shutil.copytree(whole, broken)
        for step in (4, 5):
            shutil.rmtree(broken / f"checkpoint-{step}")
        argv = options(small_base, mixed_manifest, ds_file(stage), broken, "fp32", "--on_nonfinite stop --resume auto")
        cases.append({"argv": argv, "steps": [], "rank": 0, "kind": "loss"})
    assert run_spoiled(cases) == [None, None]
    for stage in (0, 3):
        assert same(learned(root / f"{stage}-fp32-loss-skip", 5), learned(root / f"{stage}-again", 5))
