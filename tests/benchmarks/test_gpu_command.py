"""benchmarks/gpu.py in miniature: every part runs, and a part that fails or hangs loses nothing of the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

BENCHMARKS = PROJECT / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


@pytest.mark.slow
def test_every_part_in_miniature(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--minutes", "20", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    parts = record["result"]["parts"]
    assert list(parts) == ["device", "step", "tests", "trace", "base", "trainer", "encode", "variants"]
    assert {part["state"] for part in parts.values()} == {"done"}
    assert all(part["rows"] for part in parts.values())
    assert record["versions"]["torch"]
    steps = parts["step"]["rows"]
    assert {(row["precision"], row["recompute"]) for row in steps} == {
        (precision, recompute) for precision in ("bf16", "nf4") for recompute in ("none", "every_layer")
    }
    assert all(row["matmul_share"] > 0 and row["planned_gib"] > 0 for row in steps)
    assert parts["encode"]["rows"][-1]["codes_differing"] == 0
    assert not any("left_out" in row for part in parts.values() for row in part["rows"])


SCRIPT = """
import json, pathlib, sys, time
rows = pathlib.Path(sys.argv[2].removeprefix("--rows="))
with rows.open("a") as file:
    file.write(json.dumps({"figure": 1}) + "\\n")
    file.write('{"half')
if sys.argv[1] == "fails":
    raise SystemExit("the cause")
if sys.argv[1] == "hangs":
    time.sleep(600)
"""


def test_a_part_that_fails_or_hangs_is_reported(gpu: Any, tmp_path: Path) -> None:
    """Its rows are kept, and the next parts run."""
    script = tmp_path / "parts.py"
    script.write_text(SCRIPT)
    parts = [gpu.Part("fails", "", 1, 9), gpu.Part("hangs", "", 0, 1), gpu.Part("works", "", 1, 9)]
    parts.append(gpu.Part("long", "", 1000, 1000))
    result = gpu.run(parts, 60, tmp_path / "out" / "gpu.json", script)
    assert result == json.loads((tmp_path / "out" / "gpu.json").read_text())["result"]
    found = result["parts"]
    assert [part["state"] for part in found.values()] == ["failed", "out of time", "done", "not run"]
    assert [part["rows"] for part in found.values()] == [[{"figure": 1}]] * 3 + [[]]
    assert found["fails"]["why"] == "exit code 1"
    assert found["fails"]["log"] == ["the cause"]
    assert found["hangs"]["why"] == "stopped after 1 s"
    assert found["long"]["why"].endswith("and it needs 1000 s")
    lines = gpu.summary(result)
    assert lines[0].startswith("fails     failed, 1 rows: exit code 1")


def test_schedule(gpu: Any) -> None:
    """What fits into the minutes, without starting anything."""
    lines = gpu.schedule(gpu.PARTS, 180)
    assert lines[0].startswith("device       0 s to   30 s")
    assert lines[1].startswith("step        30 s to  150 s")
    assert [line for line in lines if "no time left" in line]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry_run", "--parts", "device"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [gpu.schedule(gpu.PARTS[:1], 480)[0]]


def test_a_part_names_what_it_leaves_out(gpu: Any, tmp_path: Path) -> None:
    from gpu_rows import Output

    out = Output(tmp_path / "rows", 5)
    assert out.has(1, "the first")
    assert not out.has(10, "the second")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert rows == [{"left_out": "the second"}]


def test_trace_is_summarized(gpu: Any) -> None:
    from gpu_steps import summarize_trace

    spans = [(0, 1_000_000, "a"), (500_000, 800_000, "b"), (3_000_000, 4_000_000, "a")]
    total, gap, *kernels = summarize_trace(spans)
    assert total == {"kernels": 3, "ms": 4.0, "idle_ms": 2.0, "idle_share": 0.5}
    assert gap == {"gap_ms": 2.0, "after": "a", "before": "a"}
    assert kernels == [
        {"kernel": "a", "calls": 2, "total_ms": 2.0, "share": 0.5},
        {"kernel": "b", "calls": 1, "total_ms": 0.3, "share": 0.075},
    ]
