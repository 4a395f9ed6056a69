"""Forked processes: results, errors, and processes that are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from higgs_ds.common.errors import SaveError
from higgs_ds.common.forks import in_background, run_in_forks


def test_results_in_order() -> None:
    results = run_in_forks(lambda number: (number, "x" * 10**6, os.getpid()), 3)
    assert [number for number, _, _ in results] == [0, 1, 2]
    assert len({os.getpid(), *(process for *_, process in results)}) == 4


def test_an_error_of_the_project_is_raised() -> None:
    def fail(number: int) -> None:
        if number == 1:
            raise SaveError("disk full")
        signal.pause()  # the other process is ended

    with pytest.raises(SaveError, match="disk full"):
        run_in_forks(lambda number: fail(1 - number), 2)


def test_a_process_that_was_ended() -> None:
    with pytest.raises(RuntimeError, match="a worker process has ended with exit code -9"):
        run_in_forks(lambda number: os.kill(os.getpid(), signal.SIGKILL), 2)


IN_BACKGROUND = """
import os
from higgs_ds.common.forks import in_background

def with_torch():
    import torch
    return os.getpid(), float(torch.ones(3).sum())

with in_background(with_torch) as result:
    other, total = result()
assert other != os.getpid() and total == 3
import torch
with in_background(with_torch) as result:
    print(result() == (os.getpid(), 3))
"""


def test_in_background_unless_torch_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", IN_BACKGROUND], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_what_fails_in_the_background_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)

    def fail() -> None:
        raise SaveError("disk full")

    with in_background(fail) as result, pytest.raises(SaveError, match="disk full"):
        result()
    with in_background(signal.pause):
        pass  # its result is not asked for: it is ended
