"""One epoch over clips of many lengths: this project against transformers' Trainer and PEFT on the native model.

    python benchmarks/epoch.py [--precision bf16|fp32] [--clips 64] [--batch_size 4] [--pairs 3] [--json]

Clip lengths are those of speech: log-normal, median 5 s, sigma 0.6, from 1 to 20 s. The text before each clip has 40
tokens plus 4 per second of audio. Codes are cached for both sides. This project sorts by length and prepares batches
ahead, as launch/train.py does; the Trainer shuffles and pads, as by default. The time is measured from the start of the
first step to the end of the last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import random_base
import sides
from record import parser_of, report
from sides import OURS, TRAINER

FRAMES_PER_S = 25


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3, help="number of runs of each side")
    sides.add_geometry(parser)
    parser.add_argument("--part", choices=(OURS, TRAINER), help=argparse.SUPPRESS)  # the side that a child process runs
    args = parser.parse_args()
    if args.part:
        print(json.dumps({"epoch_s": {OURS: run_ours, TRAINER: run_trainer}[args.part](args)}))
        return
    names = ("precision", "clips", "batch_size", "hidden", "layers", "vocab")
    options = [f"--{name}={getattr(args, name)}" for name in names]
    pairs = [
        [sides.child(__file__, [f"--part={part}", *options])["epoch_s"] for part in (OURS, TRAINER)]
        for _ in range(args.pairs)
    ]
    result: dict[str, Any] = {name: getattr(args, name) for name in names}
    result["audio_s"] = float(seconds(args.clips).sum())
    for i, part in enumerate((OURS, TRAINER)):
        result[f"{part}_epoch_s"] = statistics.median(pair[i] for pair in pairs)
        result[f"{part}_samples_per_s"] = args.clips / result[f"{part}_epoch_s"]
    result["speed_ratio"] = statistics.median(theirs / ours for ours, theirs in pairs)
    for name, value in result.items():
        print(f"{name:<24}{value:>12.3f}" if isinstance(value, float) else f"{name:<24}{value!s:>12}")
    report(args, f"epoch-{args.precision}", result)


def seconds(clips: int) -> np.ndarray:
    """Return the lengths of the clips in seconds."""
    return np.random.default_rng(0).lognormal(np.log(5), 0.6, clips).clip(1, 20)


def samples(clips: int) -> list[Any]:
    lengths = seconds(clips)
    return [sides.speech(int(40 + 4 * s), int(np.ceil(FRAMES_PER_S * s)), i) for i, s in enumerate(lengths)]


def run_ours(args: argparse.Namespace) -> float:
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    from higgs_ds.common.process import run_ranks

    times: list[float] = []
    run_ranks(lambda: times.append(_train_ours(args)))
    return times[0]


def _train_ours(args: argparse.Namespace) -> float:
    from higgs_ds.data.collate import collate
    from higgs_ds.data.prefetch import prefetched
    from higgs_ds.data.sampler import Window, WindowSampler
    from higgs_ds.options.optim import OptimOptions

    encoded = samples(args.clips)
    lengths = [len(sample.prompt.input_ids) for sample in encoded]
    sampler = WindowSampler(lengths, args.batch_size, 1, 0, 1, seed=0, bucket_size=OptimOptions().bucket_size)

    def batches(window: Window) -> list[Any]:
        return [
            collate([encoded[i] for i in batch], sides.stream(), random_base.PAD_ID) for batch in window.micro_batches
        ]

    with tempfile.TemporaryDirectory() as folder:
        random_base.write_base(Path(folder), sides.geometry(args), args.precision)
        engine = sides.our_engine(Path(folder), args.precision, False, None, args.batch_size, sides.Meter(False, 0))
        started = time.perf_counter()
        for _, micro_batches in prefetched(sampler.windows(0, sampler.num_steps(1)), batches):
            engine.train_step(micro_batches)
        return time.perf_counter() - started


def run_trainer(args: argparse.Namespace) -> float:
    meter = Steps()
    with tempfile.TemporaryDirectory() as folder:
        random_base.write_base(Path(folder) / "base", sides.geometry(args), args.precision)
        trainer = sides.native_trainer(
            Path(folder) / "base", Path(folder), args.precision, False, False, meter,
            per_device_train_batch_size=args.batch_size, num_train_epochs=1,
            train_dataset=[sides.native_sample(sample) for sample in samples(args.clips)],
        )  # fmt: skip
        trainer.train()
    return meter.last_end - meter.first_begin


class Steps(sides.Meter):
    """Record when the first step starts and when the last one ends."""

    def __init__(self) -> None:
        super().__init__(memory=False, warmup=0)
        self.first_begin = self.last_end = 0.0

    def step_begins(self) -> None:
        self.first_begin = self.first_begin or time.perf_counter()

    def step_ends(self) -> None:
        self.last_end = time.perf_counter()


if __name__ == "__main__":
    main()
