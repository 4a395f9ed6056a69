"""Measure and test everything that needs a GPU, within a number of minutes.

    python benchmarks/gpu.py [--minutes 8] [--parts device step ...] [--dry_run] [--save] [--json]

The parts run one after another, the most useful first, each in its own process. A part begins only if the time that is
left suffices for it, and ends when its own time is over; what was left out is named. Rows are written to the result as
they are measured, so a part that fails or hangs loses neither its earlier rows nor those of the others. Weights are
random, in the geometry of benchmarks/3b. Without a GPU, all parts run in miniature; their figures mean nothing, but
show that the command works. Exit code 1 if a part has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, parser_of, record_of, shown

PARTS_SCRIPT = Path(__file__).with_name("gpu_parts.py")
POLL_S = 0.5
DONE, FAILED, OUT_OF_TIME, NOT_RUN = "done", "failed", "out of time", "not run"


@dataclass(frozen=True)
class Part:
    """A part of the measurement.

    least_s: seconds without which it is not worth starting, on an H200; most_s: after which it is stopped.
    """

    name: str
    what: str
    least_s: float
    most_s: float


# In the order of their worth.
PARTS = (
    Part("device", "the device, the peak of a matrix product, the bandwidth of copies", 10, 30),
    Part("step", "training steps: speed, share of the matmul peak, memory against the plan", 40, 120),
    Part("tests", "tests/gpu: the same losses as on the CPU, DeepSpeed files, encoding, resume", 40, 150),
    Part("trace", "one step, kernel by kernel, with the gaps between them", 20, 40),
    Part("base", "loading a base, in 16 and in 4 bits, and merging into it", 30, 80),
    Part("trainer", "the same step by transformers' Trainer with PEFT", 40, 80),
    Part("encode", "encoding of clips, batched and one by one", 20, 50),
    Part("variants", "chunk sizes, attention kinds, optimizers, other kernels", 20, 60),
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="for everything together")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    parser.add_argument("--dry_run", action="store_true", help="print the schedule, and measure nothing")
    parser.add_argument("--output", type=Path, help="result file (default: a temporary one, or --save's)")
    args = parser.parse_args()
    parts = [part for part in PARTS if args.parts is None or part.name in args.parts]
    if args.dry_run:
        print("\n".join(schedule(parts, 60 * args.minutes)))
        return
    result = run(parts, 60 * args.minutes, output_path(args))
    print("\n".join(summary(result)))
    if args.json:
        print(json.dumps(result))
    sys.exit(any(part["state"] == FAILED for part in result["parts"].values()))


def output_path(args: argparse.Namespace) -> Path:
    if args.save:
        return RESULTS / f"{time.strftime('%Y-%m-%d')}-gpu.json"
    return args.output or Path(tempfile.mkdtemp(prefix="gpu-")) / "gpu.json"


def schedule(parts: Sequence[Part], seconds: float) -> list[str]:
    """Return one line per part: when it begins at the latest, or that its time does not suffice."""
    lines, begins = [], 0.0
    for part in parts:
        fits = begins + part.least_s <= seconds
        when = f"{begins:4.0f} s to {min(begins + part.most_s, seconds):4.0f} s" if fits else "no time left     "
        lines.append(f"{part.name:<10}{when}  {part.what}")
        begins += part.most_s if fits else 0
    return lines


def run(parts: Sequence[Part], seconds: float, output: Path, script: Path = PARTS_SCRIPT) -> dict[str, Any]:
    """Run the parts, and write the result after every row. Returns the content of the result file."""
    until = time.monotonic() + seconds
    record = record_of({"parts": {}})
    with tempfile.TemporaryDirectory(prefix="gpu-parts-") as folder:
        for part in parts:
            left_s = until - time.monotonic()
            if left_s < part.least_s:
                entry = {"state": NOT_RUN, "why": f"{left_s:.0f} s were left, and it needs {part.least_s:.0f} s"}
                record["result"]["parts"][part.name] = entry | {"rows": []}
                continue
            print(f"== {part.name}: {part.what}", flush=True)
            _run_part(part, min(part.most_s, left_s), Path(folder), record, output, script)
        _write(output, record)
    print(f"saved: {output}")
    return record["result"]


def _run_part(part: Part, seconds: float, folder: Path, record: dict[str, Any], output: Path, script: Path) -> None:
    rows, errors = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    rows.touch()
    entry: dict[str, Any] = {"state": "running", "rows": []}
    record["result"]["parts"][part.name] = entry
    command = [sys.executable, str(script), part.name, f"--rows={rows}", f"--folder={folder}", f"--seconds={seconds}"]
    began = time.monotonic()
    with errors.open("wb") as log:
        # In its own session, so that the processes which it has started end with it.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() - began < seconds:
                time.sleep(POLL_S)
                if _take_rows(rows, entry):
                    _write(output, record)
            ended = process.poll()
        finally:
            _end_session(process)
    _take_rows(rows, entry)
    entry["seconds"] = round(time.monotonic() - began, 1)
    if ended == 0:
        entry["state"] = DONE
    elif ended is None:
        entry |= {"state": OUT_OF_TIME, "why": f"stopped after {seconds:.0f} s"}
    else:
        tail = errors.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
        entry |= {"state": FAILED, "why": f"exit code {ended}", "log": tail}
        print("\n".join(tail), file=sys.stderr)
    _write(output, record)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of its processes may have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _take_rows(path: Path, entry: dict[str, Any]) -> bool:
    """Read the complete lines of a part's rows; print the new ones. Returns whether there were any."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    new = [json.loads(line) for line in lines[len(entry["rows"]) :]]
    for row in new:
        print("  " + ", ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
    entry["rows"] += new
    return bool(new)


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def summary(result: dict[str, Any]) -> list[str]:
    """Return one line per part: how it ended, and what it left out."""
    lines = []
    for name, part in result["parts"].items():
        left_out = [row["left_out"] for row in part["rows"] if "left_out" in row]
        why = f": {part['why']}" if "why" in part else ""
        more = f"; left out, for lack of time: {', '.join(left_out)}" if left_out else ""
        lines.append(f"{name:<10}{part['state']}, {len(part['rows']) - len(left_out)} rows{why}{more}")
    return lines


if __name__ == "__main__":
    main()
