"""Time and peak memory of short commands in two checkouts, in turns: python benchmarks/startup.py OLD NEW [ROUNDS].

Both use the Python that runs this. Each command runs once before it is measured, so that caches are filled. A training
is measured to the end of its first step. Prints medians, and the ratios NEW / OLD.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NUM_SAMPLES = 100
TRAIN = "--precision fp32 --max_steps 1 --batch_size 1 --grad_accum 1 --val_split 0 --no_report --log_steps 1"
PORT = 29650


def environment(repo: Path, work: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(repo), "HIGGS_DS_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}


def run(repo: Path, work: Path, command: str) -> tuple[float, float]:
    """Run a command of a checkout. Return seconds and peak GiB."""
    name, *options = command.split()
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(repo / "launch" / f"{name}.py"), *options],
        env=environment(repo, work), cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{repo}: {command} failed")
    return seconds, usage.ru_maxrss / 2**20


def to_first_step(repo: Path, work: Path, ranks: int) -> tuple[float, float]:
    """Start a training on a number of ranks. Return the seconds until its first step is logged, and peak GiB."""
    shutil.rmtree(work / "run", ignore_errors=True)
    command = [sys.executable, "-u", str(repo / "launch" / "train.py"), *TRAIN.split(), "--output_dir", "run"]
    start, seconds = time.perf_counter(), None
    processes = []
    for rank in range(ranks):
        variables = environment(repo, work)
        if ranks > 1:
            variables |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT),
            }  # fmt: skip
        processes.append(
            subprocess.Popen(
                command, env=variables, cwd=work, text=True, stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            )
        )  # fmt: skip
    assert processes[0].stdout
    for line in processes[0].stdout:
        if seconds is None and line.startswith("step 1 "):
            seconds = time.perf_counter() - start
    ends = [os.wait4(process.pid, 0) for process in processes]
    if seconds is None or any(status for _, status, _ in ends):
        sys.exit(f"{repo}: {' '.join(command)} failed on {ranks} ranks")
    return seconds, max(usage.ru_maxrss for *_, usage in ends) / 2**20


def write_manifest(path: Path, samples: Path) -> None:
    """Write a manifest of NUM_SAMPLES samples, with absolute paths of their clips."""
    lines = []
    for line in (samples / "digits.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for message in entry["messages"]:
            if isinstance(message["content"], dict):
                message["content"]["audio_url"] = str(samples / message["content"]["audio_url"])
        lines.append(json.dumps(entry))
    path.write_text("\n".join((lines * NUM_SAMPLES)[:NUM_SAMPLES]) + "\n", encoding="utf-8")


def measured(work: Path) -> dict[str, Callable[[Path], tuple[float, float]]]:
    """Return the measurements by name. The first one, a training, leaves the adapter that the others read."""

    def convert(repo: Path) -> tuple[float, float]:
        shutil.rmtree(work / "converted", ignore_errors=True)
        return run(repo, work, "convert --input_path run/lora_adapters --output_path converted --to original")

    return {
        "train, to the end of step 1": lambda repo: to_first_step(repo, work, 1),
        "train, on two ranks": lambda repo: to_first_step(repo, work, 2),
        f"prepare --check_only, {NUM_SAMPLES} samples": lambda repo: run(
            repo, work, "prepare --check_only --train_manifest manifest.jsonl"
        ),
        "find_lora_adapters": lambda repo: run(repo, work, "find_lora_adapters ."),
        "validate_adapter": lambda repo: run(repo, work, "validate_adapter run/lora_adapters"),
        "convert, an adapter": convert,
    }


def main(old: Path, new: Path, rounds: int = 5) -> None:
    print(f"{'':<34}{'old':>8}{'new':>8}{'ratio':>8}   {'old':>8}{'new':>8}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        works = {repo: Path(folder) / side for repo, side in ((old, "old"), (new, "new"))}
        for work in works.values():
            work.mkdir()
            write_manifest(work / "manifest.jsonl", new / "samples")
        measurements = {repo: measured(work) for repo, work in works.items()}
        for name in measurements[old]:
            runs: dict[Path, list[tuple[float, float]]] = {old: [], new: []}
            for number in range(rounds + 1):
                for repo in works:
                    result = measurements[repo][name](repo)
                    if number:
                        runs[repo].append(result)
            columns = []
            for values in zip(*(zip(*runs[repo], strict=True) for repo in works), strict=True):
                before, after = map(statistics.median, values)
                columns.append(f"{before:8.2f}{after:8.2f}{after / before:8.2f}")
            print(f"{name:<34}{columns[0]} s {columns[1]} GiB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), *map(int, sys.argv[3:]))
