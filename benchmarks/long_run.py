"""Resident memory and step time over a long run of the random base, with validations and checkpoints in between.

    python benchmarks/long_run.py [--steps 2000] [--json]

Resident memory (VmRSS) is read twenty times a second from outside the process. Every tenth step is logged; its memory
is the highest value read while it was the newest logged step. Steps before --settled are left out, because a run starts
with imports, a first validation and a first checkpoint. Batch lengths vary throughout, as the sample voices do.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from record import parser_of, report

PROJECT = Path(__file__).parent.parent
LOG_STEPS = 10
MIB = 2**20


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--settled", type=int, default=200, help="first step that is evaluated")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peaks, lines = watch(train(Path(folder), args.steps), Path(folder) / "metrics.jsonl")
    settled = {step: peak for step, peak in peaks.items() if step >= args.settled}
    times = [line["step_time_s"] for line in lines if line["step"] >= args.settled and "step_time_s" in line]
    third = len(times) // 3
    result = {
        "steps": args.steps,
        "settled": args.settled,
        "resident_mib": {str(step): round(settled[step]) for step in sorted(settled) if step % (args.steps // 10) == 0},
        "lowest_mib": round(min(settled.values()), 1),
        "highest_mib": round(max(settled.values()), 1),
        "last_over_first_tenth": round(growth(settled), 4),
        "step_time_s": {"first_third": round(statistics.median(times[:third]), 4),
                        "last_third": round(statistics.median(times[-third:]), 4)},
    }  # fmt: skip
    print(f"resident: {result['lowest_mib']} to {result['highest_mib']} MiB from step {args.settled} on")
    print(f"last tenth of the steps / first tenth: {result['last_over_first_tenth']}")
    print(f"step time: {result['step_time_s']}")
    report(args, "long_run", result)


def train(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    options = (
        "--base_ckpt tiny-random-base --train_manifest samples/voices.jsonl --deepspeed ds_configs/zero2.json "
        f"--output_dir {folder} --precision fp32 --batch_size 1 --grad_accum 1 --max_steps {steps} "
        f"--log_steps {LOG_STEPS} --val_steps 250 --save_steps 250 --keep_checkpoints 2"
    )
    command = [sys.executable, "launch/train.py", *options.split()]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL)


def watch(run: subprocess.Popen[bytes], metrics: Path) -> tuple[dict[int, float], list[dict[str, float]]]:
    """Return the highest resident memory in MiB while each step was the newest logged one, by step; and the log."""
    peaks: dict[int, float] = {}
    process, step, size_read = psutil.Process(run.pid), 0, 0
    while run.poll() is None:
        if metrics.is_file() and metrics.stat().st_size != size_read:
            size_read = metrics.stat().st_size
            step = json.loads(metrics.read_text().rpartition("\n")[0].splitlines()[-1])["step"]
        try:
            peaks[step] = max(peaks.get(step, 0), process.memory_info().rss / MIB)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if run.wait():
        raise SystemExit(f"training failed with exit code {run.returncode}")
    return peaks, [json.loads(line) for line in metrics.read_text().splitlines()]


def growth(peaks: dict[int, float]) -> float:
    """Return the median memory of the last tenth of the steps divided by that of the first tenth."""
    in_order = [peaks[step] for step in sorted(peaks)]
    tenth = max(1, len(in_order) // 10)
    return statistics.median(in_order[-tenth:]) / statistics.median(in_order[:tenth])


if __name__ == "__main__":
    main()
