"""How a step grows with length, batch, vocabulary, ranks, precision and recomputation.

    python benchmarks/step_grid.py --vocabs 32000 256000 --precisions fp32 [--json]
    python benchmarks/step_grid.py --base_ckpt benchmarks/3b --lengths 512 2048 --batches 1 8 \
      --precisions bf16 nf4 --checkpointing none every_layer [--trainer] [--json]

Every combination of what is given runs in a process of its own (a process for each rank): tokens a second, peak memory
above the weights, and the share of the measured peak of a matmul that the step's needed operations come to. A frozen
weight needs none for its gradient, and operations of recomputed layers are not counted. Weights are random, in the
geometry of `--base_ckpt`'s config.json where it is given. All but 64 positions of each sample are audio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import sides
from record import parser_of, report
from sides import OURS, TRAINER

NUM_TEXT = 60  # positions in front of the audio; with its begin, its end and the turn's, 63
PRECISIONS = {"fp32": ("fp32", False), "bf16": ("bf16", False), "nf4": ("bf16", True), "nf4-fp32": ("fp32", True)}
AXES = ("length", "batch", "vocab", "precision", "checkpointing", "ranks", "side")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--base_ckpt", type=Path, help="a folder with the config.json of the geometry to take")
    parser.add_argument("--name", default="grid", help="name of the result's file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--batches", type=int, nargs="+", default=[2])
    parser.add_argument("--vocabs", type=int, nargs="+", help="default: the geometry's own")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--checkpointing", nargs="+", choices=("none", "every_layer"), default=["none"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--trainer", action="store_true", help="also transformers' Trainer, on one rank")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each run that are not timed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    sides.add_geometry(parser)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # where a child process finds the base
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)  # what it is to do
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        result = run_cell(args)
        if result:
            print(json.dumps(result))
        return
    values = sides.geometry(args)
    if args.base_ckpt:
        values = json.loads((args.base_ckpt / "config.json").read_text(encoding="utf-8"))
    report(args, args.name, {"geometry": values, "cells": measure(args, values)})


def measure(args: argparse.Namespace, values: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each cell, printed as it comes."""
    rows = []
    kinds = {PRECISIONS[precision][0] for precision in args.precisions}
    peaks = {kind: sides.matmul_peak(kind, 8192 if has_gpu() else 1024) for kind in kinds}
    print(" ".join(f"{axis:>13}" for axis in AXES), f"{'tokens/s':>10} {'peak MiB':>10} {'of matmul':>10}")
    vocabs = args.vocabs or [values["vocab_size"]]
    for vocab, precision in itertools.product(vocabs, args.precisions):
        of_base = values | {"vocab_size": vocab}
        with tempfile.TemporaryDirectory() as folder:
            sides.write_base(Path(folder), of_base, PRECISIONS[precision][0])
            for length, batch, checkpointing, ranks, side in itertools.product(
                args.lengths, args.batches, args.checkpointing, args.ranks, (OURS, TRAINER) if args.trainer else (OURS,)
            ):
                if side == TRAINER and ranks > 1:
                    continue
                cell = dict(zip(AXES, (length, batch, vocab, precision, checkpointing, ranks, side), strict=True))
                row = cell | run(args, cell, folder)
                per_s = operations(of_base, length, batch) * ranks / row["step_s"]
                row["matmul_share"] = per_s / peaks[PRECISIONS[precision][0]]
                row["tokens_per_s"] = length * batch * ranks / row["step_s"]
                print(
                    " ".join(f"{row[axis]:>13}" for axis in AXES),
                    f"{row['tokens_per_s']:>10.0f} {row['peak_mib']:>10.0f} {row['matmul_share']:>10.1%}",
                    flush=True,
                )
                rows.append(row)
    return rows


def run(args: argparse.Namespace, cell: dict[str, Any], folder: str) -> dict[str, float]:
    """Seconds of a step and peak memory of one cell; on CPUs in two runs, as counting takes time."""
    options = [f"--cell={json.dumps(cell)}", f"--folder={folder}"]
    timed = [*options, f"--warmup={args.warmup}", f"--steps={args.steps}"]
    result = sides.child(__file__, timed, cell["ranks"])
    if not has_gpu():
        counted = sides.child(__file__, [*options, "--memory", "--warmup=0", "--steps=2"], cell["ranks"])
        result["peak_mib"] = counted["peak_mib"]
    return result


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_cell(args: argparse.Namespace) -> dict[str, float]:
    """What the first rank has measured; nothing on the others."""
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    from higgs_ds.common import distributed

    meter = sides.Meter(args.memory, args.warmup)
    if args.cell["side"] == TRAINER:
        _trainer(args, meter)
        return meter.read()
    ranks: list[int] = []

    def train() -> None:
        ranks.append(distributed.rank())
        _ours(args, meter)

    distributed.run_ranks(train)
    result = meter.read()  # on every rank: torch's profiler ends badly where it is left running
    return result if ranks == [0] else {}


def samples(cell: dict[str, Any]) -> list[Any]:
    frames = cell["length"] - NUM_TEXT - 3 - (sides.NUM_CODEBOOKS + 1)
    return [sides.speech(NUM_TEXT, frames, seed) for seed in range(cell["batch"])]


def _ours(args: argparse.Namespace, meter: sides.Meter) -> None:
    from higgs_ds.data.collate import collate

    cell = args.cell
    precision, four_bit = PRECISIONS[cell["precision"]]
    every = 1 if cell["checkpointing"] == "every_layer" else None
    engine = sides.our_engine(args.folder, precision, four_bit, every, cell["batch"], meter)
    batch = collate(samples(cell), sides.stream(), sides.PAD_ID)
    for _ in range(args.warmup + args.steps):
        meter.step_begins()
        engine.train_step([batch])
        meter.step_ends()


def _trainer(args: argparse.Namespace, meter: sides.Meter) -> None:
    cell = args.cell
    precision, four_bit = PRECISIONS[cell["precision"]]
    max_steps = args.warmup + args.steps
    with tempfile.TemporaryDirectory() as output:
        sides.native_trainer(
            args.folder, Path(output), precision, four_bit, cell["checkpointing"] == "every_layer", meter,
            per_device_train_batch_size=cell["batch"], max_steps=max_steps,
            train_dataset=[sides.native_sample(sample) for sample in samples(cell)] * max_steps,
        ).train()  # fmt: skip


def operations(values: dict[str, Any], length: int, batch: int) -> float:
    """Floating point operations that one step needs, a multiplication and an addition being two.

    Of each frozen weight: the output, and the gradient of the input. Of an adapter's: its own gradient, too. Of
    attention: the lower triangle, twice as much backward as forward. Of the heads: only at positions with targets.
    """
    hidden, ffn, layers = values["hidden_size"], values["intermediate_size"], values["num_hidden_layers"]
    heads, kv, dim = values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"]
    shapes = [(hidden, heads * dim), (hidden, kv * dim), (hidden, kv * dim), (heads * dim, hidden)]
    shapes += [(hidden, ffn), (hidden, ffn), (ffn, hidden)]  # of the one FFN that a position runs through
    frozen = sum(a * b for a, b in shapes)
    lora = sum(sides.LORA_R * (a + b) for a, b in shapes)
    attention = length / 2 * 2 * heads * dim  # of a position: half the keys, scores and values
    decoder = layers * (2 * 2 * frozen + 3 * 2 * lora + 3 * 2 * attention)
    codes = sides.NUM_CODEBOOKS * sides.CODEBOOK_SIZE
    targets = 3 * values["vocab_size"] + (length - NUM_TEXT - 4) * codes  # none for the first row of codes
    embedded = sum(hidden * (out + sides.LORA_R) for _, out in shapes[:3])  # what comes in first wants no gradient
    return batch * (length * (decoder - 2 * embedded) + 2 * 2 * hidden * targets)


if __name__ == "__main__":
    main()
