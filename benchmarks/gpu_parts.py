"""The parts of benchmarks/gpu.py. Each is a function that writes rows as it measures them.

python benchmarks/gpu_parts.py PART --rows FILE --folder FOLDER --seconds S
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_variants
import random_base
import sides
import step_grid
import torch
from gpu_rows import GIB, Output, Size, size_here, timed
from gpu_steps import step, trace

PROJECT = Path(__file__).resolve().parent.parent


def device(out: Output, size: Size) -> None:
    """Measure what the other parts are compared with."""
    here = {"device": "CPU", "torch": torch.__version__, "cuda": torch.version.cuda}
    if size.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        here |= {"device": properties.name, "gib": properties.total_memory / GIB, "capability": capability}
    out.row(**here)
    for precision in ("bf16", "fp16"):
        out.row(matmul=precision, tflops=sides.matmul_peak(precision, size.matmul) / 1e12)
    there = torch.empty(size.copy_bytes, dtype=torch.uint8, device=size.device)
    source = torch.empty_like(there)
    host = torch.empty(size.copy_bytes, dtype=torch.uint8, pin_memory=size.on_gpu)
    for name, origin, factor in (("on the device", source, 2), ("from the host", host, 1)):
        seconds = min(timed(lambda origin=origin: there.copy_(origin, non_blocking=True), repeats=5))
        out.row(copy=name, gb_per_s=factor * size.copy_bytes / seconds / 1e9)  # on the device: read and written


def tests(out: Output, size: Size) -> None:
    """Run tests/gpu. Without a GPU, they are skipped."""
    import pytest

    class Recorder:
        skipped = 0

        def pytest_runtest_setup(self, item: Any) -> None:
            if not out.has(8, item.name):
                pytest.skip("no time left")

        def pytest_runtest_logreport(self, report: Any) -> None:
            self.skipped += report.skipped
            if report.failed or (report.when == "call" and report.passed):
                name = report.nodeid.rpartition("::")[2]
                out.row(test=name, outcome=report.outcome, seconds=round(report.duration, 1))

        def pytest_sessionfinish(self) -> None:
            out.row(skipped=self.skipped)

    os.chdir(PROJECT)
    code = pytest.main(["-q", "-p", "no:cacheprovider", "tests/gpu"], plugins=[Recorder()])
    if code:
        raise SystemExit(int(code))


def base(out: Output, size: Size, folder: Path) -> None:
    """Write a base, load it, and merge an adapter into it."""
    from base_in_4bit import write_adapter

    from higgs_ds.adapters.merge import merge
    from higgs_ds.model.loading import load_base, load_base_in_4bit

    began = time.monotonic()
    gib = random_base.write_base(folder / "base", size.values, "bf16")["base_gib"]
    out.row(base_gib=gib, written_s=time.monotonic() - began)
    loads: dict[str, Callable[[], Any]] = {
        "bf16": lambda: load_base(folder / "base", torch.bfloat16).to(size.device),
        "nf4": lambda: load_base_in_4bit(folder / "base", torch.bfloat16, size.device, size.device),
    }
    for name, load in loads.items():
        if out.has(15 if size.on_gpu else 1, f"load {name}"):
            out.row(load=name, seconds=timed(load, repeats=1, warmup=0)[0])
            gc.collect()
    if out.has(25 if size.on_gpu else 1, "merge"):
        write_adapter(folder / "base", folder / "adapter", load_in_4bit=False)
        began = time.monotonic()
        merge(folder / "base", folder / "adapter", folder / "merged")
        seconds = time.monotonic() - began
        out.row(merge="with its self-check", seconds=seconds, gib_per_s=gib / seconds)


def trainer(out: Output, size: Size, folder: Path) -> None:
    """Take the same steps here and with transformers' Trainer and PEFT: nothing recomputed."""
    if not (folder / "base" / "config.json").is_file():
        random_base.write_base(folder / "base", size.values, "bf16")
    rows = {}
    for side in (sides.OURS, sides.TRAINER):
        values = (size.lengths[0], 1, size.values["vocab_size"], "bf16", "none", 1, side)
        cell = dict(zip(step_grid.AXES, values, strict=True))
        row = step_grid.run(argparse.Namespace(warmup=1, steps=3), cell, str(folder / "base"))
        rows[side] = row
        out.row(side=side, length=size.lengths[0], batch=1, positions_per_s=size.lengths[0] / row["step_s"], **row)
    ours, theirs = rows[sides.OURS], rows[sides.TRAINER]
    out.row(speed_ratio=theirs["step_s"] / ours["step_s"], memory_ratio=ours["peak_mib"] / theirs["peak_mib"])


def encode(out: Output, size: Size, folder: Path) -> None:
    """Encode clips of 2 to 10 s one by one and in mixed batches, and count the codes that differ."""
    from prepare import write_codec

    from higgs_ds.data.codec import Codec

    write_codec(folder, size.codec)
    codec, draw = Codec(folder / "codec", size.device), torch.Generator().manual_seed(0)
    clips = [
        0.1 * torch.randn(int(torch.randint(48000, 240000, (1,), generator=draw)), generator=draw)
        for _ in range(size.num_clips)
    ]
    clips.sort(key=len)
    seconds_of_audio = sum(map(len, clips)) / codec.sample_rate
    codes: dict[str, list[torch.Tensor]] = {}
    ways: dict[str, Callable[[], list[torch.Tensor]]] = {
        "one by one": lambda: [codec.encode(clip) for clip in clips],
        "batches of 16": lambda: [
            encoded for i in range(0, len(clips), 16) for encoded in codec.encode_batch(clips[i : i + 16])
        ],
    }
    for name, way in ways.items():
        if not out.has(5 if size.on_gpu else 1, name):
            continue
        codec.encode(clips[0])
        began = time.monotonic()
        codes[name] = way()
        seconds = time.monotonic() - began
        out.row(
            encode=name, clips=len(clips), audio_s=seconds_of_audio, seconds=seconds, clips_per_s=len(clips) / seconds
        )
    if len(codes) == 2:
        pairs = list(zip(*codes.values(), strict=True))
        differing = sum(int((a != b).sum()) for a, b in pairs)
        out.row(codes_differing=differing, of=sum(a.numel() for a, _ in pairs))


def variants(out: Output, size: Size) -> None:
    gpu_variants.measure(out, size.values, size.lengths[0], size.device)


# The others start processes that must not take this one for their rank.
IN_PROCESS_GROUP: dict[str, Callable[[Output, Size], None]] = {part.__name__: part for part in (step, trace)}
ALONE: dict[str, Callable[[Output, Size], None]] = {part.__name__: part for part in (device, tests, variants)}
WITH_FOLDER: dict[str, Callable[[Output, Size, Path], None]] = {part.__name__: part for part in (base, trainer, encode)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*IN_PROCESS_GROUP, *ALONE, *WITH_FOLDER])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    from higgs_ds.common.process import run_ranks

    out, size = Output(args.rows, args.seconds), size_here()
    if args.part in IN_PROCESS_GROUP:
        sys.exit(run_ranks(lambda: IN_PROCESS_GROUP[args.part](out, size)))
    elif args.part in ALONE:
        ALONE[args.part](out, size)
    else:
        WITH_FOLDER[args.part](out, size, args.folder)


if __name__ == "__main__":
    main()
