"""Peak memory of loading a base in 4 bits and of merging an adapter into it: python benchmarks/base_in_4bit.py [--json]

Writes a random base of 2 GiB in shards of 256 MiB and an adapter on all targets. Each part then runs in its own
process, whose peak resident memory is read from the operating system (VmHWM, mapped files included).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_base import write_base
from record import parser_of, report
from sides import child

PARTS = ("libraries", "load", "merge", "merge_original", "merge_unverified")
GEOMETRY = {
    "vocab_size": 128256,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
SHARD_BYTES = 256 * 2**20


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, help="folder to write 9 GiB to (default: a temporary one)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the part that a child process runs
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.folder)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure(Path(folder))
    print(f"base: {results['base_gib']:.2f} GiB in {results['shards']} files, {results['nf4_gib']:.2f} GiB in 4 bits")
    for part in PARTS:
        print(f"{part:17s} peak {results[part]['peak_gib']:.3f} GiB  {results[part]['seconds']:6.1f} s")
    report(args, "base_in_4bit", results)


def measure(folder: Path) -> dict[str, Any]:
    """Return the sizes in GiB, and the peak memory and time of each part."""
    results: dict[str, Any] = write_base(folder / "base", GEOMETRY, "bf16", SHARD_BYTES)
    write_adapter(folder / "base", folder / "adapter")
    for part in PARTS:
        results[part] = child(__file__, [f"--part={part}", f"--folder={folder}"])
    results["nf4_gib"] = results["load"]["model_gib"]
    return results


def write_adapter(base: Path, folder: Path, load_in_4bit: bool = True) -> None:
    """Write an adapter of rank 16 on all targets, as a run on this base in 4 or 16 bits would save it."""
    import torch
    from peft import LoraConfig

    from higgs_ds.adapters.save import AdapterFormat, write_adapter
    from higgs_ds.common.tensor_files import weight_files, weight_shapes
    from higgs_ds.model import nf4

    shapes = {name: s for name, s in weight_shapes(weight_files(base)).items() if nf4.is_quantized_weight(name)}
    factors = {}
    for name, (rows, columns) in shapes.items():
        layer = "base_model.model." + name.removesuffix(".weight")
        factors[f"{layer}.lora_A.weight"] = torch.randn(16, columns) / math.sqrt(columns)
        factors[f"{layer}.lora_B.weight"] = torch.randn(rows, 16) * 0.02
    record = nf4.BaseQuantization("bfloat16", "-", "cpu", {}) if load_in_4bit else None
    targets = sorted({name.split(".", 3)[3].removesuffix(".weight") for name in shapes})
    write_adapter(folder, factors, AdapterFormat(LoraConfig(r=16, target_modules=targets), record), False)


def run_part(part: str, folder: Path) -> None:
    """Run one part in this process and print its peak memory and time as JSON."""
    import torch

    from higgs_ds.adapters import merge
    from higgs_ds.model.loading import load_base_in_4bit

    result: dict[str, float] = {}
    started = time.perf_counter()
    if part == "load":
        cpu = torch.device("cpu")
        model, _ = load_base_in_4bit(folder / "base", torch.bfloat16, cpu, cpu)
        result["model_gib"] = model_bytes(model) / 2**30
    elif part.startswith("merge"):
        merge_base = "original" if part == "merge_original" else None
        report = merge.merge(
            folder / "base", folder / "adapter", folder / part, merge_base, verify=part != "merge_unverified"
        )
        print(*report.lines(), sep="\n", file=sys.stderr)
    result |= {"peak_gib": peak_gib(), "seconds": time.perf_counter() - started}
    print(json.dumps(result))


def model_bytes(model: object) -> int:
    """Return the bytes of all weights and of the scales of the 4-bit ones."""
    from bitsandbytes.nn import Linear4bit

    states = [m.weight.quant_state for m in model.modules() if isinstance(m, Linear4bit)]  # type: ignore[attr-defined]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes + s.code.nbytes + s.state2.code.nbytes for s in states)
    return sum(p.nbytes for p in model.parameters()) + scales  # type: ignore[attr-defined]


def peak_gib() -> float:
    """Return this process's peak resident memory in GiB, as reported by Linux."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


if __name__ == "__main__":
    main()
