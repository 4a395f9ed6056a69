"""Prepare one manifest in processes that are killed at random moments, and in two processes at once.

python tests/prepare_kills.py MANIFEST BASE FOLDER KILLS SEED leaves caches in FOLDER/{undisturbed,killed,two}, and
prints a JSON object with the number of processes that were killed before they had finished.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from forks import preparing, wait
from forks import start as start_ranks


def start(manifest: Path, base: str, cache: Path) -> list[int]:
    """Start a process that prepares the manifest. Return its process id in a list."""
    argv = ["--train_manifest", str(manifest), "--base_ckpt", base, "--cache_dir", str(cache)]
    return start_ranks(1, preparing(argv), cache.parent / "prepare.log")


def main(manifest: Path, base: str, folder: Path, kills: int, seed: int) -> None:
    began = time.monotonic()
    assert wait(start(manifest, base, folder / "undisturbed"), 300) == [0]
    undisturbed_s = time.monotonic() - began

    draw, cache = random.Random(seed), folder / "killed"
    killed = 0
    for _ in range(kills):
        pids = start(manifest, base, cache)
        time.sleep(draw.uniform(0, undisturbed_s))
        os.kill(pids[0], signal.SIGKILL)
        killed += wait(pids, 60) == [-signal.SIGKILL]
        done = sorted(cache.glob("codes/*/*.safetensors"))  # so that the next process has something to encode
        for path in draw.sample(done, len(done) // 2):
            path.unlink()
    assert wait(start(manifest, base, cache), 300) == [0]

    both = [start(manifest, base, folder / "two") for _ in range(2)]
    assert [wait(pids, 300) for pids in both] == [[0], [0]]
    print(json.dumps({"kills": kills, "before_the_end": killed, "undisturbed_s": round(undisturbed_s, 2)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
