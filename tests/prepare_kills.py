"""Prepare one manifest in processes that are killed at random moments, and in two at once.

python tests/prepare_kills.py MANIFEST BASE FOLDER KILLS SEED leaves caches in FOLDER/{undisturbed,killed,two}, and
prints a JSON object that says how many of the killed had not come to their end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from higgs_ds.quiet import quiet_libraries

quiet_libraries()

from launcher import free_port, rank_environment  # noqa: E402

from higgs_ds import distributed, prepare  # noqa: E402
from higgs_ds.config import DataOptions, ModelOptions, PrepareOptions  # noqa: E402


def start(manifest: Path, base: str, cache: Path) -> int:
    """A process that prepares. Forked, so that it does not spend most of its time on imports."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(rank_environment(0, 1, free_port()))
    options = DataOptions(train_manifest=manifest, cache_dir=cache)
    with open(os.devnull, "w") as nothing:
        sys.stdout = nothing
        os._exit(distributed.run_ranks(lambda: prepare.main(options, ModelOptions(base), PrepareOptions())))


def wait(pid: int) -> int:
    """Its exit code; below 0 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(manifest: Path, base: str, folder: Path, kills: int, seed: int) -> None:
    began = time.monotonic()
    assert wait(start(manifest, base, folder / "undisturbed")) == 0
    whole_s = time.monotonic() - began

    draw, cache = random.Random(seed), folder / "killed"
    killed = 0
    for _ in range(kills):
        pid = start(manifest, base, cache)
        time.sleep(draw.uniform(0, whole_s))
        os.kill(pid, signal.SIGKILL)
        killed += wait(pid) == -signal.SIGKILL
        done = sorted(cache.glob("codes/*/*.safetensors"))  # the next one shall find something to do
        for path in draw.sample(done, len(done) // 2):
            path.unlink()
    assert wait(start(manifest, base, cache)) == 0

    both = [start(manifest, base, folder / "two") for _ in range(2)]
    assert [wait(pid) for pid in both] == [0, 0]
    print(json.dumps({"kills": kills, "before_the_end": killed, "undisturbed_s": round(whole_s, 2)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
