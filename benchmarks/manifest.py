"""Check and index a large manifest: time and peak memory of the first run, and of a second run with nothing new.

    python benchmarks/manifest.py [--lines 1000000] [--stretches 24] [--json]

Every line is a different conversation. Its audio is one of `--stretches` segments of the sample voices, which are
encoded before the timing starts.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def prepare(manifest: Path, cache: Path) -> tuple[float, float]:
    """Run launch/prepare.py once; return its seconds and its peak resident memory in GiB."""
    command = [sys.executable, PROJECT / "launch" / "prepare.py", "--train_manifest", manifest, "--cache_dir", cache]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) / 2**20 for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.2)
    assert process.returncode == 0
    return time.perf_counter() - began, peak


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--stretches", type=int, default=24, help="number of different audio segments in the lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest, small, cache = Path(folder, "m.jsonl"), Path(folder, "small.jsonl"), Path(folder, "cache")
        write_manifest(small, 20 * args.stretches, args.stretches)
        write_manifest(manifest, args.lines, args.stretches)
        prepare(small, cache)  # encodes the audio
        startup_s, startup_gib = prepare(small, cache)
        first_s, first_gib = prepare(manifest, cache)
        again_s, again_gib = prepare(manifest, cache)
        index = next(path for path in (cache / "index").iterdir() if str(manifest) in (path / "index.json").read_text())
        result = {
            "lines": args.lines,
            "manifest_mib": round(manifest.stat().st_size / 2**20, 1),
            "index_mib": round(sum(path.stat().st_size for path in index.iterdir()) / 2**20, 1),
            "startup_s": round(startup_s, 1),
            "startup_peak_gib": round(startup_gib, 3),
            "first_s": round(first_s, 1),
            "first_peak_gib": round(first_gib, 3),
            "again_s": round(again_s, 1),
            "again_peak_gib": round(again_gib, 3),
        }
    for name, value in result.items():
        print(f"{name:<18} {value}")
    report(args, "manifest", result)


if __name__ == "__main__":
    main()
