"""Time and memory of a training step in two checkouts: python benchmarks/two_commits.py OLD NEW [--pairs 9] [--json].

Every cell is a precision, a LoRA dropout, recomputed layers or not, a length, a batch size and a vocabulary, at the
geometry of benchmarks/train_step.py. Both checkouts run at once, each in its own process and with its own benchmark
code, and take turns step by step: a machine that slows down slows down both. Memory is the peak of torch's allocations
above the weights, in separate runs. Ratios are NEW / OLD; that of speed is the median over the pairs of steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CELL = {
    "precision": "fp32", "four_bit": False, "dropout": 0.05, "recompute": False, "length": 512, "batch": 2,
    "vocab": 128256,
}  # fmt: skip
NUM_TEXT = 204  # text positions of a sample, as in benchmarks/train_step.py
MAIN_CELLS = [
    {}, {"dropout": 0.0}, {"recompute": True}, {"precision": "bf16"}, {"precision": "bf16", "dropout": 0.0},
    {"precision": "bf16", "recompute": True}, {"four_bit": True}, {"precision": "bf16", "four_bit": True},
]  # fmt: skip
GRID_CELLS = [
    {"length": 256, "batch": 1}, {"length": 1024, "batch": 1}, {"length": 2048, "batch": 1}, {"batch": 1},
    {"batch": 8}, {"vocab": 32000}, {"vocab": 256000}, {"length": 2048, "batch": 1, "precision": "bf16"},
    {"length": 256, "batch": 1, "precision": "bf16"}, {"length": 256, "batch": 1, "four_bit": True},
    {"batch": 8, "precision": "bf16", "dropout": 0.0},
]  # fmt: skip
CELLS = {"main": MAIN_CELLS, "grid": GRID_CELLS}


def main() -> None:
    from record import parser_of, report

    parser = parser_of(__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--pairs", type=int, default=9, help="number of pairs of timed steps")
    parser.add_argument("--cells", choices=CELLS, nargs="+", default=list(CELLS))
    parser.add_argument("--measure", choices=("speed", "memory"), nargs="+", default=["speed", "memory"])
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)  # what a child process runs, in `new`
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        serve(args.new, args.cell, args.memory)
        return
    rows = []
    for changes in [cell for name in args.cells for cell in CELLS[name]]:
        row: dict[str, Any] = CELL | changes
        if "memory" in args.measure:
            row |= compare_memory(args, CELL | changes)
        if "speed" in args.measure:
            row |= compare_speed(args, CELL | changes)
        print(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        rows.append(row)
    report(args, "two_commits", {"rows": rows})


def compare_speed(args: argparse.Namespace, cell: dict[str, Any]) -> dict[str, float]:
    """Return the median step times, and the median of their ratios."""
    sides = [Child(repo, cell) for repo in (args.old, args.new)]
    for side in sides * 2:
        side.run()  # not timed
    pairs = [[side.run() for side in sides] for _ in range(args.pairs)]
    for side in sides:
        side.end()
    old, new = zip(*pairs, strict=True)
    ratio = statistics.median(b / a for a, b in pairs)
    return {"old_s": statistics.median(old), "new_s": statistics.median(new), "speed_ratio": ratio}


def compare_memory(args: argparse.Namespace, cell: dict[str, Any]) -> dict[str, float]:
    """Return the peaks above the weights in MiB, and their ratio."""
    peaks = []
    for repo in (args.old, args.new):
        side = Child(repo, cell, memory=True)
        side.run()
        side.run()  # the optimizer's state exists from the first step on
        peaks.append(side.end())
    return {"old_mib": peaks[0], "new_mib": peaks[1], "memory_ratio": peaks[1] / peaks[0]}


class Child:
    """A process that trains in a checkout, one step at a time."""

    def __init__(self, repo: Path, cell: dict[str, Any], memory: bool = False) -> None:
        options = ["--cell", json.dumps(cell), *["--memory"] * memory]
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(repo), str(repo), *options], text=True, bufsize=1, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self) -> float:
        """Run one step, and return its seconds."""
        return self._ask("step")

    def end(self) -> float:
        """End the process, and return its peak in MiB, or 0 if that was not measured."""
        peak = self._ask("end")
        self.process.wait()
        return peak

    def _ask(self, request: str) -> float:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{request}\n")
        for line in self.process.stdout:
            if line.startswith("answer "):
                return float(line.removeprefix("answer "))
        sys.exit(f"{self.process.args}: failed")


def serve(repo: Path, cell: dict[str, Any], memory: bool) -> None:
    """Run a step for each line of standard input but "end", with the modules of a checkout."""
    sys.path[:0] = [str(repo), str(repo / "benchmarks")]
    import peft

    add_adapters = peft.get_peft_model

    def with_dropout(model: Any, config: Any, **options: Any) -> Any:
        config.lora_dropout = cell["dropout"]  # the benchmarks of some checkouts have no option for it
        return add_adapters(model, config, **options)

    peft.get_peft_model = with_dropout
    if importlib.util.find_spec("higgs_ds.common"):
        from higgs_ds.common.process import run_ranks

        run_ranks(lambda: _serve(cell, memory))
    else:
        _serve(cell, memory)


def _serve(cell: dict[str, Any], memory: bool) -> None:
    import sides
    import train_step

    from higgs_ds.data.collate import collate

    bases = importlib.import_module("random_base") if importlib.util.find_spec("random_base") else sides
    train_step.BATCH_SIZE, train_step.LENGTH = cell["batch"], cell["length"]
    train_step.NUM_FRAMES = cell["length"] - NUM_TEXT - bases.NUM_CODEBOOKS
    meter = sides.Meter(memory, 0)
    geometry = sides.geometry(argparse.Namespace(hidden=512, layers=8, vocab=cell["vocab"]))
    with tempfile.TemporaryDirectory() as folder:
        bases.write_base(Path(folder), geometry, cell["precision"])
        every = 1 if cell["recompute"] else None
        engine = sides.our_engine(Path(folder), cell["precision"], cell["four_bit"], every, cell["batch"], meter)
        batch = collate(train_step.samples(), sides.stream(), bases.PAD_ID)
        for line in sys.stdin:
            started = time.perf_counter()
            if line.strip() == "end":
                break
            engine.train_step([batch])
            print(f"answer {time.perf_counter() - started}", flush=True)
    print(f"answer {meter.read().get('peak_mib', 0)}", flush=True)


if __name__ == "__main__":
    main()
