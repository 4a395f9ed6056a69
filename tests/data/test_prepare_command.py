"""Preparing data under hard conditions: killed at random moments, two at once, two ranks, worker processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, read_metrics, speech_sample, write_manifest
from launcher import start_ranks, train_runs
from safetensors.torch import load_file

from higgs_ds.bases.bundle import open_bundle
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.index import Index

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("HIGGS_DS_KILLS", "5"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of half a second, cut from the sample voices."""
    voices = sorted((PROJECT / "samples" / "voices").iterdir())[:12]
    entries = [
        speech_sample(f"{voice.stem} {half}.", voice.name, offset=half / 2, duration=0.5)
        for voice in voices
        for half in range(2)
    ]
    return write_manifest(tmp_path_factory.mktemp("prepare") / "m.jsonl", entries)


def contents(cache: Path, base: Path) -> list[tuple[list[int], list[list[list[int]]]]]:
    """Return what training reads: token ids and codes of every sample, from the index and the cache."""
    # A run killed after its last step has left its index too. The number in the name is the time, so use the newest.
    index = Index(max(path.parent for path in (cache / "index").glob("*/index.json")))
    dataset = Dataset(index, np.arange(len(index)), open_bundle(str(base), None, None, cache).coder(cache))
    samples = [dataset.encoded(i) for i in range(len(dataset))]
    return [(sample.prompt.input_ids, [codes.tolist() for codes in sample.codes]) for sample in samples]


def test_killed_at_random_moments_and_two_at_once(manifest: Path, base: Path, tmp_path: Path) -> None:
    script = PROJECT / "tests" / "prepare_kills.py"
    command = [sys.executable, str(script), str(manifest), str(base), str(tmp_path), str(KILLS), "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:] + (tmp_path / "prepare.log").read_text()[-4000:]
    print(done.stdout)
    assert json.loads(done.stdout)["before_the_end"] >= KILLS // 2
    undisturbed = contents(tmp_path / "undisturbed", base)
    assert len(undisturbed) == 24
    assert contents(tmp_path / "killed", base) == undisturbed
    # Two runs at once may each have written an index, with the same content.
    codes = [
        {path.name: load_file(path)["codes"].tolist() for path in (tmp_path / name).glob("codes/*/*.safetensors")}
        for name in ("undisturbed", "killed", "two")
    ]
    assert len(codes[0]) == 24
    assert codes[0] == codes[1] == codes[2]
    assert not [path for path in (tmp_path / "two").rglob("*.tmp") if path.is_file()]


def test_two_ranks_and_then_training(manifest: Path, base: Path, tmp_path: Path) -> None:
    """Two ranks prepare the data; runs on one rank and on two ranks reuse it without changes."""
    cache = tmp_path / "cache"
    options = f"--train_manifest {manifest} --base_ckpt {base} --cache_dir {cache}".split()
    ranks = start_ranks(2, [sys.executable, str(PROJECT / "launch" / "prepare.py"), *options])
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "samples: 24" in outputs[0]
    prepared = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    more = "--precision fp32 --lora_dropout 0 --max_tokens_per_batch 600 --bucket_size 8 --max_steps 3 --log_steps 1 "
    more += "--val_steps 3"
    for world_size, accumulation in ((1, 4), (2, 2)):
        run = f"--output_dir {tmp_path}/{world_size} --grad_accum {accumulation} {more}".split()
        train_runs(world_size, [options + run])
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == prepared
    one, two = (read_metrics(tmp_path / str(world_size)) for world_size in (1, 2))
    assert len(one) == len(two) == 4
    for line, other in zip(one, two, strict=True):
        for key in line:
            if "loss" in key:
                assert other[key] == pytest.approx(line[key], abs=1e-5)


def test_bad_data_ends_with_2(base: Path, tmp_path: Path) -> None:
    """Two ranks report each fault once, and leave no files."""
    entries = [
        speech_sample(text, clip) for text, clip in (("Good.", "anna_00.flac"), ("Words.", "x.wav"), ("", "y.wav"))
    ]
    path = write_manifest(tmp_path / "m.jsonl", entries)
    options = f"--train_manifest {path} --base_ckpt {base} --cache_dir {tmp_path / 'cache'}".split()
    ranks = start_ranks(2, [sys.executable, str(PROJECT / "launch" / "prepare.py"), *options])
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    (lines,) = [output.splitlines() for output in outputs if output]
    assert [line.split(": ")[0].strip() for line in lines] == ["error", f"{path}:2", f"{path}:3"]
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_workers_end_with_their_parent(manifest: Path, base: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from higgs_ds.data import encode; encode.WORTH_A_WORKER_S = 0.1; "
        "from higgs_ds.options.command_line import parse_prepare_options; from higgs_ds.training import prepare; "
        "from higgs_ds.common.process import run_ranks; "
        "run_ranks(lambda: prepare.main(*parse_prepare_options(sys.argv[1:])))"
    )
    script = tmp_path / "slow.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    options = f"--train_manifest {manifest} --base_ckpt {base} --cache_dir {tmp_path / 'cache'} --num_workers 2".split()
    parent = subprocess.Popen([sys.executable, str(script), *options])
    codes = tmp_path / "cache" / "codes"
    while parent.poll() is None and not list(codes.glob("*/*.safetensors")):
        time.sleep(0.05)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.kill()
    parent.wait()
    workers = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_runs(pid) for pid in workers):
        time.sleep(0.1)
    assert not [pid for pid in workers if _runs(pid)]


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
