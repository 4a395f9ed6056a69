"""Full or read-only disks: reported at the start if possible, else an error with an exit code; nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, read_metrics
from safetensors.torch import load_file

from higgs_ds.adapters.save import ADAPTER_WEIGHTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    probe = tmp_path_factory.mktemp("probe")
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    subprocess.run(["umount", probe], check=True)
    folder = tmp_path_factory.mktemp("full")
    script = [sys.executable, str(PROJECT / "tests" / "full_disk.py"), str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_during_a_run(tries: tuple[Path, dict[str, Any]]) -> None:
    """A run that cannot write a file exits with 3; once it can be written, the run resumes and ends the same."""
    folder, results = tries
    expected = load_file(folder / "undisturbed" / "lora_adapters" / ADAPTER_WEIGHTS)
    steps = [line["step"] for line in read_metrics(folder / "undisturbed")]
    for number, result in enumerate(results["during"]):
        assert (result["codes"], result["again"]) == ([3], [0]), result
        assert "could not be written" in result["words"]
        assert result["words"].endswith("What was saved before is unchanged")
        run = folder / f"run-{number}"
        found = load_file(run / "lora_adapters" / ADAPTER_WEIGHTS)
        assert all(tensor.equal(found[name]) for name, tensor in expected.items())
        assert [line["step"] for line in read_metrics(run)] == steps
        assert not list(run.glob(".*"))
    failed_at = {Path(result["words"].split(": ")[1]).name.split("-")[0] for result in results["during"]}
    assert "checkpoint" in failed_at
    assert len(failed_at) > 1  # which other files fail depends on the moment
    assert any("Read-only file system" in result["words"] for result in results["during"])


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("output, full", 3, "could not be written"),
        ("output, read-only", 2, "cannot be written to"),
        ("cache, full", 3, "could not be written"),
        ("cache, read-only", 2, "cannot be written to"),
        ("codes, full", 3, "could not be written"),
        ("built-in base, full", 3, "could not be written"),
        ("built-in base, read-only", 2, "cannot be written to"),
        ("list of bad samples, full", 3, "could not be written"),
        ("list of bad samples, read-only", 2, "cannot be written to"),
        ("merged model, full", 2, "GiB are free, but the merged model takes"),
        ("merged model, read-only", 2, "cannot be written to"),
        ("merged model of a run", 2, "GiB for the merged model"),
        ("metrics, full", 3, "metrics.jsonl: could not be written"),
        ("metrics, read-only", 3, "metrics.jsonl: could not be written"),
        ("adapters, full", 3, "lora_adapters: could not be written"),
        ("adapters, read-only", 3, "lora_adapters: could not be written"),
        ("speech, full", 3, "could not be written"),
        ("speech, read-only", 2, "cannot be written to"),
    ],
)
def test_from_the_start(tries: tuple[Path, dict[str, Any]], what: str, code: int, words: str) -> None:
    result = tries[1]["start"][what]
    assert result["codes"] == [code], result
    assert words in result["words"], result
    assert "Traceback" not in result["words"]


def test_nothing_is_left_behind(tries: tuple[Path, dict[str, Any]]) -> None:
    assert tries[1]["start"]["left on the disk, full"]["words"].split() == ["filler", "metrics.jsonl"]
    assert tries[1]["start"]["left on the disk, read-only"]["words"] == ""
