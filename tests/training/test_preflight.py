"""Checks before and after the first step: disk space, time, losses that cannot be right."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import pytest

from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import ABANDONED_AFTER_S, restore_leftovers
from higgs_ds.options.run import RunOptions
from higgs_ds.reporting.metrics_log import MetricsLog
from higgs_ds.training.loss_checks import implausible_losses, may_skip_step
from higgs_ds.training.preflight import check_room, seconds_left
from higgs_ds.training.resume import WRITTEN, WRITTEN_BY_RUNS


def counted_checkpoints(first: int, total: int, every: int, keep: int | None) -> int:
    """Return the most checkpoints that exist at once: each is saved before old ones go; the oldest is the best one."""
    existing: list[int] = []
    most = 0
    for step in range(first + 1, total + 1):
        if step % every == 0 or step == total:
            existing.append(step)
            most = max(most, len(existing))
            if keep is not None:
                existing = [s for s in existing if s == existing[0] or s in existing[-keep:]]
    return most


@pytest.mark.parametrize("first", [0, 7, 100])
@pytest.mark.parametrize("keep", [None, 1, 2, 5])
@pytest.mark.parametrize(("total", "every"), [(100, 10), (101, 10), (100, 1000), (8, 1)])
def test_room_for_checkpoints(tmp_path: Path, first: int, keep: int | None, total: int, every: int) -> None:
    if first >= total:
        first = 0
    adapter = shutil.disk_usage(tmp_path).free // 1000
    state = TrainerState(total, {}, step=first)
    options = RunOptions(save_steps=every, keep_checkpoints=keep)
    takes = 3 * adapter * counted_checkpoints(first, total, every, keep) + 2 * adapter
    # The free space may change a little in the meantime.
    scale = (shutil.disk_usage(tmp_path).free - (64 << 20)) / takes
    check_room(tmp_path / "run", state, options, int(adapter * scale), 0)
    with pytest.raises(InputError, match=f"--output_dir {tmp_path}"):
        check_room(tmp_path / "run", state, options, int(adapter * scale * 1.2), 0)


def test_room_for_a_merged_model(tmp_path: Path) -> None:
    free, state = shutil.disk_usage(tmp_path).free, TrainerState(10, {})
    check_room(tmp_path, state, RunOptions(), 100, 2 * free)
    with pytest.raises(InputError, match="GiB for the merged model"):
        check_room(tmp_path, state, RunOptions(merge_adapter_with_base=True), 100, 2 * free)


def test_room_for_full_fine_tuning(tmp_path: Path) -> None:
    """Master weights and moments of each checkpoint, and the complete model; no adapters."""
    free = shutil.disk_usage(tmp_path).free
    state, options = TrainerState(10, {}), RunOptions(merge_adapter_with_base=True)
    check_room(tmp_path, state, options, int(free * 0.2), int(free * 0.3), is_full_finetuning=True)
    with pytest.raises(InputError, match=r"GiB for 1 checkpoint, .* GiB for the complete model\)"):
        check_room(tmp_path, state, options, int(free * 0.2), int(free * 0.5), is_full_finetuning=True)


def test_room_for_averages(tmp_path: Path) -> None:
    """Instead of 3 and 2 times what is trained, checkpoints take 4 times as much, and adapters 4 times."""
    state, options = TrainerState(10, {}), RunOptions()
    trained_bytes = shutil.disk_usage(tmp_path).free // 6
    check_room(tmp_path, state, options, trained_bytes, 0)
    with pytest.raises(InputError, match="GiB for adapters"):
        check_room(tmp_path, state, options, trained_bytes, 0, averaged=True)


def test_time_limit_of_slurm() -> None:
    assert seconds_left({}) is None
    assert seconds_left({"SLURM_JOB_END_TIME": ""}) is None
    assert seconds_left({"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}) == pytest.approx(100, abs=2)


@pytest.mark.parametrize(("left", "num_notes"), [(None, 0), (100_000, 0), (1_000, 1)])
def test_run_longer_than_its_limit_is_noted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], left: float | None, num_notes: int
) -> None:
    log = MetricsLog(tmp_path, 0, 1000, seconds_left=left)
    for step in (1, 2):
        log.write(step, 0.1, {"train/loss": 1.0, "step_time_s": 10.0})
    log.close()
    assert capsys.readouterr().out.count("the job's time limit is in 0.3 h") == num_notes


@pytest.mark.parametrize(
    ("text", "audio", "words"),
    [
        (3.0, 4.0, []),
        (0.001, 4.0, []),  # speech samples: the tokens around the audio
        (math.nan, 4.0, []),
        (3.0, math.nan, []),
        (math.log(128_256), math.log(1026), []),
        (3.0, 0.02, ["near zero"]),
        (
            3.0,
            12.0,
            ["far above the 6.93 of a uniform guess among 1,026 classes; likely causes: codes of another codec"],
        ),
        (20.0, 4.0, ["far above the 11.76 of a uniform guess among 128,256 classes; likely causes: another tokenizer"]),
        (20.0, 12.0, ["another codec", "another tokenizer"]),
    ],
)
def test_first_losses(text: float, audio: float, words: list[str]) -> None:
    found = implausible_losses(text, audio, 128_256, 1026)
    assert len(found) == len(words)
    assert all(word in doubt for word, doubt in zip(words, found, strict=True))


def test_how_many_steps_may_be_skipped() -> None:
    assert [may_skip_step(n, 5) for n in (0, 9, 10)] == [True, True, False]
    assert [may_skip_step(n, 5000) for n in (10, 49, 50)] == [True, True, False]


def test_leftovers_of_killed_processes_are_cleaned_up(tmp_path: Path) -> None:
    def folder(name: str, age_s: float = 0) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
        os.utime(tmp_path / name, (time.time() - age_s, time.time() - age_s))

    old = ABANDONED_AFTER_S + 10
    folder(".merged_model.abc.tmp")  # perhaps not finished yet
    folder(".adapter.abc.tmp", old)
    folder(".checkpoint-4.abc.tmp")  # of a run that has lost its lock
    folder(".checkpoint-6.abc.tmp", old)
    folder(".lora_adapters.x1.tmp.old")  # moved aside, and its replacement is missing
    folder("checkpoint-8")
    folder(".checkpoint-8.x2.tmp.old", old)  # moved aside, and its replacement exists
    folder(".venv", old)
    folder(".another-program.abc.tmp", old)
    folder("notes.tmp", old)
    (tmp_path / ".trainer_state.json.zz.tmp").write_text("half")
    os.utime(tmp_path / ".trainer_state.json.zz.tmp", (0, 0))
    restore_leftovers(tmp_path, WRITTEN, WRITTEN_BY_RUNS)
    left = [".another-program.abc.tmp", ".merged_model.abc.tmp", ".venv", "checkpoint-8", "lora_adapters", "notes.tmp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert (tmp_path / "lora_adapters" / "content").read_text() == ".lora_adapters.x1.tmp.old"
    restore_leftovers(tmp_path / "none", WRITTEN, WRITTEN_BY_RUNS)
