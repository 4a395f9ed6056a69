"""One training step: this project against what a user would write with transformers' Trainer and PEFT.

    python benchmarks/train_step.py [--precision bf16|fp32] [--load_in_4bit] [--pairs 3] [--steps 3] [--json]

The Trainer trains the native model. Both sides have the same random weights, LoRA (rank 16 on all targets), data (2
samples of 512 positions, 300 frames of audio each) and batch. They take turns, each in its own process: `--warmup`
steps, then `--steps` timed ones. Memory is the peak of torch's allocations after the weights are loaded, with engine
and optimizer, in runs of two steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import random_base
import sides
from record import parser_of, report
from sides import OURS, TRAINER

BATCH_SIZE, LENGTH, NUM_FRAMES = 2, 512, 300
MEASURES = ("speed", "memory")
# Suffix of the result's keys, and whether layers are recomputed.
RECOMPUTE = {"none": ("", False), "every_layer": ("_checkpointing", True)}
GEOMETRY = ("hidden", "layers", "vocab")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 on both sides")
    parser.add_argument("--pairs", type=int, default=3, help="number of runs of each side")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument(
        "--recompute", nargs="+", choices=RECOMPUTE, default=list(RECOMPUTE), help="layers to recompute, on both sides"
    )
    parser.add_argument("--warmup", type=int, default=2, help="steps of each run that are not timed")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run")
    sides.add_geometry(parser)
    parser.add_argument("--part", choices=(OURS, TRAINER), help=argparse.SUPPRESS)  # the side that a child process runs
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps({OURS: run_ours, TRAINER: run_trainer}[args.part](args)))
        return
    result = compare(args)
    for name, value in result.items():
        print(f"{name:<36}{value:>12.3f}" if isinstance(value, float) else f"{name:<36}{value!s:>12}")
    only = "".join(f"-{name}" for name in args.measure + args.recompute if len(args.measure + args.recompute) < 4)
    report(args, f"train_step-{'nf4-' * args.load_in_4bit}{args.precision}{only}", result)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Return speeds (medians over pairs), memory and their ratios, without and with recomputation."""
    result: dict[str, Any] = {
        name: getattr(args, name) for name in ("precision", "load_in_4bit", "hidden", "layers", "vocab")
    }
    variants = [RECOMPUTE[name] for name in args.recompute]
    for suffix, checkpointing in variants if "speed" in args.measure else []:
        pairs = [[child(part, args, checkpointing)["step_s"] for part in (OURS, TRAINER)] for _ in range(args.pairs)]
        result[f"step_s_of_pairs{suffix}"] = pairs
        for i, part in enumerate((OURS, TRAINER)):
            step_s = statistics.median(pair[i] for pair in pairs)
            result[f"{part}_tokens_per_s{suffix}"] = BATCH_SIZE * LENGTH / step_s
            result[f"{part}_samples_per_s{suffix}"] = BATCH_SIZE / step_s
        result[f"speed_ratio{suffix}"] = statistics.median(theirs / ours for ours, theirs in pairs)
    for suffix, checkpointing in variants if "memory" in args.measure else []:
        ours, theirs = (child(part, args, checkpointing, memory=True)["peak_mib"] for part in (OURS, TRAINER))
        result |= {f"{OURS}_peak_mib{suffix}": ours, f"{TRAINER}_peak_mib{suffix}": theirs}
        result[f"memory_ratio{suffix}"] = ours / theirs
    return result


def child(part: str, args: argparse.Namespace, checkpointing: bool, memory: bool = False) -> dict[str, float]:
    options = [f"--part={part}", *(f"--{name}={getattr(args, name)}" for name in ("precision", *GEOMETRY))]
    options += ["--load_in_4bit"] * args.load_in_4bit + ["--checkpointing"] * checkpointing + ["--memory"] * memory
    warmup, steps = (0, 2) if memory else (args.warmup, args.steps)
    return sides.child(__file__, [*options, f"--warmup={warmup}", f"--steps={steps}"])


def samples() -> list[Any]:
    """Return two samples of speech."""
    num_text = LENGTH - sides.stream().num_rows(NUM_FRAMES) - 3
    return [sides.speech(num_text, NUM_FRAMES, seed) for seed in range(BATCH_SIZE)]


def run_ours(args: argparse.Namespace) -> dict[str, float]:
    """Run this project's engine in one process."""
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    from higgs_ds.common.process import run_ranks

    meter = sides.Meter(args.memory, args.warmup)
    run_ranks(lambda: _train_ours(args, meter))
    return meter.read()


def _train_ours(args: argparse.Namespace, meter: sides.Meter) -> None:
    from higgs_ds.data.collate import collate

    with tempfile.TemporaryDirectory() as folder:
        random_base.write_base(Path(folder), sides.geometry(args), args.precision)
        every = 1 if args.checkpointing else None
        engine = sides.our_engine(Path(folder), args.precision, args.load_in_4bit, every, BATCH_SIZE, meter)
        for _ in range(args.warmup + args.steps):
            meter.step_begins()
            engine.train_step([collate(samples(), sides.stream(), random_base.PAD_ID)])
            meter.step_ends()


def run_trainer(args: argparse.Namespace) -> dict[str, float]:
    meter = sides.Meter(args.memory, args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        random_base.write_base(Path(folder) / "base", sides.geometry(args), args.precision)
        max_steps = args.warmup + args.steps
        trainer = sides.native_trainer(
            Path(folder) / "base", Path(folder), args.precision, args.load_in_4bit, args.checkpointing, meter,
            per_device_train_batch_size=BATCH_SIZE, max_steps=max_steps,
            train_dataset=[sides.native_sample(sample) for sample in samples()] * max_steps,
        )  # fmt: skip
        trainer.train()
    return meter.read()


if __name__ == "__main__":
    main()
