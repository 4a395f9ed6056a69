"""The last line that a benchmark prints, and the dated file that it writes with `--save`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--save", action="store_true", help="write the result to benchmarks/results/DATE-NAME.json")
    return parser


def report(args: argparse.Namespace, name: str, result: dict[str, Any]) -> None:
    """Save and print a result if the options ask for it."""
    if args.save:
        record = record_of(result)
        path = RESULTS / f"{record['date']}-{name}.json"
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"saved: {path.relative_to(RESULTS.parent.parent)}", file=sys.stderr)
    if args.json:
        print(json.dumps(result))


def record_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result together with where it comes from."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        "hardware": hardware(),
        "versions": {library: version(library) for library in LIBRARIES},
        "result": result,
    }


def shown(value: Any) -> str:
    """Return a figure for a table, with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def hardware() -> str:
    """Return the processor, its cores and memory, and the GPU if there is one."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = cpuinfo.split("model name\t: ")[1].splitlines()[0]
    widest = "AVX-512" if "avx512bw" in cpuinfo else "AVX2" if "avx2" in cpuinfo else "no AVX2"
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cores} cores of {model.strip()} with {widest}, {memory_gib:.0f} GiB{gpu}"
