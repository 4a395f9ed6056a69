"""The parts of benchmarks/gpu.py. Each is a function that writes rows as it measures them.

python benchmarks/gpu_parts.py PART --rows FILE --folder FOLDER --seconds S
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_variants
import sides
import step_grid
import torch
from gpu_rows import Output, timed

PROJECT = Path(__file__).resolve().parent.parent
GEOMETRY_3B = json.loads((PROJECT / "benchmarks" / "3b" / "config.json").read_text(encoding="utf-8"))
MINIATURE = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1100,
}  # fmt: skip
DROPOUT = 0.05
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """What is measured: the released geometry on a GPU, or a miniature of it on a CPU."""

    device: torch.device
    values: dict[str, Any]
    lengths: tuple[int, ...]
    matmul: int  # rows and columns of the matrices for the peak
    copy_bytes: int
    codec: str
    num_clips: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def size_here() -> Size:
    if torch.cuda.is_available():
        return Size(torch.device("cuda"), GEOMETRY_3B, (2048, 512), 8192, 2**30, "released", 64)
    return Size(torch.device("cpu"), MINIATURE, (128, 96), 256, 2**22, "builtin", 6)


def device(out: Output, size: Size) -> None:
    """Measure what the other parts are compared with."""
    here = {"device": "CPU", "torch": torch.__version__, "cuda": torch.version.cuda}
    if size.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        here |= {"device": properties.name, "gib": properties.total_memory / GIB, "capability": capability}
    out.row(**here)
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(size.matmul, size.matmul, device=size.device).to(dtype) for _ in range(2))
        seconds = min(timed(lambda a=a, b=b: a @ b.T, size.device, repeats=10))
        out.row(matmul=str(dtype).removeprefix("torch."), tflops=2 * size.matmul**3 / seconds / 1e12)
    there = torch.empty(size.copy_bytes, dtype=torch.uint8, device=size.device)
    source = torch.empty_like(there)
    host = torch.empty(size.copy_bytes, dtype=torch.uint8, pin_memory=size.on_gpu)
    for name, origin, factor in (("on the device", source, 2), ("from the host", host, 1)):
        seconds = min(timed(lambda origin=origin: there.copy_(origin, non_blocking=True), size.device, repeats=5))
        out.row(copy=name, gb_per_s=factor * size.copy_bytes / seconds / 1e9)  # on the device: read and written


class Trained:
    """A random base with adapters and its engine, which takes steps on batches of any shape."""

    def __init__(self, size: Size, precision: str) -> None:
        self.size, self.precision = size, precision
        kind, four_bit = step_grid.PRECISIONS[precision]
        self.kind, self.four_bit = kind, four_bit
        self.base = sides.random_model(size.values, kind, four_bit, size.device)
        self.options, self.settings = sides.our_options(kind, 1, DROPOUT)
        self.engine = sides.engine_around(self.base, self.options, self.settings)
        self.peak = sides.matmul_peak(kind, size.matmul)

    def planned_bytes(self, length: int, batch: int, recompute: str) -> int:
        from higgs_ds.planning.plan import plan
        from higgs_ds.planning.weights import Setting

        options = self.options.replace(
            load_in_4bit=self.four_bit, max_seq_len=length, batch_size=batch, activation_checkpointing=recompute
        )
        settings = self.settings | {"train_micro_batch_size_per_gpu": batch, "train_batch_size": batch}
        return plan(Setting(self.base.config, options, settings, 1)).total

    def largest_batch(self, length: int, recompute: str) -> int:
        """Return the largest power of two that the plan puts into nine tenths of the device's memory, up to 32."""
        if not self.size.on_gpu:
            return 2
        room = 0.9 * torch.cuda.get_device_properties(0).total_memory
        fitting = itertools.takewhile(
            lambda batch: self.planned_bytes(length, batch, recompute) <= room, (2**i for i in range(6))
        )
        return max(fitting, default=1)

    def recompute(self, recompute: str) -> None:
        from higgs_ds.model.higgs import checkpoint_layers

        checkpoint_layers(self.base, 1)
        for layer in self.base.model.layers:
            layer.gradient_checkpointing = recompute == "every_layer"

    def batch(self, length: int, size: int) -> Any:
        from higgs_ds.data.collate import collate

        return collate(step_grid.samples({"length": length, "batch": size}), sides.stream(), sides.PAD_ID)

    def measure(self, length: int, size: int, recompute: str) -> dict[str, Any]:
        """Return speed and memory of a step: the median of three, after one that is not timed."""
        self.recompute(recompute)
        batch = self.batch(length, size)
        if self.size.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(timed(lambda: self.engine.train_step([batch]), self.size.device, repeats=3))
        needed = step_grid.operations(self.size.values, length, size)
        row = {
            "precision": self.precision, "length": length, "batch": size, "recompute": recompute, "step_s": seconds,
            "positions_per_s": size * length / seconds, "matmul_share": needed / seconds / self.peak,
            "planned_gib": self.planned_bytes(length, size, recompute) / GIB,
        }  # fmt: skip
        if self.size.on_gpu:
            allocated = torch.cuda.max_memory_allocated()
            row |= {"allocated_gib": allocated / GIB, "reserved_gib": torch.cuda.max_memory_reserved() / GIB}
            row["allocated_over_planned"] = row["allocated_gib"] / row["planned_gib"]
        return row


def step(out: Output, size: Size) -> None:
    """Measure steps in bf16 and NF4, recomputed or not, on one sample and on as many as fit."""
    for precision in ("bf16", "nf4"):
        if not out.has(15 if size.on_gpu else 1, precision):
            continue
        trained = Trained(size, precision)
        lasted = 1.0
        for length, recompute in itertools.product(size.lengths, ("none", "every_layer")):
            for batch in sorted({1, trained.largest_batch(length, recompute)}):
                name = f"{precision} {batch} x {length} {recompute}"
                if not out.has(1.5 * lasted, name):
                    continue
                began = time.monotonic()
                try:
                    out.row(**trained.measure(length, batch, recompute))
                except torch.OutOfMemoryError:
                    out.row(precision=precision, length=length, batch=batch, recompute=recompute, out_of_memory=True)
                lasted = time.monotonic() - began
        del trained
        gc.collect()


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


def trace(out: Output, size: Size) -> None:
    """Record one step: kernels by their time, and the gaps in which the device had nothing to do."""
    from torch.profiler import ProfilerActivity, profile

    trained = Trained(size, "bf16")
    trained.recompute("none")
    batch = trained.batch(size.lengths[0], 1)
    timed(lambda: trained.engine.train_step([batch]), size.device, repeats=2)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * size.on_gpu
    with profile(activities=activities) as profiled:
        trained.engine.train_step([batch])
        if size.on_gpu:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if size.on_gpu else torch.autograd.DeviceType.CPU
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profiled.profiler.kineto_results.events()
        if event.device_type() == kind and event.duration_ns() > 0 and (size.on_gpu or event.name().startswith("aten"))
    )
    for row in summarize_trace(spans):
        out.row(**row)


def summarize_trace(spans: list[tuple[int, int, str]]) -> list[dict[str, Any]]:
    """Return totals, the five longest gaps and the twelve kernels that took longest, of (start, end, name) in ns."""
    gaps, end, before = [], spans[0][0], ""
    for start, until, name in spans:
        if start > end:
            gaps.append((start - end, before, name))
        if until > end:
            end, before = until, name
    whole, idle = end - spans[0][0], sum(gap for gap, *_ in gaps)
    rows: list[dict[str, Any]] = [
        {"kernels": len(spans), "ms": whole / 1e6, "idle_ms": idle / 1e6, "idle_share": idle / whole}
    ]
    for gap, after, before in sorted(gaps, reverse=True)[:5]:
        rows.append({"gap_ms": gap / 1e6, "after": after[:60], "before": before[:60]})
    total, calls = Counter[str](), Counter[str]()
    for start, until, name in spans:
        total[name] += until - start
        calls[name] += 1
    rows += [
        {"kernel": name[:90], "calls": calls[name], "total_ms": ns / 1e6, "share": ns / whole}
        for name, ns in total.most_common(12)
    ]
    return rows


def base(out: Output, size: Size, folder: Path) -> None:
    """Write a base, load it, and merge an adapter into it."""
    from base_in_4bit import write_adapter

    from higgs_ds.adapters.merge import merge
    from higgs_ds.model.loading import load_base, load_base_in_4bit

    began = time.monotonic()
    gib = sides.write_base(folder / "base", size.values, "bf16")["base_gib"]
    out.row(base_gib=gib, written_s=time.monotonic() - began)
    loads: dict[str, Callable[[], Any]] = {
        "bf16": lambda: load_base(folder / "base", torch.bfloat16).to(size.device),
        "nf4": lambda: load_base_in_4bit(folder / "base", torch.bfloat16, size.device, size.device),
    }
    for name, load in loads.items():
        if out.has(15 if size.on_gpu else 1, f"load {name}"):
            out.row(load=name, seconds=timed(load, size.device, repeats=1, warmup=0)[0])
            gc.collect()
    if out.has(25 if size.on_gpu else 1, "merge"):
        write_adapter(folder / "base", folder / "adapter", load_in_4bit=False)
        began = time.monotonic()
        merge(folder / "base", folder / "adapter", folder / "merged")
        seconds = time.monotonic() - began
        out.row(merge="with its self-check", seconds=seconds, gib_per_s=gib / seconds)


def trainer(out: Output, size: Size, folder: Path) -> None:
    """Take the same steps here and with transformers' Trainer and PEFT: no dropout, nothing recomputed."""
    if not (folder / "base" / "config.json").is_file():
        sides.write_base(folder / "base", size.values, "bf16")
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
