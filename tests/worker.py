"""Run jobs in forks of a process that has imported everything; stdin has one job (training or command) per line."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import forks  # before anything that imports torch
import torch.nn.functional as F
from allow_fp16 import allow_fp16
from conftest import native_inputs
from mutants import GRADIENT_MUTANTS, MUTANTS, SPOILING_MUTANTS, V3_MUTANTS
from safetensors.torch import save_file

from higgs_ds.common import distributed
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.training.finish import finish
from higgs_ds.training.loop import main, train
from higgs_ds.training.run import Run
from higgs_ds.training.startup import start


def dump_logits(run: Run, path: Path) -> None:
    """Save the trained model's logits for the first samples, and its inputs in transformers' format."""
    batch = run.train.batch(range(6))
    caught = {}
    higgs = run.engine.engine.module.higgs
    for name in ("text", "audio"):
        head = getattr(higgs, f"{name}_lm_head")
        head.register_forward_pre_hook(
            lambda head, args, name=name: caught.update({f"{name}_logits": F.linear(args[0], head.weight).detach()})
        )
    run.engine.evaluate([batch])
    if distributed.is_main():
        where = {f"{name}_positions": batch.positions[getattr(batch, f"{name}_places")] for name in ("text", "audio")}
        inputs = native_inputs(batch, higgs.config.audio_token_id)
        save_file(inputs | where | {name: logits.contiguous() for name, logits in caught.items()}, path)


def train_all(runs: list[list[str]]) -> None:
    for argv in runs:
        if "--mutant" in argv:
            at = argv.index("--mutant")
            (MUTANTS | GRADIENT_MUTANTS | V3_MUTANTS | SPOILING_MUTANTS)[argv[at + 1]]()  # in this fork only
            argv = argv[:at] + argv[at + 2 :]
        if "fp16" in argv:
            allow_fp16()  # in this fork only
        if "--dump_logits" in argv:
            at = argv.index("--dump_logits")
            run = start(*parse_train_options(argv[:at] + argv[at + 2 :]), FolderLock())
            train(run)
            dump_logits(run, Path(argv[at + 1]))
            finish(run)
        else:
            main(*parse_train_options(argv))


def run_script(command: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    """Do what `python SCRIPT OPTIONS` does in that folder."""
    for path, stream in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(path, os.O_WRONLY), stream.fileno())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "script" in job:
            process = multiprocessing.get_context("fork").Process(target=run_script, kwargs=job["script"])
            process.start()
            process.join(job["timeout_s"])
            print(json.dumps(process.exitcode), flush=True)
            process.kill()
            continue
        os.environ.update(job["environment"])
        pids = forks.start(job["ranks"], lambda runs=job["runs"]: train_all(runs), Path(job["log"]))
        try:
            codes = forks.wait(pids, job["timeout_s"])
        except TimeoutError as error:
            codes = [str(error)]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve()
