"""Compare what two checkouts make of the same inputs, bit for bit: python tests/compare_checkouts.py OLD NEW FOLDER.

Both train, on two ranks, LoRA at ZeRO 0, 2 and 3, LoRA on an NF4 base and all weights, 20 steps each, and merge.
Compared are adapters or weights, optimizer states, merged or complete models, codes, the rows of the index, and all
metrics but times and memory. Then the new checkout resumes the old one's checkpoints at step 10, and must end as the
old one ended. Texts (model cards, reports) and paths may differ. Ends with 0 where nothing else does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from launcher import free_port, overriding
from safetensors import safe_open

RUNS = {
    "zero0": "--deepspeed {repo}/ds_configs/zero0.json",
    "zero2": "--deepspeed {repo}/ds_configs/zero2.json",
    "zero3": "--deepspeed {repo}/ds_configs/zero3.json",
    "nf4": "--deepspeed {repo}/ds_configs/zero2.json --load_in_4bit",
    "full": "--deepspeed {repo}/ds_configs/zero2.json --finetune full --lr 2e-4",
}
COMMON = (
    "--base_ckpt tiny-random-base --train_manifest {repo}/samples/voices.jsonl --val_split 0.2 --precision fp32 "
    "--max_steps 20 --save_steps 10 --val_steps 10 --log_steps 1 --batch_size 2 --grad_accum 1 --lr 2e-3 --no_report "
    "--merge_adapter_with_base"
)
RANKS = 2
# Of metrics.jsonl: what depends on the machine.
MEASURED = {"samples_per_s", "tokens_per_s", "step_time_s", "peak_memory_gib"}
MODELS = ("merged_model", "final_model", "lora_adapters", "checkpoint-10", "checkpoint-20")


def train(repo: Path, cache: Path, output: Path, options: str) -> None:
    """Run a training of a checkout on RANKS ranks."""
    port = free_port()
    command = [sys.executable, str(repo / "launch" / "train.py")]
    command += overriding(f"{COMMON} {options} --cache_dir {cache} --output_dir {output}".format(repo=repo).split())
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ
            | {
                "PYTHONPATH": str(repo), "HIGGS_DS_CACHE": str(cache), "OMP_NUM_THREADS": "1", "RANK": str(rank),
                "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit("\n".join([f"{repo}: {' '.join(command)} failed", *outputs]))


def tensors_of(folder: Path) -> dict[str, Any]:
    """Every tensor below a folder, by file and name, as (dtype, shape, bytes)."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[f"{path.relative_to(folder)}:{name}"] = (str(tensor.dtype), tuple(tensor.shape), content)
    return found


def metrics_of(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def index_rows(cache: Path, repo: Path) -> list[dict[str, Any]]:
    """The rows of every index, with paths inside the checkout made relative."""
    rows = []
    for path in sorted(cache.rglob("*.arrow"), key=lambda path: path.name):
        rows += pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist()
    for row in rows:
        row.pop("mtimes", None)  # of a clone, the time of cloning
        for name in ("source", "paths"):
            if name in row:
                row[name] = json.loads(json.dumps(row[name]).replace(f"{repo}/", ""))
    return sorted(rows, key=repr)


def config_of(path: Path, *folders: Path) -> Any:
    """A JSON file without the folders of this comparison in it."""
    text = path.read_text()
    for folder in folders:
        text = text.replace(str(folder), "FOLDER")
    return json.loads(text)


def differences(old: Any, new: Any, what: str) -> Iterator[str]:
    if old == new:
        print(f"equal: {what} ({len(old)})", flush=True)
    elif isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
        yield f"DIFFERENT: {what}: {len(names)} of {len(old)}, for instance {sorted(names)[:3]}"
    else:
        pairs = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
        yield f"DIFFERENT: {what}: {len(old)} and {len(new)}, for instance {pairs[:1]}"


def compare(old: Path, new: Path, folder: Path) -> list[str]:
    found: list[str] = []
    repos = {"old": old.resolve(), "new": new.resolve()}
    for name, options in RUNS.items():
        for side, repo in repos.items():
            train(repo, folder / side / "cache", folder / side / name, options)
        sides = [folder / side / name for side in repos]
        for part in MODELS:
            if sides[0].joinpath(part).is_dir() or sides[1].joinpath(part).is_dir():
                found += differences(*(tensors_of(side / part) for side in sides), f"{name}/{part}")
        found += differences(*map(metrics_of, sides), f"{name}/metrics.jsonl")
        adapter = "lora_adapters/adapter_config.json"
        if (sides[0] / adapter).is_file():
            configs = [config_of(side / adapter, side.parent) for side in sides]
            found += differences(*configs, f"{name}/{adapter}")
        resumed = folder / "resumed" / name
        shutil.copytree(sides[0], resumed, ignore=shutil.ignore_patterns("checkpoint-20", "*model", "adapter"))
        train(repos["new"], folder / "new" / "cache", resumed, f"{options} --resume auto")
        for part in ("checkpoint-20", *MODELS[:2]):
            if sides[0].joinpath(part).is_dir():
                pair = [tensors_of(side / part) for side in (sides[0], resumed)]
                found += differences(*pair, f"{name}/{part}, resumed by the new checkout from the old one's step 10")
        found += differences(metrics_of(sides[0]), metrics_of(resumed), f"{name}/metrics.jsonl, resumed")
    caches = [folder / side / "cache" for side in repos]
    found += differences(*(tensors_of(cache / "codes") for cache in caches), "codes")
    found += differences(
        *(index_rows(cache, repos[side]) for side, cache in zip(repos, caches, strict=True)), "index rows"
    )
    return found


if __name__ == "__main__":
    different = compare(*map(Path, sys.argv[1:4]))
    print("\n".join(different or ["nothing differs"]))
    sys.exit(bool(different))
