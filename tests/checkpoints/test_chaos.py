"""`make chaos` kills a hundred runs; this test kills a few."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

pytestmark = pytest.mark.slow

KILLS = 4


def test_killed_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    script = [sys.executable, str(PROJECT / "tests" / "chaos.py"), str(tmp_path / "chaos"), str(KILLS), "11"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == KILLS
    assert counts["skipped checkpoints"] == 0
