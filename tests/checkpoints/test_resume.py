"""A run that is killed and resumed gives exactly the results of one that was never interrupted."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, read_metrics
from launcher import TRAIN, kill_after_step, start_ranks, train_runs
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SHIPPED = sorted((PROJECT / "ds_configs").glob("*.json"))


def run_options(manifest: Path, ds_json: Path, output_dir: Path, precision: str) -> list[str]:
    """Six steps with dropout and a warm-up, and a checkpoint every second step."""
    return (
        f"--deepspeed {ds_json} --output_dir {output_dir} --precision {precision} --train_manifest {manifest} "
        "--allow_text_targets --batch_size 1 --grad_accum 2 --max_steps 6 --lr 1e-3 --warmup_ratio 0.3 --log_steps 1 "
        "--val_steps 2 --save_steps 2"
    ).split()


def assert_same_end(expected_run: Path, found_run: Path, logged_at: list[int]) -> None:
    """Equal to the last bit: every loss, norm and rate, the adapters, Adam's moments."""
    kept = ("step", "epoch", "lr", "grad_norm")
    expected, found = (
        [{key: value for key, value in line.items() if "loss" in key or key in kept} for line in read_metrics(folder)]
        for folder in (expected_run, found_run)
    )
    assert [line["step"] for line in expected] == logged_at
    assert found == expected
    for name in ("lora_adapters/adapter_model.safetensors", "checkpoint-6/optimizer.safetensors"):
        expected_tensors, found_tensors = load_file(expected_run / name), load_file(found_run / name)
        assert expected_tensors.keys() == found_tensors.keys()
        assert all(tensor.equal(found_tensors[key]) for key, tensor in expected_tensors.items())


def test_killed_and_resumed(
    tmp_path: Path, mixed_manifest: Path, small_base: Path, ds_file: Callable[[int], Path]
) -> None:
    """In bf16 at stage 3; tests/chaos.py does the same in float32, at any moment."""
    ranks, stage, precision = 2, 3, "bf16"
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    uninterrupted_options, options = (
        [*run_options(mixed_manifest, ds_file(stage), folder, precision), "--base_ckpt", str(small_base)]
        for folder in (uninterrupted, resumed)
    )
    train_runs(ranks, [uninterrupted_options])
    kill_after_step(start_ranks(ranks, TRAIN + options), resumed, step=2)
    assert not (resumed / "checkpoint-6").exists()
    train_runs(ranks, [[*options, "--resume", "auto"]])
    assert_same_end(uninterrupted, resumed, logged_at=[1, 2, 2, 3, 4, 4, 5, 6, 6])


@pytest.mark.parametrize(("ranks", "signalled", "number"), [(1, 0, signal.SIGTERM), (2, 1, signal.SIGUSR1)])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    tmp_path: Path, mixed_manifest: Path, ds_file: Callable[[int], Path], ranks: int, signalled: int, number: int
) -> None:
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    train_runs(ranks, [run_options(mixed_manifest, ds_file(2), uninterrupted, "fp32")])
    options = run_options(mixed_manifest, ds_file(2), resumed, "fp32")
    processes = start_ranks(ranks, [*TRAIN, *options, "--save_steps", "100"])
    deadline = time.monotonic() + 200
    while not (resumed / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    processes[signalled].send_signal(number)
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [6] * ranks, outputs
    (checkpoint,) = resumed.glob("checkpoint-*")
    assert (
        f"stopped by {signal.Signals(number).name} at step {checkpoint.name.removeprefix('checkpoint-')} of 6"
        in (outputs[0])
    )
    train_runs(ranks, [[*options, "--resume", "auto", "--keep_checkpoints", "1"]])
    assert_same_end(uninterrupted, resumed, logged_at=[1, 2, 2, 3, 4, 4, 5, 6, 6])
    assert len(list(resumed.glob("checkpoint-*"))) <= 2  # the newest and the best


def shipped_options(ds_json: Path, manifest: Path, output_dir: Path) -> list[str]:
    """With log lines over three steps; the checkpoint after step 2 falls within the first of them.

    In bf16 once for each optimizer of DeepSpeed (stage 3: above): it is slow on CPUs without bf16 instructions.
    """
    precision = "bf16" if ds_json.stem in ("zero0", "zero1", "zero2") else "fp32"
    return [*run_options(manifest, ds_json, output_dir, precision), "--log_steps", "3"]


@pytest.fixture(scope="module")
def resumed_runs(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, small_base: Path) -> Path:
    """For every shipped DeepSpeed file, an uninterrupted run, and one resumed from the checkpoint of step 2."""
    root = tmp_path_factory.mktemp("resumed")
    uninterrupted_argvs, resumed_argvs = (
        [
            [*shipped_options(path, mixed_manifest, root / f"{path.stem}-{name}"), "--base_ckpt", str(small_base)]
            for path in SHIPPED
        ]
        for name in ("uninterrupted", "resumed")
    )
    train_runs(2, uninterrupted_argvs)
    for path in SHIPPED:
        shutil.copytree(root / f"{path.stem}-uninterrupted", root / f"{path.stem}-resumed")
        for step in (4, 6):
            shutil.rmtree(root / f"{path.stem}-resumed" / f"checkpoint-{step}")
    train_runs(2, [[*options, "--resume", "auto"] for options in resumed_argvs])
    return root


@pytest.mark.parametrize("stem", [path.stem for path in SHIPPED])
def test_resumed_with_every_shipped_file(resumed_runs: Path, stem: str) -> None:
    assert_same_end(resumed_runs / f"{stem}-uninterrupted", resumed_runs / f"{stem}-resumed", logged_at=[2, 3, 4, 6, 6])


ELSEWHERE = [((2, 3), (1, 2)), ((1, 2), (2, 3)), ((2, 3), (2, 2)), ((2, 2), (2, 3)), ((2, 2), (1, 0)), ((1, 0), (2, 1))]


@pytest.fixture(scope="module")
def moved_runs(
    tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, small_base: Path, ds_file: Callable[[int], Path]
) -> dict[tuple[object, object], Path]:
    """An uninterrupted run per number of ranks and stage, and runs resumed after step 2 on other ranks and stages.

    Without dropout, whose random draws depend on the number of ranks; every run uses eight samples per step.
    """
    root = tmp_path_factory.mktemp("moved")

    def options(ranks: int, stage: int, folder: Path, *more: str) -> list[str]:
        argv = run_options(mixed_manifest, ds_file(stage), folder, "fp32")
        argv += ["--base_ckpt", str(small_base), "--lora_dropout", "0"]
        return [*argv, "--batch_size", "2", "--grad_accum", str(4 // ranks), *more]

    kinds = sorted({begun for begun, _ in ELSEWHERE})
    folders = {(kind, kind): root / f"{kind[0]}-{kind[1]}" for kind in kinds}
    for ranks in (1, 2):
        train_runs(ranks, [options(*kind, folders[kind, kind]) for kind in kinds if kind[0] == ranks])
    for begun, moved in ELSEWHERE:
        folder = folders[begun, moved] = root / f"{begun[0]}-{begun[1]}-to-{moved[0]}-{moved[1]}"
        shutil.copytree(folders[begun, begun], folder)
        for step in (4, 6):
            shutil.rmtree(folder / f"checkpoint-{step}")
    for ranks in (1, 2):
        pairs = [(begun, moved) for begun, moved in ELSEWHERE if moved[0] == ranks]
        train_runs(ranks, [options(*moved, folders[begun, moved], "--resume", "auto") for begun, moved in pairs])
    return folders


@pytest.mark.parametrize(("begun", "moved"), ELSEWHERE, ids=lambda kind: f"{kind[0]}-ranks-stage-{kind[1]}")
def test_resumed_on_other_ranks_and_stages(
    moved_runs: dict[tuple[object, object], Path], begun: tuple[int, int], moved: tuple[int, int]
) -> None:
    uninterrupted, found = (read_metrics(moved_runs[begun, end]) for end in (begun, moved))
    assert [line["step"] for line in found] == [line["step"] for line in uninterrupted] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    for expected, line in zip(uninterrupted, found, strict=True):
        for key in expected:
            if "loss" in key and expected[key] is not None:
                assert line[key] == pytest.approx(expected[key], rel=0, abs=1e-5), (line["step"], key)
    expected, tensors = (
        load_file(moved_runs[begun, end] / "lora_adapters" / "adapter_model.safetensors") for end in (begun, moved)
    )
    for name, tensor in expected.items():
        assert (tensors[name] - tensor).abs().max() < 1e-5, name
