"""Who may write: locks held, refused, released, and taken over from processes that are gone."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from higgs_ds.common import lock
from higgs_ds.common.errors import InputError, SaveError
from higgs_ds.common.lock import OutputLock, Owner, lock_beside, locked

HOLD = """
import sys, time
from pathlib import Path
from higgs_ds.common.lock import OutputLock
OutputLock(Path(sys.argv[1]), "--output_dir run").acquire(print)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


@pytest.fixture
def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()


def said_on_acquiring(path: Path) -> list[str]:
    said: list[str] = []
    with locked(path, "--output_dir run", said.append) as held:
        held.check()
    assert not path.exists()
    return said


@contextlib.contextmanager
def touched(path: Path) -> Iterator[None]:
    """Touch a lock as its owner does, for one block."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.3):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    yield
    ended.set()
    thread.join()


def write(path: Path, owner: Owner) -> None:
    path.write_text(json.dumps(asdict(owner)))


def test_a_second_process_is_refused(path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(InputError) as caught:
        OutputLock(path, "--output_dir run").acquire(print)
    message = str(caught.value)
    assert message.startswith(f"--output_dir run: process {holder.pid} on {os.uname().nodename}, started ")
    assert "choose another path" in message
    assert path.exists()


def test_a_killed_process_is_no_obstacle(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (line,) = said_on_acquiring(path)
    assert f"process {holder.pid} on " in line
    assert line.endswith("is taken over: that process has ended")


def test_a_zombie_and_a_reused_process_id_do_not_count(path: Path) -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    time.sleep(1)  # it has ended, and is not waited for
    write(path, replace(Owner.this_process(), pid=zombie.pid, started=time.time()))
    assert "that process has ended" in said_on_acquiring(path)[0]
    zombie.wait()
    write(path, replace(Owner.this_process(), pid=os.getppid(), started=1.0))
    assert "that process has ended" in said_on_acquiring(path)[0]


def test_a_machine_that_was_started_again(path: Path) -> None:
    write(path, replace(Owner.this_process(), pid=1, boot="another"))
    before_boot = psutil.boot_time() - 60
    os.utime(path, (before_boot, before_boot))
    assert "started again since" in said_on_acquiring(path)[0]


def test_a_living_machine_of_the_same_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines made from one image may all be called "ubuntu"; all have the same namespace of process ids."""
    monkeypatch.setattr(lock, "STALE_AFTER_S", 2.0)
    write(path, replace(Owner.this_process(), boot="another"))
    with touched(path), pytest.raises(InputError, match="is writing there"):
        OutputLock(path, "--output_dir run").acquire(print)


def test_an_earlier_start_of_the_same_slurm_job(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    elsewhere = replace(Owner.this_process(), host="node7")
    write(path, elsewhere)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "Slurm has started job 17 again" in said_on_acquiring(path)[0]


def test_another_machine_that_is_alive(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_AFTER_S", 2.0)
    write(path, replace(Owner.this_process(), host="node7"))
    said: list[str] = []
    with touched(path), pytest.raises(InputError, match="on node7, started "):
        OutputLock(path, "--output_dir run").acquire(said.append)
    assert "watching for up to 2 s whether it is alive" in said[0]


def test_another_machine_that_is_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_AFTER_S", 0.5)
    write(path, replace(Owner.this_process(), host="node7"))
    assert "has given no sign of life for 0.5 s" in said_on_acquiring(path)[1]


def test_a_held_lock_is_touched(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TOUCH_EVERY_S", 0.05)
    with locked(path, "--output_dir run", print):
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns > before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a"}', "null"])
def test_a_lock_without_its_content(path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(lock, "UNREADABLE_S", 0.2)
    path.write_text(content)
    assert said_on_acquiring(path) == []


def test_a_lost_lock_ends_its_run(path: Path) -> None:
    held = OutputLock(path, "--output_dir run")
    held.acquire(print)
    write(path, replace(Owner.this_process(), host="node7", token="other"))
    with pytest.raises(SaveError, match=r"was taken over by process .* on node7"):
        held.check()
    held.release()
    assert json.loads(path.read_text())["host"] == "node7"  # another's lock is not removed
    path.unlink()
    held.acquire(print)
    path.unlink()
    with pytest.raises(SaveError, match="was removed"):
        held.check()


def _race(path: Path, barrier: object, queue: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    try:
        OutputLock(path, "--output_dir run").acquire(lambda _: None)
        queue.put(1)  # type: ignore[attr-defined]
        time.sleep(1)
    except InputError:
        queue.put(0)  # type: ignore[attr-defined]


def test_of_many_that_take_over_at_once_one_succeeds(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        write(path, replace(Owner.this_process(), pid=2**22 - 1, started=1.0))
        barrier, queue = context.Barrier(8), context.Queue()
        processes = [context.Process(target=_race, args=(path, barrier, queue)) for _ in range(8)]
        for process in processes:
            process.start()
        assert sum(queue.get(timeout=30) for _ in processes) == 1
        for process in processes:
            process.join()
        path.unlink(missing_ok=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="could not be written"):
        OutputLock(tmp_path / "none" / ".lock", "--output_dir run").acquire(print)


def test_the_lock_beside_an_output() -> None:
    assert lock_beside(Path("/a/merged")) == Path("/a/.merged.lock")
    assert lock_beside(Path("merged")).parent == Path.cwd()
