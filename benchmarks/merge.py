"""Merge an adapter into its base: this project against what a user would write with transformers and PEFT.

    python benchmarks/merge.py [--repeats 3] [--layers 16] [--folder DIR] [--json]

The base is random, in bf16 and in shards of 256 MiB; the adapter has rank 16 on all targets. Each merge runs in its own
process, and the kinds take turns: this project's with its self-check, without it, and into the dequantized 4-bit base,
for which PEFT has no counterpart; and PEFT's `merge_and_unload` between `from_pretrained` and `save_pretrained`. Timing
starts after the libraries are imported. This project's time ends when the result is on disk; `save_pretrained` does not
wait for that. Memory is the peak resident memory (VmHWM), with libraries and mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from base_in_4bit import GEOMETRY, SHARD_BYTES, peak_gib, write_adapter
from random_base import write_base
from record import parser_of, report
from sides import child

OURS, UNVERIFIED, DEQUANTIZED, PEFT = "ours", "ours_unverified", "ours_dequantized", "peft"
PARTS = (OURS, UNVERIFIED, DEQUANTIZED, PEFT)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="number of merges of each kind")
    parser.add_argument("--layers", type=int, default=GEOMETRY["num_hidden_layers"], help="use fewer for a quick try")
    parser.add_argument("--folder", type=Path, help="folder to write 11 GiB to (default: a temporary one)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the merge that a child process runs
    args = parser.parse_args()
    if args.part:
        print(json.dumps(run_part(args.part, args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = compare(Path(folder), args.layers, args.repeats)
    for name, value in result.items():
        print(f"{name:<30}{value:>12.4g}" if isinstance(value, float) else f"{name:<30}{value:>12}")
    report(args, "merge", result)


def compare(folder: Path, layers: int, repeats: int) -> dict[str, Any]:
    """Return medians over the repeats, their ratios, and the difference between the two results."""
    base = write_base(folder / "base", GEOMETRY | {"num_hidden_layers": layers}, "bf16", SHARD_BYTES)
    result: dict[str, Any] = {"layers": layers, "repeats": repeats, **base}
    write_adapter(folder / "base", folder / "adapter", load_in_4bit=False)
    runs = [{part: fresh(part, folder) for part in PARTS} for _ in range(repeats)]
    for part in PARTS:
        for name in ("seconds", "peak_gib", "libraries_gib"):
            result[f"{part}_{name}"] = statistics.median(run[part][name] for run in runs)
    for suffix, part in (("", OURS), ("_unverified", UNVERIFIED)):
        result[f"time_ratio{suffix}"] = statistics.median(run[PEFT]["seconds"] / run[part]["seconds"] for run in runs)
        result[f"memory_ratio{suffix}"] = statistics.median(
            run[part]["peak_gib"] / run[PEFT]["peak_gib"] for run in runs
        )
    return result | differences(folder / OURS, folder / PEFT)


def fresh(part: str, folder: Path) -> dict[str, float]:
    """Run one merge after everything that earlier ones wrote has reached the disk."""
    shutil.rmtree(folder / part, ignore_errors=True)
    os.sync()
    return child(__file__, [f"--part={part}", f"--folder={folder}"])


def run_part(part: str, folder: Path) -> dict[str, float]:
    """Run one merge in this process; return its time and memory."""
    work = with_peft(folder) if part == PEFT else with_ours(part, folder)
    result = {"libraries_gib": peak_gib()}
    started = time.perf_counter()
    work()
    return result | {"seconds": time.perf_counter() - started, "peak_gib": peak_gib()}


def with_ours(part: str, folder: Path) -> Callable[[], object]:
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    from higgs_ds.adapters.merge import merge
    from higgs_ds.options.fields import MERGE_DEQUANTIZED

    merge_base = MERGE_DEQUANTIZED if part == DEQUANTIZED else None
    return lambda: merge(
        folder / "base", folder / "adapter", folder / part, merge_base, verify=part in (OURS, DEQUANTIZED)
    )


def with_peft(folder: Path) -> Callable[[], object]:
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    import torch
    from peft import PeftModel
    from transformers import HiggsAudioV2ForConditionalGeneration

    def work() -> None:
        base = HiggsAudioV2ForConditionalGeneration.from_pretrained(
            folder / "base",
            dtype=torch.bfloat16,
            use_text_head=True,  # without it, the text head is not loaded and is lost
        )
        PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder / PEFT)

    return work


def differences(ours: Path, theirs: Path) -> dict[str, Any]:
    """Compare all tensors of two models, one pair at a time."""
    from higgs_ds.common.tensor_files import read_tensor, weight_locations

    places, their_places = weight_locations(ours), weight_locations(theirs)
    if places.keys() != their_places.keys():
        raise SystemExit(f"tensors in only one of the results: {sorted(places.keys() ^ their_places.keys())[:3]}")
    numbers = differing = 0
    largest = 0.0
    for name, place in places.items():
        a, b = read_tensor(place, name), read_tensor(their_places[name], name)
        if a.dtype != b.dtype or a.shape != b.shape:
            raise SystemExit(f"{name}: {a.dtype} {tuple(a.shape)} here, {b.dtype} {tuple(b.shape)} in PEFT's")
        difference = (a.float() - b.float()).abs()
        numbers, differing = numbers + a.numel(), differing + int(difference.count_nonzero())
        largest = max(largest, float(difference.max()))
    return {
        "tensors": len(places),
        "largest_difference": largest,
        "share_differing": differing / numbers,
    }


if __name__ == "__main__":
    main()
