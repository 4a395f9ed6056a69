"""The parts of benchmarks/gpu.py that take training steps."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import Counter
from typing import Any

import random_base
import sides
import step_grid
import torch
from gpu_rows import GIB, Output, Size, timed


class Trained:
    """A random base with adapters and its engine, which takes steps on batches of any shape."""

    def __init__(self, size: Size, precision: str) -> None:
        self.size, self.precision = size, precision
        kind, four_bit = step_grid.PRECISIONS[precision]
        self.kind, self.four_bit = kind, four_bit
        self.base = random_base.random_model(size.values, kind, four_bit, size.device)
        self.options, self.settings = sides.our_options(kind, 1)
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
        from higgs_ds.model.recomputation import checkpoint_layers

        checkpoint_layers(self.base, 1)
        for layer in self.base.model.layers:
            layer.gradient_checkpointing = recompute == "every_layer"

    def batch(self, length: int, size: int) -> Any:
        from higgs_ds.data.collate import collate

        return collate(step_grid.samples({"length": length, "batch": size}), sides.stream(), random_base.PAD_ID)

    def measure(self, length: int, size: int, recompute: str) -> dict[str, Any]:
        """Return speed and memory of a step: the median of three, after one that is not timed."""
        self.recompute(recompute)
        batch = self.batch(length, size)
        if self.size.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(timed(lambda: self.engine.train_step([batch]), repeats=3))
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


def trace(out: Output, size: Size) -> None:
    """Record one step: kernels by their time, and the gaps in which the device had nothing to do."""
    from torch.profiler import ProfilerActivity, profile

    trained = Trained(size, "bf16")
    trained.recompute("none")
    batch = trained.batch(size.lengths[0], 1)
    timed(lambda: trained.engine.train_step([batch]), repeats=2)
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
