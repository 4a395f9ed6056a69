"""Kill training runs at random moments, resume them, and compare their results with those of undisturbed runs.

python tests/chaos.py FOLDER KILLS SEED prints a JSON object with counts of what was done, and fails if anything was
lost.

A trial is one training run that is killed a few times and restarted with --resume auto. A kill sends SIGKILL to all
ranks, or to one; then the others must exit on their own. Every checkpoint that exists under its name after a kill must
equal that of the undisturbed run bit for bit. At the end, adapters, moments, merged model and metrics must be equal,
too. Every step is saved, so that many kills happen during a save.
"""

from __future__ import annotations

import collections
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from conftest import speech_sample, text_sample, write_manifest
from forks import start, training, wait
from launcher import RANDOM, overriding
from safetensors.torch import load_file

from higgs_ds.checkpoints.folder import find_checkpoints, why_incomplete

PROJECT = Path(__file__).parent.parent
KINDS = [(1, 0), (1, 3), (2, 2), (2, 3)]  # number of ranks, ZeRO stage
SURVIVORS_END_WITHIN_S = 60
STEPS = 5


def command(manifest: Path, stage: int, output_dir: Path, cache: Path) -> list[str]:
    options = (
        f"--deepspeed {PROJECT}/ds_configs/zero{stage}.json --output_dir {output_dir} --cache_dir {cache} --lr 1e-3 "
        f"--train_manifest {manifest} --allow_text_targets --precision fp32 --batch_size 1 --grad_accum 2 "
        f"--log_steps 1 --val_steps 2 --save_steps 1 --max_steps {STEPS} --merge_adapter_with_base --resume auto "
        "--no_report"
    )
    return overriding([*RANDOM, *options.split()])


def run_to_the_end(ranks: int, argv: Sequence[str], log: Path) -> None:
    codes = wait(start(ranks, training(argv), log), 300)
    assert codes == [0] * ranks, f"{codes}:\n{log.read_text()[-4000:]}"


def assert_same_tensors(expected: Path, found: Path) -> None:
    expected_tensors, tensors = load_file(expected), load_file(found)
    assert expected_tensors.keys() == tensors.keys(), found
    assert all(t.equal(tensors[name]) for name, t in expected_tensors.items()), f"{found} differs from {expected}"


def assert_checkpoints_are_complete(undisturbed: Path, killed: Path) -> None:
    for checkpoint in find_checkpoints(killed):
        assert why_incomplete(checkpoint) is None, f"{checkpoint}: {why_incomplete(checkpoint)}"
        for path in checkpoint.rglob("*.safetensors"):
            assert_same_tensors(undisturbed / path.relative_to(killed), path)


def assert_same_end(undisturbed: Path, killed: Path) -> None:
    assert_checkpoints_are_complete(undisturbed, killed)
    for folder in ("lora_adapters", "merged_model", "final_model"):
        for path in (undisturbed / folder).rglob("*.safetensors"):
            assert_same_tensors(path, killed / path.relative_to(undisturbed))
    states = [json.loads((run / "trainer_state.json").read_text()) for run in (undisturbed, killed)]
    assert [state["finished"] for state in states] == [True, True]
    lines = []
    for run in (undisturbed, killed):
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines.append(
            [{k: v for k, v in line.items() if "loss" in k or k in ("step", "epoch", "lr")} for line in logged]
        )
    assert lines[0] == lines[1], "metrics.jsonl differs"


def main(folder: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    cache, start_time = folder / "cache", time.monotonic()
    clips = [
        speech_sample(f"Clip {i}.", f"{who}_00.flac", duration=0.4) for i, who in enumerate(("anna", "ben", "carla"))
    ]
    entries = [*clips, *(text_sample(f"Question {i}?", "Answer.") for i in range(5))]
    manifest = write_manifest(folder / "samples.jsonl", entries)
    undisturbed, seconds = {}, {}
    for ranks, stage in KINDS:
        undisturbed[ranks, stage] = folder / f"undisturbed-{ranks}-{stage}"
        argv = command(manifest, stage, undisturbed[ranks, stage], cache)
        started = time.monotonic()
        run_to_the_end(ranks, argv, folder / "undisturbed.log")
        seconds[ranks, stage] = time.monotonic() - started

    counts: collections.Counter[str] = collections.Counter()
    while counts["kills"] < kills:
        kind = ranks, stage = draw.choice(KINDS)
        run, log = folder / f"trial-{counts['trials']}", folder / f"trial-{counts['trials']}.log"
        argv = command(manifest, stage, run, cache)
        for _ in range(min(draw.randint(1, 4), kills - counts["kills"])):
            pids = start(ranks, training(argv), log)
            time.sleep(draw.uniform(0.1, 0.95) * seconds[kind])
            victims = pids if draw.random() < 0.5 else [draw.choice(pids)]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            codes = wait(pids, SURVIVORS_END_WITHIN_S)
            hit = -signal.SIGKILL in codes
            counts["kills" if hit else "kills after the end"] += 1
            counts["one rank of two"] += hit and ranks == 2 and len(victims) == 1
            counts["during a save"] += any(
                re.fullmatch(r"\.(checkpoint-\d+|lora_adapters|merged_model|final_model|adapter)\..*", path.name)
                for path in (run.iterdir() if run.is_dir() else ())
            )
            for path in run.glob(".*.tmp") if run.is_dir() else ():
                # Moved away, so that it is not counted for the next kill.
                path.rename(folder / f"seen-{sum(counts.values())}-{path.name}")
            assert_checkpoints_are_complete(undisturbed[kind], run)
        run_to_the_end(ranks, argv, log)
        assert_same_end(undisturbed[kind], run)
        counts["skipped checkpoints"] += log.read_text().count(": skipped: ")
        counts["trials"] += 1
    print(json.dumps({**counts, "seed": seed, "minutes": round((time.monotonic() - start_time) / 60, 1)}))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    main(target, int(sys.argv[2]), int(sys.argv[3]))
