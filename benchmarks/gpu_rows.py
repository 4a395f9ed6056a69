"""What the parts of benchmarks/gpu.py share: what is measured, the file of rows, the time that is left, and timing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sides import now

BENCHMARKS = Path(__file__).resolve().parent
GEOMETRY_3B = json.loads((BENCHMARKS / "3b" / "config.json").read_text(encoding="utf-8"))
MINIATURE = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1100,
}  # fmt: skip
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


def timed(work: Callable[[], Any], repeats: int, warmup: int = 1) -> list[float]:
    """Return the seconds of each call, after calls that are not timed."""
    seconds = []
    for i in range(warmup + repeats):
        began = now()
        work()
        if i >= warmup:
            seconds.append(now() - began)
    return seconds
