"""Forked processes: results, errors, and processes that are ended."""

from __future__ import annotations

import os
import signal

import pytest

from higgs_ds.common.errors import SaveError
from higgs_ds.common.forks import run_in_forks


def test_results_in_order() -> None:
    results = run_in_forks(lambda number: (number, "x" * 10**6, os.getpid()), 3)
    assert [number for number, _, _ in results] == [0, 1, 2]
    assert len({os.getpid(), *(process for *_, process in results)}) == 4


def test_this_process_works_meanwhile() -> None:
    reader, writer = os.pipe()
    waiting = run_in_forks(lambda number: os.read(reader, 1), 2, lambda: os.write(writer, b"ab") and None)
    assert sorted(waiting) == [b"a", b"b"]


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
