"""Run every command on a small disk that is full or read-only, from the start or from a moment during the run.

python tests/full_disk.py FOLDER prints a JSON object with the exit code and the last output line of each try. For
training runs whose disk fails during the run, it also has the exit code of the run that is resumed once the disk is
writable again. FOLDER/undisturbed is an undisturbed training run; the others are FOLDER/run-N.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import PROJECT, speech_sample, text_sample, write_manifest
from forks import preparing, start, training, wait
from launcher import RANDOM, overriding

from higgs_ds.adapters import merge
from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base
from higgs_ds.checkpoints.folder import read_state
from higgs_ds.checkpoints.save import publish
from higgs_ds.options.command_line import parse_generate_options, parse_merge_options
from higgs_ds.reporting.metrics_log import MetricsLog
from higgs_ds.speech import generate

FULL, READ_ONLY = "full", "read-only"
KIB_LEFT = [0, 2, 900, 1800, 2500, 2800]  # the random base's adapter takes 800 KiB, a checkpoint 2,400


def train(output_dir: Path, cache: Path, manifest: Path, *more: str) -> Callable[[], None]:
    options = (
        f"--deepspeed {PROJECT}/ds_configs/zero0.json --output_dir {output_dir} --cache_dir {cache} --lr 1e-3 "
        f"--train_manifest {manifest} --allow_text_targets --precision fp32 --batch_size 1 --grad_accum 1 "
        "--log_steps 1 --val_steps 100 --save_steps 1 --max_steps 8"
    )
    return training(overriding([*RANDOM, *options.split(), *more]))


def last_words(log: Path) -> str:
    """Return the last line of a run's output, or the whole output if it has a traceback."""
    text = log.read_text() if log.is_file() else ""
    return text if "Traceback" in text else (text.splitlines() or [""])[-1]


@contextlib.contextmanager
def small_disk(mib: int, how: str | None = None, kib_left: int = 0) -> Iterator[Path]:
    """Mount a disk of `mib` MiB, full or read-only if `how` says so."""
    disk = Path(tempfile.mkdtemp())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", disk], check=True)
    try:
        make_unwritable(disk, how, kib_left)
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()


def make_unwritable(disk: Path, how: str | None, kib_left: int = 0) -> None:
    if how == FULL:
        with (disk / "filler").open("wb", buffering=0) as filler:
            filler.write(bytes(max(0, shutil.disk_usage(disk).free - 1024 * kib_left)))
    elif how == READ_ONLY:
        # It fails while a file is open for writing, which never takes long.
        while subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True, check=False).returncode:
            time.sleep(0.001)


def make_writable(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    (disk / "filler").unlink(missing_ok=True)


def during_a_run(folder: Path, cache: Path, manifest: Path) -> list[dict[str, object]]:
    """Make the disk fail after the second checkpoint, and then writable again."""
    tries: list[dict[str, object]] = []
    with small_disk(40) as disk:
        for how, kib_left in [*((FULL, kib) for kib in KIB_LEFT), (READ_ONLY, 0)]:
            run = disk / f"run-{len(tries)}"
            main, log = train(run, cache, manifest, "--resume", "auto"), folder / f"{run.name}.log"
            pids = start(1, main, log)
            while not (run / "checkpoint-2").is_dir():
                assert not os.waitpid(pids[0], os.WNOHANG)[0], log.read_text()
                time.sleep(0.001)
            make_unwritable(disk, how, kib_left)
            codes, words = wait(pids, 120), last_words(log)
            make_writable(disk)
            again = wait(start(1, main, log), 300)
            tries.append({"how": how, "codes": codes, "words": words, "again": again})
            shutil.copytree(run, folder / run.name)
            shutil.rmtree(run)
    return tries


def from_the_start(folder: Path, cache: Path, base: Path) -> dict[str, dict[str, object]]:
    clips = [speech_sample(f"Clip {i}.", f"{who}_00.flac") for i, who in enumerate(("anna", "ben", "carla"))]
    manifest = write_manifest(folder / "clips.jsonl", clips)
    one_bad = write_manifest(folder / "bad.jsonl", [*clips, speech_sample("Gone.", "gone.flac")])
    adapter, newest = folder / "undisturbed" / "lora_adapters", folder / "undisturbed" / "checkpoint-8"
    prepare = ["--base_ckpt", str(base), "--train_manifest"]
    speak = ["--lora_adapter_path", str(adapter), "--text", "Hello.", "--max_new_tokens", "12", "--output"]
    results = {}

    def record(name: str, main: Callable[[], None]) -> None:
        log = folder / f"{name}.log"
        results[name] = {"codes": wait(start(1, main, log), 120), "words": last_words(log)}

    for how in (FULL, READ_ONLY):
        with small_disk(1, how) as disk:
            record(f"output, {how}", train(disk / "run", cache, manifest))
            record(f"cache, {how}", preparing([*prepare, str(manifest), "--cache_dir", str(disk / "cache")]))
            built_in = preparing(["--train_manifest", str(manifest), "--cache_dir", str(disk / "cache")])
            record(f"built-in base, {how}", built_in)
            listed = ["--cache_dir", str(folder / how), "--skip_bad", str(disk / "bad.txt")]
            record(f"list of bad samples, {how}", preparing([*prepare, str(one_bad), *listed]))
            merged = ["--base_model_path", str(base), "--lora_adapter_path", str(adapter), "--output_path"]
            merge_options = parse_merge_options([*merged, str(disk / "merged")])
            record(f"merged model, {how}", lambda options=merge_options: merge.main(options))
            speak_options = parse_generate_options([*speak, str(disk / "speech.wav")])
            record(f"speech, {how}", lambda options=speak_options: generate.main(options))
            record(f"metrics, {how}", lambda disk=disk: log_a_line(disk))
            record(f"adapters, {how}", lambda disk=disk: publish(newest, disk / "run", read_state(newest), None))
            left = sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file())
            results[f"left on the disk, {how}"] = {"codes": [], "words": " ".join(left)}
    with small_disk(1, FULL, kib_left=20) as disk:  # enough for the index, in pages of 4 KiB, but not for all codes
        record("codes, full", preparing([*prepare, str(manifest), "--cache_dir", str(disk / "cache")]))
    with small_disk(12) as disk:
        record("merged model of a run", train(disk / "run", cache, manifest, "--merge_adapter_with_base"))
    return results


def log_a_line(run: Path) -> None:
    with contextlib.closing(MetricsLog(run, 0, 10)) as log:
        log.write(1, 0.1, {"train/loss": 1.0})


def main(folder: Path) -> None:
    manifest = write_manifest(folder / "samples.jsonl", [text_sample(f"Question {i}?", "Answer.") for i in range(6)])
    cache, log = folder / "cache", folder / "undisturbed.log"
    assert wait(start(1, train(folder / "undisturbed", cache, manifest), log), 300) == [0], log.read_text()
    during = during_a_run(folder, cache, manifest)
    print(json.dumps({"during": during, "start": from_the_start(folder, cache, builtin_base(RANDOM_BASE, cache))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
