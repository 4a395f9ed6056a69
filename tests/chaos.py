"""Kill trainings at random moments, start them again, and hold what they end with against undisturbed ones.

python tests/chaos.py FOLDER KILLS SEED prints a JSON object with what was done, and ends with 1 where anything was lost.

A story is one training, killed a few times and started again with --resume auto: SIGKILL to one of its ranks, the others
then having to end by themselves, or to all. Every checkpoint that a kill leaves behind under its name must hold what the
undisturbed run's holds, to the last bit; at the end so must adapters, moments, merged model and metrics. Every step is
saved, so that many kills meet a save.
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

os.environ.setdefault("OMP_NUM_THREADS", "1")

from higgs_ds.quiet import quiet_libraries  # noqa: E402

quiet_libraries()

from conftest import speech_sample, text_sample, write_manifest  # noqa: E402
from launcher import free_port, rank_environment  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from higgs_ds import distributed, train  # noqa: E402
from higgs_ds.checkpoint import find_checkpoints, why_incomplete  # noqa: E402
from higgs_ds.config import parse_train_options  # noqa: E402

PROJECT = Path(__file__).parent.parent
KINDS = [(1, 0), (1, 3), (2, 2), (2, 3)]  # number of ranks, ZeRO stage
SURVIVORS_END_WITHIN_S = 60
STEPS = 5


def command(manifest: Path, stage: int, output_dir: Path, cache: Path) -> list[str]:
    return (
        f"--deepspeed {PROJECT}/ds_configs/zero{stage}.json --output_dir {output_dir} --cache_dir {cache} --lr 1e-3 "
        f"--train_manifest {manifest} --allow_text_targets --precision fp32 --batch_size 1 --grad_accum 2 --log_steps 1 "
        f"--val_steps 2 --save_steps 1 --max_steps {STEPS} --merge_adapter_with_base --resume auto"
    ).split()


def start(ranks: int, argv: Sequence[str], log: Path) -> list[int]:
    """The ranks of a training. Forked, so that they do not spend most of their time on imports."""
    port, pids = free_port(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(rank_environment(rank, ranks, port))
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            options = parse_train_options(list(argv))
            distributed.leave(distributed.run_ranks(lambda: train.main(*options)))
        pids.append(pid)
    return pids


def wait(pids: Sequence[int], timeout_s: float) -> list[int]:
    """Exit codes, below 0 where killed. Raises TimeoutError, with all of them killed, where one does not end."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"ranks did not end within {timeout_s} s: {codes}")
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def run_to_the_end(ranks: int, argv: Sequence[str], log: Path) -> None:
    codes = wait(start(ranks, argv, log), 300)
    assert codes == [0] * ranks, f"{codes}:\n{log.read_text()[-4000:]}"


def assert_same_tensors(expected: Path, found: Path) -> None:
    one, other = load_file(expected), load_file(found)
    assert one.keys() == other.keys(), found
    assert all(tensor.equal(other[name]) for name, tensor in one.items()), f"{found} differs from {expected}"


def assert_checkpoints_are_whole(undisturbed: Path, killed: Path) -> None:
    for checkpoint in find_checkpoints(killed):
        assert why_incomplete(checkpoint) is None, f"{checkpoint}: {why_incomplete(checkpoint)}"
        for path in checkpoint.rglob("*.safetensors"):
            assert_same_tensors(undisturbed / path.relative_to(killed), path)


def assert_same_end(undisturbed: Path, killed: Path) -> None:
    assert_checkpoints_are_whole(undisturbed, killed)
    for folder in ("lora_adapters", "merged_model", "final_model"):
        for path in (undisturbed / folder).rglob("*.safetensors"):
            assert_same_tensors(path, killed / path.relative_to(undisturbed))
    states = [json.loads((run / "trainer_state.json").read_text()) for run in (undisturbed, killed)]
    assert states[0]["finished"] and states[1]["step"] == STEPS, states[1]
    lines = []
    for run in (undisturbed, killed):
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines.append([{k: v for k, v in line.items() if "loss" in k or k in ("step", "epoch", "lr")} for line in logged])
    assert lines[0] == lines[1], "metrics.jsonl differs"


def main(folder: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    cache, began = folder / "cache", time.monotonic()
    clips = [speech_sample(f"Clip {i}.", f"{who}_00.flac", duration=0.4) for i, who in enumerate(("anna", "ben", "carla"))]
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
        run, log = folder / f"story-{counts['stories']}", folder / f"story-{counts['stories']}.log"
        argv = command(manifest, stage, run, cache)
        for _ in range(min(draw.randint(1, 4), kills - counts["kills"])):
            pids = start(ranks, argv, log)
            time.sleep(draw.uniform(0.1, 1) * seconds[kind])
            victims = pids if draw.random() < 0.5 else [draw.choice(pids)]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            codes = wait(pids, SURVIVORS_END_WITHIN_S)
            counts["kills"] += 1
            counts["one rank of two"] += ranks == 2 and len(victims) == 1
            counts["before the end"] += -signal.SIGKILL in codes
            counts["in the middle of a save"] += any(
                re.fullmatch(r"\.(checkpoint-\d+|lora_adapters|merged_model|final_model|adapter)\..*", path.name)
                for path in (run.iterdir() if run.is_dir() else ())
            )
            for path in run.glob(".*.tmp") if run.is_dir() else ():
                path.rename(folder / f"seen-{counts['kills']}-{path.name}")  # so that the next kill's are its own
            assert_checkpoints_are_whole(undisturbed[kind], run)
        run_to_the_end(ranks, argv, log)
        assert_same_end(undisturbed[kind], run)
        counts["passed over"] += log.read_text().count("passed over")
        counts["stories"] += 1
    print(json.dumps({**counts, "seed": seed, "minutes": round((time.monotonic() - began) / 60, 1)}))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    main(target, int(sys.argv[2]), int(sys.argv[3]))
