"""Check and index large training data: time and peak memory of the first run, and of a second run with nothing new.

    python benchmarks/manifest.py [OLD] [--lines 1000000] [--pairs 50000] [--rounds 1] [--stretches 24] [--json]

The data are a manifest, each of whose lines is a different conversation, and a folder of recordings that each have a
text file. Their audio is one of `--stretches` seconds of the sample voices, which are encoded before the timing starts.
With another checkout, OLD, both take turns, each with its own cache: a machine that slows down slows down both.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import soundfile
from record import parser_of, report

PROJECT = Path(__file__).resolve().parent.parent
WORDS = "the small boats came back before storm and every light on pier was red blue green for a while".split()


def write_manifest(path: Path, lines: int, stretches: int) -> None:
    draw = random.Random(0)
    voices = sorted((PROJECT / "samples" / "voices").iterdir())
    parts = [
        {"type": "audio", "audio_url": str(voices[i % len(voices)]), "offset": (i // len(voices)) / 1000, "duration": 1}
        for i in range(stretches)
    ]
    with path.open("w") as file:
        for i in range(lines):
            words = " ".join(draw.choices(WORDS, k=draw.randrange(4, 24)))
            messages = [
                {"role": "system", "content": "Generate audio following instruction."},
                {"role": "user", "content": f"{words} {i}."},
                {"role": "assistant", "content": parts[i] if i < len(parts) else draw.choice(parts)},
            ]
            file.write(json.dumps({"messages": messages, "speaker": f"s{i % 1000}"}) + "\n")


def write_pairs(folder: Path, pairs: int, stretches: int) -> None:
    """Write a folder of recordings, which are links to a few files in another one."""
    draw = random.Random(0)
    sources = folder.with_name("stretches")
    folder.mkdir()
    if not sources.is_dir():
        sources.mkdir()
        voices = sorted((PROJECT / "samples" / "voices").iterdir())
        for i in range(stretches):
            waveform, rate = soundfile.read(voices[i % len(voices)])
            start = i // len(voices) * 24
            soundfile.write(sources / f"{i}.wav", waveform[start : start + rate], rate)
    for i in range(pairs):
        os.link(sources / f"{i % stretches}.wav", folder / f"clip_{i:06}.wav")
        (folder / f"clip_{i:06}.txt").write_text(f"{' '.join(draw.choices(WORDS, k=draw.randrange(4, 24)))} {i}.")


def prepare(checkout: Path, data: Path, cache: Path) -> tuple[float, float]:
    """Run a checkout's launch/prepare.py once; return its seconds and its peak resident memory in GiB.

    The memory is that of all its processes; pages that they share are counted once. To look more often would take the
    time of a core that one side uses and the other does not.
    """
    command = [sys.executable, checkout / "launch" / "prepare.py", "--train_manifest", data, "--cache_dir", cache]
    began = time.perf_counter()
    variables = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=variables)
    peak = 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(process.pid)
            peak = max(peak, sum(one.memory_full_info().pss for one in [main, *main.children(recursive=True)]) / 2**30)
        time.sleep(0.5 if time.perf_counter() - began > 3 else 0.1)
    assert process.returncode == 0, command
    return time.perf_counter() - began, peak


def measure(checkout: Path, data: Path, small: Path, cache: Path) -> dict[str, float]:
    """Return seconds and GiB of a run with a little data, of the first run with all data, and of a second one."""
    shutil.rmtree(cache / "index", ignore_errors=True)
    prepare(checkout, small, cache)  # the first time, it encodes the audio
    runs = {"startup": small, "first": data, "again": data}
    measured = {name: prepare(checkout, path, cache) for name, path in runs.items()}
    return {
        f"{name}_{unit}": value
        for name, run in measured.items()
        for unit, value in zip(("s", "peak_gib"), run, strict=True)
    }


def compare(
    checkouts: dict[str, Path], write: Callable[[Path, int, int], None], count: int, stretches: int, rounds: int
) -> dict[str, Any]:
    """Return the medians of each checkout, and the medians of the ratios of the turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "small", 20 * stretches, stretches)
        write(folder / "all", count, stretches)
        turns = [
            {side: measure(path, folder / "all", folder / "small", folder / side) for side, path in checkouts.items()}
            for _ in range(rounds)
        ]
    result: dict[str, Any] = {"count": count}
    for side in checkouts:
        result[side] = {name: statistics.median(turn[side][name] for turn in turns) for name in turns[0][side]}
    if "old" in checkouts:
        names = turns[0]["old"]
        result["ratio"] = {n: statistics.median(turn["new"][n] / turn["old"][n] for turn in turns) for n in names}
    return result


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("old", type=Path, nargs="?", help="another checkout to compare with")
    parser.add_argument("--lines", type=int, default=1_000_000, help="of the manifest; 0 leaves it out")
    parser.add_argument("--pairs", type=int, default=50_000, help="of the folder; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=1, help="number of turns of each checkout")
    parser.add_argument("--stretches", type=int, default=24, help="number of different audio segments")
    args = parser.parse_args()
    checkouts = ({"old": args.old.resolve()} if args.old else {}) | {"new": PROJECT}
    result: dict[str, Any] = {"rounds": args.rounds}
    for name, write, count in (("lines", write_manifest, args.lines), ("pairs", write_pairs, args.pairs)):
        if count:
            result[name] = compare(checkouts, write, count, args.stretches, args.rounds)
            print(f"{count:,} {name}:")
            for side, values in result[name].items():
                if side != "count":
                    print(f"  {side:<6}" + ", ".join(f"{n} {value:.3f}" for n, value in values.items()), flush=True)
    report(args, "manifest", result)


if __name__ == "__main__":
    main()
