"""What the parts of benchmarks/gpu.py share: the file of rows, the time that is left, and timing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Output:
    """Append rows, one JSON object per line, and know how much time is left."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.until = path, time.monotonic() + seconds

    def row(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def has(self, seconds: float, what: str) -> bool:
        """Return whether this many seconds are left; if not, note what is left out."""
        enough = time.monotonic() + seconds <= self.until
        if not enough:
            self.row(left_out=what)
        return enough


def timed(work: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 1) -> list[float]:
    """Return the seconds of each call, after calls that are not timed. Waits for the device around each."""
    seconds = []
    for i in range(warmup + repeats):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        if i >= warmup:
            seconds.append(time.perf_counter() - began)
    return seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
