"""Peak memory of loading a base in 4 bits and of merging an adapter into it: python benchmarks/base_in_4bit.py [--json]

Writes a random base of 2 GiB in shards of 256 MiB and an adapter on all targets, then runs each part in a process of
its own and asks the operating system for its peak resident memory (VmHWM, mapped files included).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import parser_of, report

PARTS = ("libraries", "load", "merge", "merge_original", "merge_unverified")
GEOMETRY = {
    "vocab_size": 128256,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_codebooks": 8,
    "codebook_size": 1026,
}
SHARD_BYTES = 256 * 2**20


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folder", type=Path, help="where 9 GiB are written (default: a temporary one)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a child process is to do
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


def measure(folder: Path) -> dict[str, object]:
    """Sizes in GiB, and peak and time of each part."""
    results: dict[str, object] = write_base(folder / "base")
    write_adapter(folder / "base", folder / "adapter")
    for part in PARTS:
        done = subprocess.run(
            [sys.executable, __file__, "--part", part, "--folder", str(folder)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        results[part] = json.loads(done.stdout.splitlines()[-1])
    results["nf4_gib"] = results["load"]["model_gib"]  # type: ignore[index]
    return results


def write_base(folder: Path, layers: int = GEOMETRY["num_hidden_layers"]) -> dict[str, object]:
    """Random bf16 weights of a native base, a shard at a time."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

    folder.mkdir()
    config = HiggsAudioV2Config(**GEOMETRY | {"num_hidden_layers": layers}, dtype="bfloat16")
    with init_empty_weights():
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    torch.manual_seed(0)
    shards: list[list[str]] = [[]]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in shapes:
        if shards[-1] and 2 * sum(math.prod(shapes[n]) for n in [*shards[-1], name]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    for i, names in enumerate(shards):
        weights = {
            name: (torch.randn(shapes[name]) / math.sqrt(shapes[name][-1])).bfloat16()
            if len(shapes[name]) > 1
            else torch.ones(shapes[name], dtype=torch.bfloat16)
            for name in names
        }
        save_file(weights, folder / f"model-{i + 1:05d}.safetensors", {"format": "pt"})
    places = {name: f"model-{i + 1:05d}.safetensors" for i, names in enumerate(shards) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return {"base_gib": 2 * sum(map(math.prod, shapes.values())) / 2**30, "shards": len(shards)}


def write_adapter(base: Path, folder: Path, load_in_4bit: bool = True) -> None:
    """An adapter of rank 16 on all targets, as a run on this base, in 4 bits or in 16, would have left it."""
    import torch
    from peft import LoraConfig

    from higgs_ds.export import AdapterFormat, write_adapter
    from higgs_ds.hub import weight_files, weight_shapes
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
    """One part in this process; prints its peak."""
    import torch

    from higgs_ds import merge
    from higgs_ds.model.higgs import load_base_in_4bit

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
    """Bytes of all weights and of the scales of those in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    states = [m.weight.quant_state for m in model.modules() if isinstance(m, Linear4bit)]  # type: ignore[attr-defined]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes + s.code.nbytes + s.state2.code.nbytes for s in states)
    return sum(p.nbytes for p in model.parameters()) + scales  # type: ignore[attr-defined]


def peak_gib() -> float:
    """This process's peak resident memory, as Linux tells it."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


if __name__ == "__main__":
    main()
