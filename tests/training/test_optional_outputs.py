"""No failure of the report page, samples, TensorBoard or W&B ends a training; it is reported once, by rank 0."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT, read_metrics
from launcher import RANDOM, run_script, start_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

ADAPTER = "lora_adapters/adapter_model.safetensors"
RANKS = 2
REPORT = "warning: writing report.html failed: {}. The run goes on; the page is tried again later"
SAMPLES = "warning: generating samples failed: {}. The run goes on; they are tried again when they are next due"
TRACKER = (
    "warning: logging to {} failed: {}. The run goes on; no more metrics are sent there, but metrics.jsonl has all of "
    "them"
)
# Each fault of failing_worker.py: further options of the run, and the line that rank 0 prints.
FAULTS = {
    "generation_out_of_memory": (
        "--no_report --sample_steps 1 --num_samples 2",
        SAMPLES.format("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    ),
    "page_once_without_space": ("", REPORT.format("OSError: [Errno 28] No space left on device")),
    "page_never": ("", REPORT.format("AssertionError")),
    "tensorboard_folder_removed": (
        "--no_report --report_to tensorboard",
        TRACKER.format("TensorBoard", "FileNotFoundError: [Errno 2] No such file or directory: b'.*tfevents.*'"),
    ),
    "wandb_out_of_reach": (
        "--no_report --report_to wandb",
        TRACKER.format("Weights & Biases", "CommError: No connection. Try again"),
    ),
    "wandb_log_fails": (
        "--no_report --report_to wandb",
        TRACKER.format("Weights & Biases", "Error: the service has ended"),
    ),
}  # fmt: skip
# At stage 3 all ranks generate, and rank 0 writes.
STAGE_3 = {
    "samples_without_space": (
        "--no_report --sample_steps 3 --num_samples 1",
        SAMPLES.format("OSError: [Errno 28] No space left on device"),
    )
}


def options(manifest: Path, ds_json: Path, folder: Path, more: str) -> list[str]:
    return (
        f"--deepspeed {ds_json} --output_dir {folder} --precision fp32 --train_manifest {manifest} --lr 1e-3 "
        "--allow_text_targets --val_split 0.34 --batch_size 1 --grad_accum 1 --max_steps 3 --log_steps 1 --val_steps 1 "
        f"--save_steps 2 {more}"
    ).split()


def assert_trained(run: Path) -> None:
    state = json.loads((run / "trainer_state.json").read_text())
    assert (state["step"], state["finished"]) == (3, True)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert (run / ADAPTER).is_file()
    lines = read_metrics(run)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "val/loss" in line] == [1, 2, 3]


@dataclass(frozen=True)
class Runs:
    root: Path
    outputs: dict[str, list[list[str]]]  # of each run: the lines of each rank


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> Runs:
    """The same training on two ranks, undisturbed and with each fault."""
    root = tmp_path_factory.mktemp("optional")
    faults = {"undisturbed": ("--no_report", "")} | FAULTS | STAGE_3
    cases = [
        {
            "argv": options(mixed_manifest, ds_file(3 if name in STAGE_3 else 2), root / name, more),
            "fault": None if name == "undisturbed" else name,
        }
        for name, (more, _) in faults.items()
    ]
    processes = start_ranks(RANKS, [sys.executable, str(PROJECT / "tests" / "failing_worker.py"), json.dumps(cases)])
    logs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS, logs[0][-6000:] + logs[1][-3000:]
    parts = [re.split(r"^run: \d+\n", log, flags=re.MULTILINE)[1:] for log in logs]
    return Runs(root, {name: [part[i].splitlines() for part in parts] for i, name in enumerate(faults)})


def test_undisturbed(runs: Runs) -> None:
    assert runs.outputs["undisturbed"] == [[], []]
    assert_trained(runs.root / "undisturbed")


@pytest.mark.parametrize("fault", FAULTS | STAGE_3)
def test_the_run_goes_on_and_rank_0_reports_once(runs: Runs, fault: str) -> None:
    printed, of_rank_1 = runs.outputs[fault]
    expected = re.escape((FAULTS | STAGE_3)[fault][1]).replace(re.escape(".*"), ".*")
    printed = [line for line in printed if not line.startswith("warning: stop rate 0 is bad")]
    assert len(printed) == 1, printed
    assert re.fullmatch(expected, printed[0]), printed
    assert of_rank_1 == []
    assert_trained(runs.root / fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_is_learned(runs: Runs, fault: str) -> None:
    trained = load_file(runs.root / "undisturbed" / ADAPTER)
    found = load_file(runs.root / fault / ADAPTER)
    assert all(tensor.equal(found[name]) for name, tensor in trained.items())


def test_what_failed_once_is_tried_again(runs: Runs) -> None:
    logged = [
        line["step"] for line in read_metrics(runs.root / "generation_out_of_memory") if "sample/stop_rate" in line
    ]
    assert logged == [1, 2, 3]  # not those before the first step
    assert "<p>running, at step 1 of 3" in (runs.root / "page_once_without_space" / "report.html").read_text()
    assert not (runs.root / "page_never" / "report.html").exists()


def test_tracker_that_failed_gets_no_more_metrics_and_is_closed(runs: Runs) -> None:
    assert (runs.root / "wandb_log_fails" / "wandb_finished").read_text() == "2"


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "TkAgg", "Qt5Agg"])
def test_any_backend_of_matplotlib(
    tmp_path: Path, mixed_manifest: Path, ds_file: Callable[[int], Path], backend: str
) -> None:
    """As notebooks hand it down, unknown, and those that need a display."""
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    argv = [*RANDOM, *options(mixed_manifest, ds_file(2), tmp_path / "run", "")]
    done = run_script("train", argv, tmp_path, environment=environment | {"MPLBACKEND": backend})
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr
    assert f"report: {tmp_path}/run/report.html" in done.stdout
    assert_trained(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "finished, at step 3" in page
    assert page.count("<svg") > 5


def test_names_that_are_taken(tmp_path: Path, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> None:
    """Files where folders belong, and a folder where the page belongs."""
    run = tmp_path / "run"
    (run / "report.html").mkdir(parents=True)
    for name in ("tensorboard", "samples"):
        (run / name).write_text("")
    more = "--report_to tensorboard --sample_steps 1 --num_samples 1 --quiet"
    done = run_script("train", [*RANDOM, *options(mixed_manifest, ds_file(2), run, more)], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    tensorboard, samples, page = done.stdout.splitlines()
    assert tensorboard.startswith(TRACKER.format("TensorBoard", "FileExistsError: ").partition(". The")[0])
    assert page.startswith(REPORT.format("IsADirectoryError: ").partition(". The")[0])
    assert samples.startswith(SAMPLES.format("NotADirectoryError: ").partition(". The")[0])
    assert_trained(run)
    # Resumed with the names free, it writes them.
    for name in ("tensorboard", "samples"):
        (run / name).unlink()
    (run / "report.html").rmdir()
    more += f" --resume {run}/checkpoint-2"
    done = run_script("train", [*RANDOM, *options(mixed_manifest, ds_file(2), run, more)], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line.startswith("warning: stop rate 0 is bad") for line in done.stdout.splitlines())
    assert_trained(run)
    assert (run / "report.html").is_file()
    assert (run / "samples" / "prompts.json").is_file()
    assert list((run / "tensorboard").iterdir())


def test_page_that_failed_is_not_announced(
    tmp_path: Path, mixed_manifest: Path, ds_file: Callable[[int], Path]
) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    argv = [*RANDOM, *options(mixed_manifest, ds_file(2), tmp_path / "run", "")]
    done = run_script("train", argv, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("writing report.html failed") == 1
    assert "report: " not in done.stdout
    assert "LoRA adapters: " in done.stdout
