"""How the time and memory of a step grow with length, batch, vocabulary, ranks, precision and recomputation.

    python benchmarks/step_grid.py --vocabs 32000 256000 --precisions fp32 [--json]
    python benchmarks/step_grid.py --base_ckpt benchmarks/3b --lengths 512 2048 --batches 1 8 \
      --precisions bf16 nf4 --checkpointing none every_layer [--trainer] [--json]

Every combination of the given values runs in its own process (one process per rank). It reports tokens per second, peak
memory above the weights, and the operations that the step needs as a share of the measured peak of a matmul. Gradients
of frozen weights are not needed, and recomputation is not counted. Weights are random; with `--base_ckpt`, the geometry
is that of its config.json. All but 64 positions of each sample are audio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import random_base
import sides
from record import parser_of, report
from sides import OURS, TRAINER

NUM_TEXT = 60  # positions before the audio; 63 with audio begin, audio end and turn end
PRECISIONS = {"fp32": ("fp32", False), "bf16": ("bf16", False), "nf4": ("bf16", True), "nf4-fp32": ("fp32", True)}
AXES = ("length", "batch", "vocab", "precision", "checkpointing", "ranks", "side")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--base_ckpt", type=Path, help="folder whose config.json has the geometry to use")
    parser.add_argument("--name", default="grid", help="name of the result file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--batches", type=int, nargs="+", default=[2])
    parser.add_argument("--vocabs", type=int, nargs="+", help="default: that of the geometry")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--checkpointing", nargs="+", choices=("none", "every_layer"), default=["none"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--trainer", action="store_true", help="also transformers' Trainer, on one rank")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each run that are not timed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    sides.add_geometry(parser)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # where a child process finds the base
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)  # the combination that a child process runs
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
    """Return one row per cell; each is printed as soon as it is measured."""
    rows = []
    kinds = {PRECISIONS[precision][0] for precision in args.precisions}
    peaks = {kind: sides.matmul_peak(kind, 8192 if has_gpu() else 1024) for kind in kinds}
    print(" ".join(f"{axis:>13}" for axis in AXES), f"{'tokens/s':>10} {'peak MiB':>10} {'of matmul':>10}")
    vocabs = args.vocabs or [values["vocab_size"]]
    for vocab, precision in itertools.product(vocabs, args.precisions):
        base_values = values | {"vocab_size": vocab}
        with tempfile.TemporaryDirectory() as folder:
            random_base.write_base(Path(folder), base_values, PRECISIONS[precision][0])
            for length, batch, checkpointing, ranks, side in itertools.product(
                args.lengths, args.batches, args.checkpointing, args.ranks, (OURS, TRAINER) if args.trainer else (OURS,)
            ):
                if side == TRAINER and ranks > 1:
                    continue
                cell = dict(zip(AXES, (length, batch, vocab, precision, checkpointing, ranks, side), strict=True))
                row = cell | run(args, cell, folder)
                per_s = operations(base_values, length, batch) * ranks / row["step_s"]
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
    """Return step time and peak memory of one cell; on CPUs in two runs, because recording memory takes time."""
    options = [f"--cell={json.dumps(cell)}", f"--folder={folder}"]
    timed = [*options, f"--warmup={args.warmup}", f"--steps={args.steps}"]
    result = sides.child(__file__, timed, cell["ranks"])
    if not has_gpu():
        with_memory = sides.child(__file__, [*options, "--memory", "--warmup=0", "--steps=2"], cell["ranks"])
        result["peak_mib"] = with_memory["peak_mib"]
    return result


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run_cell(args: argparse.Namespace) -> dict[str, float]:
    """Return what rank 0 measured; an empty dict on the other ranks."""
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    from higgs_ds.common import distributed
    from higgs_ds.common.process import run_ranks

    meter = sides.Meter(args.memory, args.warmup)
    if args.cell["side"] == TRAINER:
        _train_with_trainer(args, meter)
        return meter.read()
    ranks: list[int] = []

    def train() -> None:
        ranks.append(distributed.rank())
        _train_ours(args, meter)

    run_ranks(train)
    result = meter.read()  # on every rank: leaving torch's profiler running crashes the process at its end
    return result if ranks == [0] else {}


def samples(cell: dict[str, Any]) -> list[Any]:
    frames = cell["length"] - NUM_TEXT - 3 - (random_base.NUM_CODEBOOKS + 1)
    return [sides.speech(NUM_TEXT, frames, seed) for seed in range(cell["batch"])]


def _train_ours(args: argparse.Namespace, meter: sides.Meter) -> None:
    from higgs_ds.data.collate import collate

    cell = args.cell
    precision, four_bit = PRECISIONS[cell["precision"]]
    every = 1 if cell["checkpointing"] == "every_layer" else None
    engine = sides.our_engine(args.folder, precision, four_bit, every, cell["batch"], meter)
    batch = collate(samples(cell), sides.stream(), random_base.PAD_ID)
    for _ in range(args.warmup + args.steps):
        meter.step_begins()
        engine.train_step([batch])
        meter.step_ends()


def _train_with_trainer(args: argparse.Namespace, meter: sides.Meter) -> None:
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
    """Return the floating-point operations that one step needs; a multiplication and an addition count as two.

    Frozen weights: the output and the gradient of the input. Adapter weights: also their own gradient. Attention: the
    lower triangle, with twice as much backward as forward. Heads: only positions with targets; the last layer's FFNs:
    only positions that predict.
    """
    hidden, ffn, layers = values["hidden_size"], values["intermediate_size"], values["num_hidden_layers"]
    heads, kv, dim = values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"]
    shapes = [(hidden, heads * dim), (hidden, kv * dim), (hidden, kv * dim), (heads * dim, hidden)]
    of_ffn = [(hidden, ffn), (hidden, ffn), (ffn, hidden)]  # the one FFN that a position passes through

    def of_linears(shapes: list[tuple[int, int]]) -> float:
        return sum(2 * 2 * a * b + 3 * 2 * sides.LORA_R * (a + b) for a, b in shapes)

    attention = length / 2 * 2 * heads * dim  # per position: half of the keys, for scores and values
    decoder = layers * (of_linears(shapes + of_ffn) + 3 * 2 * attention)
    not_predicting = (NUM_TEXT + 1) * of_linears(of_ffn)  # all but two of the text, and no audio
    codes = random_base.NUM_CODEBOOKS * random_base.CODEBOOK_SIZE
    targets = 3 * values["vocab_size"] + (length - NUM_TEXT - 4) * codes  # the first row of codes has no targets
    first_inputs = sum(hidden * (out + sides.LORA_R) for _, out in shapes[:3])  # layer 0's input needs no gradient
    return batch * (length * (decoder - 2 * first_inputs) - not_predicting + 2 * 2 * hidden * targets)


if __name__ == "__main__":
    main()
