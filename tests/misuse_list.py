"""The misuses that misuses.py tries, by group: rows of tables where one line says it all, else functions.

A row of commands has a name, the allowed exit codes, words of the output, and a command line; in it, {here} is the
misuse's folder, {base}, {adapter}, {run}, {full}, {merged}, {original} and {clips} are copies of stock, which must
stay the same, and {stock} is the stock itself.
"""

# ruff: noqa: E501 - rows of tables
# mypy: disable-error-code=func-returns-value

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import soundfile
from conftest import PROJECT, VOICES, speech_sample, write_manifest

from higgs_ds.checkpoints.folder import manifest_of
from higgs_ds.common.lock import Owner

if TYPE_CHECKING:
    from misuses import Job, Try

    Misuse = Callable[[Try], None]
    Codes = int | Collection[int]

FOLDERS, LOCKS, SIGNALS, CLIPS = GROUPS = ("folders", "locks", "signals", "clips")
MISUSES: list[tuple[str, str, Misuse]] = []
OK, BAD_INPUT, SAVE_FAILED, MERGE_FAILED, STOPPED, LOST_RANK, INTERRUPTED = 0, 2, 3, 5, 6, 7, 130
REFUSED = (BAD_INPUT, SAVE_FAILED)
EITHER = (OK, BAD_INPUT)  # both are sensible; nothing may be lost
CODEC_FILES = "codes/*/*.safetensors"


def misuse(group: str, name: str) -> Callable[[Misuse], Misuse]:
    def add(action: Misuse) -> Misuse:
        MISUSES.append((group, name, action))
        return action

    return add


def add_commands(group: str, rows: str) -> None:
    """Add a misuse for each line: NAME | CODES | WORD, WORD | COMMAND LINE."""
    for row in rows.strip().splitlines():
        name, codes, words, line = (part.strip() for part in row.split("|"))
        allowed = [int(code) for code in codes.split()]
        wanted = [word.strip() for word in words.split(",") if word.strip()]

        def action(t: Try, line: str = line, allowed: Codes = allowed, wanted: Sequence[str] = wanted) -> None:
            make_odd_things(t)
            t.line(line, allowed, *wanted)
            t.check(not (t / "device").is_file(), "LOST INPUT: a device was replaced by a file")

        misuse(group, name)(action)


def make_odd_things(t: Try) -> None:
    """Things that a row may name: a file, links to nothing and to itself, a link upwards, an empty folder."""
    (t / "file").write_text("not a folder\n")
    (t / "nowhere").symlink_to(t / "missing")
    (t / "itself").symlink_to(t / "itself")
    (t / "empty").mkdir()
    (t / "up").mkdir()
    (t / "up" / "again").symlink_to("..")
    (t / "cut.json").write_text('{"learning": ')
    (t / "deep.json").write_text("[" * 100_000)
    (t / "bytes.json").write_bytes(b"\xff\xfe\x00\x01{")
    full_device(t.folder)
    t.keep(t / "file")


def full_device(folder: Path) -> Path:
    """Make a device like /dev/full, which no misuse may name as an output: root can replace it by a file."""
    device = folder / "device"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    except PermissionError:  # in a container
        os.mkfifo(device)
    return device


# fmt: off

# Folders: commands

add_commands(FOLDERS, """
merge: output is the base          | 2   | base       | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {base}
merge: output is the adapter       | 2   | adapter    | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {adapter}
merge: output inside the base      | 0 2 |            | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {base}/merged
merge: output inside the adapter   | 0 2 |            | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {adapter}/merged
merge: output is a file            | 2   | file       | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {here}/file
merge: output below a file         | 2   | file       | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {here}/file/merged
merge: output is a link to nothing | 2 3 | nowhere    | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {here}/nowhere
merge: output is a link to itself  | 2 3 | itself     | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {here}/itself
merge: output in /proc             | 2   | /proc      | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path /proc/self/merged
merge: output is a device          | 2   | device     | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {here}/device
merge: output is the working folder | 2  |            | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path .
merge: output is empty text        | 2   |            | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path ''
merge: output is an empty folder   | 0   |            | merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {here}/empty
merge: base and adapter swapped    | 2   | adapter_config.json | merge --base_model_path {adapter} --lora_adapter_path {base} --output_path {here}/merged
merge: a checkpoint as adapter     | 2   | checkpoint | merge --base_model_path {base} --lora_adapter_path {run}/checkpoint-2 --output_path {here}/merged
merge: a run as adapter            | 2   | run        | merge --base_model_path {base} --lora_adapter_path {run} --output_path {here}/merged
merge: a file as adapter           | 2   | file       | merge --base_model_path {base} --lora_adapter_path {here}/file --output_path {here}/merged
merge: a file as base              | 2   | file       | merge --base_model_path {here}/file --lora_adapter_path {adapter} --output_path {here}/merged
merge: an empty folder as base     | 2   | empty      | merge --base_model_path {here}/empty --lora_adapter_path {adapter} --output_path {here}/merged
merge: the codec is the base       | 2   | codec      | merge --base_model_path {base} --lora_adapter_path {adapter} --codec_ckpt {base} --output_path {here}/merged
blend: output is an adapter        | 2   | adapter    | blend {adapter}=0.5 {adapter}=0.5 --output_path {adapter}
blend: output inside an adapter    | 0 2 |            | blend {adapter}=0.5 --output_path {adapter}/blend
blend: output is a file            | 2   | file       | blend {adapter}=0.5 --output_path {here}/file
blend: output is a link to nothing | 2 3 | nowhere    | blend {adapter}=0.5 --output_path {here}/nowhere
blend: a run, a file and nothing   | 2   | run, file, 3 problems | blend {run}=0.5 {here}/file=0.5 {here}/none=1 --output_path {here}/new
blend: no weight                   | 2   | ADAPTER=WEIGHT | blend {adapter} --output_path {here}/new
convert: output is the input       | 2   | base       | convert --input_path {base} --output_path {base} --to original
convert: output inside the input   | 0 2 |            | convert --input_path {base} --output_path {base}/original --to original
convert: output is a file          | 2   | file       | convert --input_path {base} --output_path {here}/file --to original
convert: output is a link to nothing | 2 3 | nowhere  | convert --input_path {base} --output_path {here}/nowhere --to original
convert: input is a run            | 2   | run        | convert --input_path {run} --output_path {here}/new --to original
convert: input is a link to itself | 2   | itself     | convert --input_path {here}/itself --output_path {here}/new --to original
export: checkpoint of LoRA         | 2   | checkpoint-2 | export --checkpoint_path {run}/checkpoint-2 --output_path {here}/new
export: the run, not a checkpoint  | 2   | full       | export --checkpoint_path {full} --output_path {here}/new
export: output is the checkpoint   | 2   | checkpoint-3 | export --checkpoint_path {full}/checkpoint-3 --output_path {full}/checkpoint-3
export: output inside the checkpoint | 0 2 |          | export --checkpoint_path {full}/checkpoint-3 --output_path {full}/checkpoint-3/model
export: output is a file           | 2   | file       | export --checkpoint_path {full}/checkpoint-3 --output_path {here}/file
export: checkpoint is a file       | 2   | file       | export --checkpoint_path {here}/file --output_path {here}/new
evaluate: output is a file         | 2   | file       | evaluate --test_manifest {clips} --base_model_path {base} --output_dir {here}/file
evaluate: compared with a folder   | 2   | empty      | evaluate --test_manifest {clips} --base_model_path {base} --output_dir {here}/new --compare_with {here}/empty
evaluate: compared with half JSON  | 2   | cut.json   | evaluate --test_manifest {clips} --base_model_path {base} --output_dir {here}/new --compare_with {here}/cut.json
evaluate: compared with deep JSON  | 2   | deep.json  | evaluate --test_manifest {clips} --base_model_path {base} --output_dir {here}/new --compare_with {here}/deep.json
evaluate: a run as base            | 2   | run        | evaluate --test_manifest {clips} --base_model_path {run} --output_dir {here}/new
generate: output is a folder       | 2   | empty      | generate --base_model_path {base} --text Hi --output {here}/empty
generate: output is the base's file | 2  | config.json | generate --base_model_path {base} --text Hi --output {base}/config.json
generate: text in a folder         | 2   | empty      | generate --base_model_path {base} --text_file {here}/empty --output {here}/a.wav
generate: text of a device         | 2   | device     | generate --base_model_path {base} --text_file {here}/device --output {here}/a.wav
generate: a speaker of no record   | 2   | speaker    | generate --base_model_path {base} --text Hi --speaker anna --output {here}/a.wav
generate: output is a link to itself | 0 2 3 |        | generate --base_model_path {base} --text Hi --max_new_tokens 4 --output {here}/itself/a.wav
validate_checkpoint_dir: a file    | 2   | file       | validate_checkpoint_dir {here}/file
validate_checkpoint_dir: a run     | 2   | checkpoint | validate_checkpoint_dir {run}
validate_checkpoint_dir: a link to itself | 2 | itself | validate_checkpoint_dir {here}/itself
validate_checkpoint_dir: /proc/self | 2  | /proc      | validate_checkpoint_dir /proc/self
validate_adapter: a file           | 2   | file       | validate_adapter {here}/file
validate_adapter: the wrong base   | 2   | merged     | validate_adapter {stock}/run/lora_adapters --base_model_path {stock}/merged/missing
find_lora_adapters: links upwards  | 0   | no adapter | find_lora_adapters {here}/up
find_lora_adapters: a file         | 2   | file       | find_lora_adapters {here}/file
train: DeepSpeed file is a folder  | 2   | empty      | train --deepspeed {here}/empty --output_dir {here}/run --base_ckpt {stock_base}
train: DeepSpeed file is deep      | 2   | deep.json  | train --deepspeed {here}/deep.json --output_dir {here}/run --base_ckpt {stock_base}
train: DeepSpeed file is no text   | 2   | bytes.json | train --deepspeed {here}/bytes.json --output_dir {here}/run --base_ckpt {stock_base}
train: --config is a folder        | 2   | empty      | train --config {here}/empty
train: --config is deep            | 2   | deep.json  | train --config {here}/deep.json
train: --config is no text         | 2   | bytes.json | train --config {here}/bytes.json
train: the adapter as base         | 2   | adapter    | train --base_ckpt {adapter} --output_dir {here}/new
train: --init_from is the base     | 2   | --init_from | train --init_from {stock_base} --output_dir {here}/new --base_ckpt {stock_base}
train: --init_from is a file       | 2   | file       | train --init_from {here}/file --output_dir {here}/new --base_ckpt {stock_base}
train: --init_from is a link to itself | 2 | itself   | train --init_from {here}/itself --output_dir {here}/new --base_ckpt {stock_base}
train: --init_from is the own output | 2 | run        | train --init_from {run}/lora_adapters --output_dir {run} --base_ckpt {stock_base}
train: output of --init_from is a link to itself | 2 3 | itself | train --init_from {adapter} --output_dir {here}/itself --base_ckpt {stock_base}
train: manifest is an empty folder | 2   | empty      | train --train_manifest {here}/empty --output_dir {here}/new --base_ckpt {stock_base}
train: manifest is a link to itself | 2  | itself     | train --train_manifest {here}/itself --output_dir {here}/new --base_ckpt {stock_base}
train: links to themselves as manifests | 2 | itself   | train --train_manifest {here}/itself {clips} --output_dir {here}/new --base_ckpt {stock_base}
train: a manifest twice            | 2   | --mix      | train --train_manifest {clips} {clips} --output_dir {here}/new --base_ckpt {stock_base}
prepare: a mix of another length   | 2   | --mix      | prepare --train_manifest {clips} --mix 1 2 --base_ckpt {stock_base}
prepare: manifest is a link to nothing | 2 | nowhere  | prepare --train_manifest {here}/nowhere --base_ckpt {stock_base}
prepare: manifest is a folder of links upwards | 2 | again | prepare --train_manifest {here}/up --base_ckpt {stock_base}
prepare: manifest is /dev/null     | 2   | /dev/null  | prepare --train_manifest /dev/null --base_ckpt {stock_base}
prepare: --skip_bad is a folder    | 2 3 | empty      | prepare --train_manifest {clips} --base_ckpt {stock_base} --skip_bad {here}/empty
prepare: --skip_bad is the manifest | 2  |            | prepare --train_manifest {clips} --base_ckpt {stock_base} --skip_bad {clips}
prepare: --skip_bad is a full device | 2 3 | device | prepare --train_manifest {clips} --base_ckpt {stock_base} --skip_bad {here}/device
prepare: cache is a file           | 2   | --cache_dir | prepare --train_manifest {clips} --base_ckpt {stock_base} --cache_dir {here}/file
prepare: cache is a link to itself | 2 3 | itself     | prepare --train_manifest {clips} --base_ckpt {stock_base} --cache_dir {here}/itself
prepare: cache in /proc            | 2   | --cache_dir | prepare --train_manifest {clips} --base_ckpt {stock_base} --cache_dir /proc/self/cache
""")

# fmt: on


# Folders: where a training writes


def add_output(name: str, codes: Codes, make: Callable[[Try], object], *words: str) -> None:
    """Add a misuse: a training whose --output_dir is what `make` returns."""

    @misuse(FOLDERS, f"train: output {name}")
    def _(t: Try) -> None:
        make_odd_things(t)
        out = make(t)
        t.run("train", *t.training(f"--output_dir={out}")[:-2], f"--output_dir={out}", expected=codes, words=words)


# fmt: off
add_output("is a file", 2, lambda t: t / "file", "--output_dir")
add_output("is below a file", 2, lambda t: t / "file" / "run", "--output_dir")
add_output("is a link to nothing", (OK, *REFUSED), lambda t: t / "nowhere")
add_output("is a link to itself", REFUSED, lambda t: t / "itself", "itself")
add_output("is in /proc", 2, lambda t: "/proc/self/run", "--output_dir")
add_output("is a device", 2, lambda t: t / "device", "--output_dir")
add_output("has too long a name", 2, lambda t: t / ("r" * 300), "--output_dir")
add_output("has too long a path", 2, lambda t: t.folder.joinpath(*["r" * 200] * 30), "--output_dir")
add_output("is empty text", EITHER, lambda t: "")
add_output("begins with a dash", OK, lambda t: "-run")
add_output("has spaces and quotes", OK, lambda t: t / "my 'own' \"run\"")
add_output("has a line feed", OK, lambda t: t / "a\nrun")
add_output("is not ASCII", OK, lambda t: t / "пробы-声-é")
add_output("is not UTF-8", EITHER, lambda t: t / os.fsdecode(b"run-\xff"))
add_output("has the characters of patterns", OK, lambda t: t / "[a-z]*{x}%s?")
add_output("is named like a checkpoint", OK, lambda t: t / "checkpoint-7")
add_output("is below a link to a folder", OK, lambda t: t / "up" / "again" / "run")
add_output("is the base", EITHER, lambda t: t.options("{base}")[0])
add_output("is the data folder", EITHER, lambda t: paired(t).parent)
add_output("is the cache", EITHER, lambda t: t.stock.folder / "cache" / f"{t.folder.name}-run")
# fmt: on


def paired(t: Try) -> Path:
    """A folder with a clip and its text."""
    folder = t / "clips"
    folder.mkdir()
    shutil.copy(VOICES / "anna_00.flac", folder / "0.flac")
    (folder / "0.txt").write_text("Hello.")
    t.keep(folder)
    return folder / "0.flac"


@misuse(FOLDERS, "train: data folder is the output, then resumed")
def _(t: Try) -> None:
    folder = paired(t).parent
    options = [*t.training(folder), "--train_manifest", folder, "--val_manifest", folder]
    t.run("train", *options, expected=EITHER)
    t.run("train", *options, "--resume", "auto", expected=EITHER)


@misuse(FOLDERS, "train: the output of another run, without --resume")
def _(t: Try) -> None:
    t.copy("run")
    t.run("train", *t.training(), expected=2, words=["--resume auto"])


@misuse(FOLDERS, "train: a null character in the options file's output_dir")
def _(t: Try) -> None:
    (t / "options.json").write_text(json.dumps({"output_dir": "a\0b"}))
    t.run("train", *t.training()[:-2], "--config", t / "options.json", expected=2)


@misuse(FOLDERS, "train: settings.json of another run as --config, into its folder")
def _(t: Try) -> None:
    run = t.copy("run")
    t.run("train", "--config", run / "settings.json", "--output_dir", run, expected=2, words=["--resume auto"])


# Folders: what a run finds when it is resumed


def add_damage(name: str, damage: Callable[[Path, Path], object], codes: Codes = OK, *words: str) -> None:
    """Add a misuse: damage a run (its folder, its checkpoint-2) without the last checkpoint, and resume it."""

    @misuse(FOLDERS, f"resume: {name}")
    def _(t: Try) -> None:
        run = t.copy("run")
        shutil.rmtree(run / "checkpoint-3")
        damage(run, run / "checkpoint-2")
        if codes == OK:
            t.resume()
        else:
            t.run("train", *t.training(run, "--resume", "auto"), expected=codes, words=words)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def to_folder(path: Path) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)
    path.mkdir()


def to_link(path: Path, target: object) -> None:
    path.unlink() if path.is_file() else shutil.rmtree(path)
    path.symlink_to(str(target))


def forged(checkpoint: Path, name: str, content: str | bytes) -> None:
    """Change a file of a checkpoint, and its digest in the manifest: as another version might have written it."""
    (checkpoint / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest_of(checkpoint)))


def state_with(checkpoint: Path, **values: object) -> str:
    return json.dumps(json.loads((checkpoint / "trainer_state.json").read_text()) | values)


def manifest(checkpoint: Path, text: str | bytes) -> None:
    (checkpoint / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)


def leftover(run: Path, name: str, old: bool) -> None:
    (run / name).mkdir()
    if old:
        os.utime(run / name, (1, 1))


# fmt: off
add_damage("the newest checkpoint has no manifest", lambda run, last: (last / "manifest.json").unlink())
add_damage("its manifest is {}", lambda run, last: manifest(last, "{}"))
add_damage("its manifest is half", lambda run, last: cut(last / "manifest.json"))
add_damage("its manifest is a list", lambda run, last: manifest(last, "[1]"))
add_damage("its manifest is very deep", lambda run, last: manifest(last, "[" * 100_000))
add_damage("its manifest is no text", lambda run, last: manifest(last, b"\xff\x00"))
add_damage("its manifest has other values", lambda run, last: manifest(last, '{"trainer_state.json": 7}'))
add_damage("its manifest is a folder", lambda run, last: to_folder(last / "manifest.json"))
add_damage("its state is missing", lambda run, last: (last / "trainer_state.json").unlink())
add_damage("its optimizer is half", lambda run, last: cut(last / "optimizer.safetensors"))
add_damage("its random state is empty", lambda run, last: os.truncate(last / "rng_state.safetensors", 0))
add_damage("its adapter is a file", lambda run, last: (shutil.rmtree(last / "lora_adapters"), (last / "lora_adapters").touch()))
add_damage("it is a file", lambda run, last: (shutil.rmtree(last), last.touch()))
add_damage("it is a link to nothing", lambda run, last: to_link(last, "missing"))
add_damage("it is a link to itself", lambda run, last: to_link(last, last))
add_damage("it has more files than its own", lambda run, last: (last / "notes.txt").write_text("mine"))
add_damage("a forged state that is a list", lambda run, last: forged(last, "trainer_state.json", "[]"), EITHER)
add_damage("a forged state that is half JSON", lambda run, last: forged(last, "trainer_state.json", "{"), EITHER)
add_damage("a state of a later version, with another key", lambda run, last: forged(last, "trainer_state.json", state_with(last, future=1)), EITHER)
add_damage("a forged state with a step that is text", lambda run, last: forged(last, "trainer_state.json", state_with(last, step="2")), EITHER)
add_damage("a forged state with a negative step", lambda run, last: forged(last, "trainer_state.json", state_with(last, step=-5)), EITHER)
add_damage("a forged optimizer that is no tensor file", lambda run, last: forged(last, "optimizer.safetensors", b"x" * 99), EITHER)
add_damage("a forged optimizer of no tensors", lambda run, last: forged(last, "optimizer.safetensors", struct.pack("<Q", 2) + b"{}"), EITHER)
add_damage("a forged random state that is no tensor file", lambda run, last: forged(last, "rng_state.safetensors", b""), EITHER)
add_damage("a manifest that names files outside", lambda run, last: manifest(last, '{"../../../etc": {"size": 1, "sha256": ""}}'))
add_damage("a checkpoint-99 that is empty", lambda run, last: (run / "checkpoint-99").mkdir())
add_damage("a checkpoint-0002 beside checkpoint-2", lambda run, last: last.rename(run / "checkpoint-0002"))
add_damage("a checkpoint with a number of 200 digits", lambda run, last: (run / f"checkpoint-{'9' * 200}").mkdir())
add_damage("all checkpoints are damaged", lambda run, last: [cut(run / f"checkpoint-{n}" / "manifest.json") for n in (1, 2)], EITHER)
add_damage("metrics.jsonl ends in half a line", lambda run, last: cut(run / "metrics.jsonl"))
add_damage("metrics.jsonl is no text", lambda run, last: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n\x00"))
add_damage("metrics.jsonl has lines of another program", lambda run, last: (run / "metrics.jsonl").write_text('[]\n7\n{"step": "x"}\n{}\n'))
add_damage("metrics.jsonl is missing", lambda run, last: (run / "metrics.jsonl").unlink())
add_damage("metrics.jsonl is a folder", lambda run, last: to_folder(run / "metrics.jsonl"), REFUSED)
add_damage("metrics.jsonl leads to a full disk", lambda run, last: to_link(run / "metrics.jsonl", full_device(run)), (*EITHER, SAVE_FAILED))
add_damage("trainer_state.json is a folder", lambda run, last: to_folder(run / "trainer_state.json"), REFUSED)
add_damage("settings.json is a folder", lambda run, last: to_folder(run / "settings.json"), REFUSED)
add_damage("lora_adapters is a file", lambda run, last: (shutil.rmtree(run / "lora_adapters"), (run / "lora_adapters").touch()), (*EITHER, SAVE_FAILED))
add_damage("lora_adapters is a link to nothing", lambda run, last: to_link(run / "lora_adapters", "missing"), (*EITHER, SAVE_FAILED))
add_damage("old left-overs of a killed save", lambda run, last: leftover(run, ".checkpoint-3.abcdefgh.tmp", True))
add_damage("a checkpoint that was moved aside", lambda run, last: last.rename(run / ".checkpoint-2.abcdefgh.tmp.old"))
add_damage("a left-over that is a link to nothing", lambda run, last: (run / ".checkpoint-3.abcdefgh.tmp").symlink_to("missing"), (*EITHER, SAVE_FAILED))
add_damage("a left-over file under a folder's name", lambda run, last: ((run / ".metrics.jsonl.abc.tmp").touch(), os.utime(run / ".metrics.jsonl.abc.tmp", (1, 1))))
# fmt: on


def add_resume_of(name: str, codes: Codes, what: Callable[[Try, Path], object], *words: str) -> None:
    @misuse(FOLDERS, f"--resume of {name}")
    def _(t: Try) -> None:
        make_odd_things(t)
        run = t.copy("run")
        t.run("train", *t.training(run, "--resume", what(t, run)), expected=codes, words=words)


# fmt: off
add_resume_of("a file", 2, lambda t, run: t / "file", "--resume")
add_resume_of("a link to itself", 2, lambda t, run: t / "itself", "--resume")
add_resume_of("the run", 2, lambda t, run: run, "--resume")
add_resume_of("the adapter", 2, lambda t, run: run / "lora_adapters", "--resume")
add_resume_of("the base", 2, lambda t, run: t.stock.base, "--resume")
add_resume_of("empty text", 2, lambda t, run: "", "--resume")
add_resume_of("a word", 2, lambda t, run: "latest", "--resume")
add_resume_of("too long a name", 2, lambda t, run: "x" * 5000, "--resume")
add_resume_of("a checkpoint of full fine-tuning", 2, lambda t, run: t.copy("full") / "checkpoint-2", "checkpoint-2")
# fmt: on


@misuse(FOLDERS, "--resume of an earlier checkpoint, in place")
def _(t: Try) -> None:
    run = t.copy("run")
    for step in (2, 3):
        shutil.rmtree(run / f"checkpoint-{step}")
    t.run("train", *t.training(run, "--resume", run / "checkpoint-1"), expected=0)


@misuse(FOLDERS, "--resume auto with another learning rate")
def _(t: Try) -> None:
    t.copy("run")
    t.run("train", *t.training(None, "--resume", "auto", "--lr", "5"), expected=2, words=["lr"])


# Folders: the cache, models and disks


def add_cache(name: str, codes: Codes, damage: Callable[[Path], object]) -> None:
    """Add a misuse: damage a complete cache, and train with it."""

    @misuse(FOLDERS, f"cache: {name}")
    def _(t: Try) -> None:
        cache = t / "cache"
        shutil.copytree(t.stock.cache, cache)
        damage(cache)
        t.run("train", *t.training(None, "--base_ckpt", "tiny-random-base"), expected=codes, cache=cache)


def of_each(cache: Path, pattern: str, damage: Callable[[Path], object]) -> None:
    found = list(cache.glob(pattern))
    assert found, pattern
    for path in found:
        damage(path)


# fmt: off
add_cache("codes are empty files", OK, lambda cache: of_each(cache, CODEC_FILES, lambda path: os.truncate(path, 0)))
add_cache("codes are half", OK, lambda cache: of_each(cache, CODEC_FILES, cut))
add_cache("codes are of other clips", OK, lambda cache: of_each(cache, CODEC_FILES, lambda path: path.rename(path.with_name("0" * 64 + ".safetensors"))))
add_cache("codes are folders", (OK, BAD_INPUT, SAVE_FAILED), lambda cache: of_each(cache, CODEC_FILES, to_folder))
add_cache("the folder of codes is a file", (BAD_INPUT, SAVE_FAILED), lambda cache: (shutil.rmtree(cache / "codes"), (cache / "codes").touch()))
add_cache("indexes are cut", OK, lambda cache: of_each(cache, "index/*/*", lambda path: path.is_file() and cut(path)))
add_cache("indexes are empty folders", OK, lambda cache: of_each(cache, "index/*", to_folder))
add_cache("the folder of indexes is a file", (BAD_INPUT, SAVE_FAILED), lambda cache: (shutil.rmtree(cache / "index"), (cache / "index").touch()))
add_cache("the base's weights are half", EITHER, lambda cache: cut(next(cache.glob("builtin-*/tiny-random-base/model.safetensors"))))
add_cache("the base's config is missing", EITHER, lambda cache: next(cache.glob("builtin-*/tiny-random-base/config.json")).unlink())
add_cache("the base is a file", (*EITHER, SAVE_FAILED), lambda cache: (shutil.rmtree(next(cache.glob("builtin-*/tiny-random-base"))), next(cache.glob("builtin-*")).joinpath("tiny-random-base").touch()))
# fmt: on


@misuse(FOLDERS, "cache: removed while it is filled")
def _(t: Try) -> None:
    cache = t / "cache"
    gone = t.at("higgs_ds.data.codec:Codec.encode", lambda: shutil.rmtree(cache, ignore_errors=True), 2)
    t.run("train", *t.training(), expected=(OK, BAD_INPUT, SAVE_FAILED), cache=cache, setup=[gone])


@misuse(FOLDERS, "train: the output is removed during a step")
def _(t: Try) -> None:
    gone = t.at("higgs_ds.training.engine:Engine.train_step", lambda: shutil.rmtree(t / "run"), 2)
    t.give_up(t / "run")
    t.run("train", *t.training(), expected=SAVE_FAILED, setup=[gone], words=["run"])


@misuse(FOLDERS, "train: the output is renamed during a step")
def _(t: Try) -> None:
    moved = t.at("higgs_ds.training.engine:Engine.train_step", lambda: (t / "run").rename(t / "moved"), 2)
    t.run("train", *t.training(), expected=SAVE_FAILED, setup=[moved], words=["run"])
    t.may_be_left = lambda: [t / "moved" / ".lock"]


@misuse(FOLDERS, "train: the manifest is removed while clips are encoded")
def _(t: Try) -> None:
    own = shutil.copy(t.stock.folder / "train.jsonl", t.folder)
    gone = t.at("higgs_ds.data.codec:Codec.encode", lambda: os.unlink(own), 1)
    t.run("train", *t.training(None, "--train_manifest", own), expected=EITHER, cache=t / "cache", setup=[gone])


@misuse(FOLDERS, "train: a clip is cut between its check and its encoding")
def _(t: Try) -> None:
    clip = paired(t)
    t.kept.clear()
    gone = t.at("higgs_ds.data.codec:Codec.__init__", lambda: cut(clip), 1)
    options = t.training(None, "--train_manifest", clip.parent, "--val_manifest", clip.parent)
    t.run("train", *options, expected=BAD_INPUT, cache=t / "cache", setup=[gone], words=["0.flac"])


def add_model(name: str, file: str, damage: Callable[[Path], object], line: str, *words: str) -> None:
    """Add a misuse: damage a file of a copy, and run a command that is to refuse it."""

    @misuse(FOLDERS, name)
    def _(t: Try) -> None:
        options = t.options(line)
        damage(t / file)
        t.kept.clear()
        t.run(options[0], *options[1:], expected=BAD_INPUT, words=words)


# fmt: off
MERGE = "merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {here}/new"
EXPORT = "export --checkpoint_path {full}/checkpoint-2 --output_path {here}/new"
add_model("merge: the base's weights are half", "base/model.safetensors", cut, MERGE, "base")
add_model("merge: the base's weights are empty", "base/model.safetensors", lambda path: os.truncate(path, 0), MERGE, "base")
add_model("merge: the base's weights are a folder", "base/model.safetensors", to_folder, MERGE, "base")
add_model("merge: the base's config is half", "base/config.json", cut, MERGE, "config.json")
add_model("merge: the base's config is very deep", "base/config.json", lambda path: path.write_text('{"a":' * 100_000), MERGE, "config.json")
add_model("merge: the base's config is a list", "base/config.json", lambda path: path.write_text("[]"), MERGE, "config.json")
add_model("merge: the adapter's config is a list", "adapter/adapter_config.json", lambda path: path.write_text("[]"), MERGE, "adapter")
add_model("merge: the adapter's config is very deep", "adapter/adapter_config.json", lambda path: path.write_text("[" * 100_000), MERGE, "adapter")
add_model("merge: the adapter's config has a text as rank", "adapter/adapter_config.json", lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"r": "x"})), MERGE, "adapter")
add_model("merge: the adapter's weights are half", "adapter/adapter_model.safetensors", cut, MERGE, "adapter")
add_model("merge: the adapter's weights are a folder", "adapter/adapter_model.safetensors", to_folder, MERGE, "adapter")
add_model("export: the checkpoint's weights are half", "full/checkpoint-2/manifest.json", cut, EXPORT, "checkpoint-2")
add_model("validate_checkpoint_dir: a manifest of {}", "run/checkpoint-2/manifest.json", lambda path: path.write_text("{}"), "validate_checkpoint_dir {run}/checkpoint-2", "checkpoint-2")
add_model("validate_checkpoint_dir: a very deep manifest", "run/checkpoint-2/manifest.json", lambda path: path.write_text("[" * 100_000), "validate_checkpoint_dir {run}/checkpoint-2", "checkpoint-2")
add_model("validate_checkpoint_dir: a forged state", "run/checkpoint-2", lambda path: forged(path, "trainer_state.json", "{}"), "validate_checkpoint_dir {run}/checkpoint-2", "checkpoint-2")
add_model("validate_checkpoint_dir: a forged optimizer", "run/checkpoint-2", lambda path: forged(path, "optimizer.safetensors", b"x"), "validate_checkpoint_dir {run}/checkpoint-2", "checkpoint-2")
add_model("validate_adapter: the config is a folder", "adapter/adapter_config.json", to_folder, "validate_adapter {adapter}", "adapter")
add_model("train: the tokenizer is half", "base/tokenizer.json", cut, "train --base_ckpt {base} --output_dir {here}/run", "base")
# fmt: on


@misuse(FOLDERS, "find_lora_adapters: damaged adapters among good ones")
def _(t: Try) -> None:
    run = t.copy("run")
    to_folder(run / "checkpoint-1" / "lora_adapters" / "adapter_config.json")
    cut(run / "checkpoint-2" / "lora_adapters" / "adapter_config.json")
    os.truncate(run / "checkpoint-3" / "lora_adapters" / "adapter_model.safetensors", 5)
    t.run("find_lora_adapters", run, expected=0, words=["unusable", str(run / "lora_adapters")])


@misuse(FOLDERS, "evaluate: into the folder of the clips")
def _(t: Try) -> None:
    clips = paired(t)
    soundfile.write(clips.with_suffix(".wav"), *soundfile.read(clips)[:2])
    clips.unlink()
    t.kept.clear()
    t.keep(clips.parent)
    t.line(
        f"evaluate --test_manifest {clips.parent} --base_model_path {{stock_base}} --output_dir {clips.parent}", EITHER
    )


@misuse(FOLDERS, "generate: over the reference clip")
def _(t: Try) -> None:
    soundfile.write(t / "me.wav", *soundfile.read(VOICES / "anna_00.flac")[:2])
    t.keep(t / "me.wav")
    line = "generate --base_model_path {stock_base} --text Hi --ref_text Me --max_new_tokens 12 --output {here}/me.wav"
    t.line(f"{line} --ref_audio {t / 'me.wav'}", EITHER)


@misuse(FOLDERS, "prepare: --skip_bad is a clip")
def _(t: Try) -> None:
    clip = paired(t)
    t.line(f"prepare --train_manifest {clip.parent} --base_ckpt {{stock_base}} --skip_bad {clip}", BAD_INPUT)


@misuse(FOLDERS, "prepare: a folder with links in a circle and to nothing")
def _(t: Try) -> None:
    folder = paired(t).parent
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    (folder / "c.wav").symlink_to("missing.wav")
    t.line(f"prepare --train_manifest {folder} --base_ckpt {{stock_base}}", BAD_INPUT, "c.wav")


@misuse(FOLDERS, "prepare: a folder of 300 nested folders")
def _(t: Try) -> None:
    folder = paired(t).parent
    folder.joinpath(*["d"] * 300).mkdir(parents=True)
    t.line(f"prepare --train_manifest {folder} --base_ckpt {{stock_base}}", OK)


for how in ("full", "read-only"):

    @misuse(FOLDERS, f"train: the output's disk is {how}")
    def _(t: Try, how: str = how) -> None:
        with t.disk(1, how) as disk:
            t.run("train", *t.training(disk / "run"), expected=REFUSED, words=["run"])

    @misuse(FOLDERS, f"merge: the output's disk is {how}")
    def _(t: Try, how: str = how) -> None:
        with t.disk(1, how) as disk:
            t.line(
                f"merge --base_model_path {{base}} --lora_adapter_path {{adapter}} --output_path {disk}/new", REFUSED
            )

    @misuse(FOLDERS, f"convert: the output's disk is {how}")
    def _(t: Try, how: str = how) -> None:
        with t.disk(1, how) as disk:
            t.line(f"convert --input_path {{base}} --output_path {disk}/new --to original", REFUSED)

    @misuse(FOLDERS, f"evaluate: the output's disk is {how}")
    def _(t: Try, how: str = how) -> None:
        with t.disk(1, how) as disk:
            t.line(
                f"evaluate --test_manifest {{clips}} --base_model_path {{stock_base}} --output_dir {disk}/new", REFUSED
            )


@misuse(FOLDERS, "train: files may not grow beyond 100 KB")
def _(t: Try) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    t.run("train", *t.training(), expected=SAVE_FAILED, setup=[limit], words=["could not be written"])


# Locks: what a run finds as its lock file


def owner(**changed: object) -> dict[str, Any]:
    return vars(Owner.this_process()) | {"token": "abc"} | changed


def dead() -> dict[str, Any]:
    """The owner of a process of this machine that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return owner(pid=pid)


def write_lock(path: Path, content: object) -> None:
    """Write a lock file: bytes, text, or a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def patience(seconds: float) -> Callable[[], None]:
    """Return a setup that shortens the time for which the lock of another machine is watched."""

    def shorten() -> None:
        from higgs_ds.common import lock

        lock.STALE_AFTER_S = seconds

    return shorten


def add_lock(name: str, codes: Codes, make: Callable[[Path], object], *words: str) -> None:
    """Add a misuse: `make` a lock file in the output folder, then train there."""

    @misuse(LOCKS, f"train: the lock {name}")
    def _(t: Try) -> None:
        (t / "run").mkdir()
        make(t / "run" / ".lock")
        t.may_be_left = lambda: list((t / "run").glob(".lock*"))
        t.run("train", *t.training(), expected=codes, setup=[patience(2)], words=words, limit_s=40)


def nested_lock(path: Path) -> None:
    write_lock(path, "[" * 100_000)


# fmt: off
add_lock("is an empty file", OK, lambda path: path.touch())
add_lock("is half JSON", OK, lambda path: write_lock(path, json.dumps(owner())[:40]))
add_lock("is no text", OK, lambda path: write_lock(path, b"\xff\x00\xfe"))
add_lock("is null bytes, as after a power cut", OK, lambda path: write_lock(path, bytes(300)))
add_lock("is a JSON list", OK, lambda path: write_lock(path, []))
add_lock("is a JSON number", OK, lambda path: write_lock(path, 7))
add_lock("is JSON of another program", OK, lambda path: write_lock(path, {"pid": 1, "cmd": "rsync"}))
add_lock("is very deep JSON", (*EITHER, SAVE_FAILED), nested_lock)
add_lock("is 50 MB", (*EITHER, SAVE_FAILED), lambda path: write_lock(path, b"x" * 50_000_000))
add_lock("is a folder", REFUSED, lambda path: path.mkdir(), ".lock")
add_lock("is a link to nothing", (*EITHER, SAVE_FAILED), lambda path: path.symlink_to("missing"))
add_lock("is a link to itself", REFUSED, lambda path: path.symlink_to(path.name), ".lock")
add_lock("is a link to a full device", (*EITHER, SAVE_FAILED), lambda path: path.symlink_to(full_device(path.parent)))
add_lock("is a FIFO", (*EITHER, SAVE_FAILED), os.mkfifo)
add_lock("is of a dead process", OK, lambda path: write_lock(path, dead()), "taken over")
add_lock("is of a live process", 2, lambda path: write_lock(path, owner()), "--output_dir")
add_lock("is of a process id that was used again", OK, lambda path: write_lock(path, owner(pid=os.getppid(), started=5.0)), "taken over")
add_lock("has a process id of 0", EITHER, lambda path: write_lock(path, owner(pid=0)))
add_lock("has a negative process id", EITHER, lambda path: write_lock(path, owner(pid=-7)))
add_lock("has a process id of 30 digits", EITHER, lambda path: write_lock(path, owner(pid=10**30)))
add_lock("has a text as process id", EITHER, lambda path: write_lock(path, owner(pid="one")))
add_lock("has null as start", EITHER, lambda path: write_lock(path, owner(started=None)))
add_lock("has NaN as start", EITHER, lambda path: write_lock(path, owner(started=float("nan"))))
add_lock("has a start in year 1e20", EITHER, lambda path: write_lock(path, owner(started=1e30)))
add_lock("has no token", OK, lambda path: write_lock(path, {key: value for key, value in dead().items() if key != "token"}))
add_lock("has a list as host", EITHER, lambda path: write_lock(path, owner(host=["a"])))
add_lock("is of another machine, left alone", OK, lambda path: write_lock(path, owner(host="other", boot="x")), "taken over")
add_lock("is of another machine, its time in the future", OK, lambda path: (write_lock(path, owner(host="other", boot="x")), os.utime(path, (time.time() + 1e6,) * 2)), "taken over")
add_lock("is of an earlier start of this machine", OK, lambda path: write_lock(path, owner(boot="x", pid=1)), "taken over")
add_lock("is of another container of this machine", OK, lambda path: write_lock(path, owner(namespace="pid:[1]")), "taken over")
add_lock("is of a dead process, and a takeover was killed", OK, lambda path: (write_lock(path, dead()), path.with_name(".lock.takeover").touch()), "taken over")
add_lock("is of a dead process, and .lock.takeover is a folder", (OK, BAD_INPUT, SAVE_FAILED), lambda path: (write_lock(path, dead()), path.with_name(".lock.takeover").mkdir()))
# fmt: on


@misuse(LOCKS, "train: the lock of another machine, which touches it")
def _(t: Try) -> None:
    lock = t / "run" / ".lock"
    write_lock(lock, owner(host="other", boot="x"))
    t.may_be_left = lambda: [lock]
    job = t.start("train", *t.training(), setup=[patience(10)])
    while not job.poll() and "watching" not in job.text():
        time.sleep(0.05)
    time.sleep(1.5)
    os.utime(lock)
    t.end(job, BAD_INPUT, "other")


@misuse(LOCKS, "train: the lock of another machine, which gives it up")
def _(t: Try) -> None:
    write_lock(t / "run" / ".lock", owner(host="other", boot="x"))
    job = t.start("train", *t.training(), setup=[patience(10)])
    while not job.poll() and "watching" not in job.text():
        time.sleep(0.05)
    (t / "run" / ".lock").unlink()
    t.end(job, OK)


@misuse(LOCKS, "train: the lock of a zombie")
def _(t: Try) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    process = psutil.Process(pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    write_lock(t / "run" / ".lock", owner(pid=pid, started=process.create_time()))
    t.run("train", *t.training(), expected=OK, words=["taken over"])
    os.waitpid(pid, 0)


@misuse(LOCKS, "train: the lock of this Slurm job before its restart")
def _(t: Try) -> None:
    write_lock(t / "run" / ".lock", owner(host="other", boot="x", job="77", restarts=0))
    again = lambda: os.environ.update(SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")  # noqa: E731
    t.run("train", *t.training(), expected=OK, setup=[again], words=["77"])


@misuse(LOCKS, "train: SLURM_RESTART_COUNT is a word")
def _(t: Try) -> None:
    word = lambda: os.environ.update(SLURM_RESTART_COUNT="many")  # noqa: E731
    t.run("train", *t.training(), expected=EITHER, setup=[word])


def add_lost_lock(name: str, change: Callable[[Path], object]) -> None:
    """Add a misuse: change the lock file of a running training, which must end and write nothing more."""

    @misuse(LOCKS, f"train: the lock {name} during a step")
    def _(t: Try) -> None:
        lock = t / "run" / ".lock"
        lost = t.at("higgs_ds.training.engine:Engine.train_step", lambda: change(lock), 2)
        t.run("train", *t.training(), expected=SAVE_FAILED, setup=[lost], words=["lock"])
        t.check(not (t / "run" / "checkpoint-2").exists(), "TWO WRITERS: a checkpoint was written without the lock")
        t.may_be_left = lambda: [lock]


add_lost_lock("is removed", lambda path: path.unlink())
add_lost_lock("is taken over", lambda path: write_lock(path, owner()))
add_lost_lock("is emptied", lambda path: os.truncate(path, 0))
add_lost_lock("becomes a folder", to_folder)
add_lost_lock("becomes a link to nothing", lambda path: to_link(path, "missing"))
add_lost_lock("becomes very deep JSON", nested_lock)


def add_other_lock(
    name: str, line: str, lock: str, content: Callable[[Path], object], codes: Codes, *words: str
) -> None:
    @misuse(LOCKS, name)
    def _(t: Try) -> None:
        content(t / lock)
        t.may_be_left = lambda: [t / lock]
        t.line(line, codes, *words, setup=[patience(2)])


# fmt: off
CONVERT = "convert --input_path {base} --output_path {here}/new --to original"
SKIP = "prepare --train_manifest {clips} --base_ckpt {stock_base} --skip_bad {here}/bad.txt"
EVALUATE = "evaluate --test_manifest {clips} --base_model_path {stock_base} --num_samples 1 --output_dir {here}/run"
add_other_lock("merge: the lock of a live process", MERGE, ".new.lock", lambda path: write_lock(path, owner()), BAD_INPUT, "--output_path")
add_other_lock("merge: the lock of a dead process", MERGE, ".new.lock", lambda path: write_lock(path, dead()), OK, "taken over")
add_other_lock("merge: the lock is a folder", MERGE, ".new.lock", lambda path: path.mkdir(), REFUSED, ".new.lock")
add_other_lock("blend: the lock of a live process", "blend {adapter}=0.5 --output_path {here}/new", ".new.lock", lambda path: write_lock(path, owner()), BAD_INPUT, "--output_path")
add_other_lock("convert: the lock is a FIFO", CONVERT, ".new.lock", os.mkfifo, (*EITHER, SAVE_FAILED))
add_other_lock("convert: the lock of a live process", CONVERT, ".new.lock", lambda path: write_lock(path, owner()), BAD_INPUT, "--output_path")
add_other_lock("export: the lock of a live process", "export --checkpoint_path {full}/checkpoint-3 --output_path {here}/new", ".new.lock", lambda path: write_lock(path, owner()), BAD_INPUT, "--output_path")
add_other_lock("prepare: the list's lock of a live process", SKIP, ".bad.txt.lock", lambda path: write_lock(path, owner()), BAD_INPUT, "--skip_bad")
add_other_lock("evaluate: the lock of a live process", EVALUATE, "run/.evaluation.lock", lambda path: write_lock(path, owner()), BAD_INPUT, "--output_dir")
add_other_lock("evaluate: the lock is JSON of another program", EVALUATE, "run/.evaluation.lock", lambda path: write_lock(path, {}), OK)
# fmt: on


# Locks: two commands at once

IN_A_STEP = "higgs_ds.training.engine:Engine.train_step"
IN_A_MERGE = "higgs_ds.adapters.merge:write_shard"


def second_is_refused(t: Try, place: str, first: str, second: str, *words: str) -> None:
    """Hold the first command at a place, run the second, which is to be refused, and let the first go on."""
    command, *options = t.options(first)
    job = t.start(command, *options, setup=[t.at(place, t.hold())])
    t.wait_for(job)
    t.line(second, BAD_INPUT, *words)
    t.release()
    t.end(job, OK)


def training_line(t: Try, more: str = "") -> str:
    return "train " + " ".join(f"'{word}'" for word in t.training()) + more


@misuse(LOCKS, "two trainings in one folder")
def _(t: Try) -> None:
    second_is_refused(t, IN_A_STEP, training_line(t), training_line(t), "--output_dir")


@misuse(LOCKS, "two trainings in one folder, both with --resume auto")
def _(t: Try) -> None:
    resumed = training_line(t, " --resume auto")
    second_is_refused(t, IN_A_STEP, resumed, resumed, "--output_dir")


@misuse(LOCKS, "two trainings in one folder, one by a link")
def _(t: Try) -> None:
    (t / "link").symlink_to("run")
    second_is_refused(t, IN_A_STEP, training_line(t), training_line(t, " --output_dir link"), "--output_dir")


@misuse(LOCKS, "two trainings in one folder, one by a relative path")
def _(t: Try) -> None:
    second_is_refused(t, IN_A_STEP, training_line(t), training_line(t, " --output_dir ./x/../run"), "--output_dir")


@misuse(LOCKS, "a training while another one of the folder merges at its end")
def _(t: Try) -> None:
    merging = training_line(t, " --merge_adapter_with_base")
    second_is_refused(t, IN_A_MERGE, merging, training_line(t, " --resume auto"), "--output_dir")


@misuse(LOCKS, "two trainings that start at the same moment")
def _(t: Try) -> None:
    jobs = [t.start("train", *t.training()) for _ in range(2)]
    for job in jobs:
        t.end(job, EITHER)
    codes = sorted(code for job in jobs for code in job.codes.values())
    t.check(codes == [OK, BAD_INPUT], f"TWO WRITERS: exit codes {codes}")


@misuse(LOCKS, "three trainings take over the lock of a dead one")
def _(t: Try) -> None:
    shutil.rmtree(t.copy("run") / "checkpoint-3")
    write_lock(t / "run" / ".lock", dead())
    jobs = [t.start("train", *t.training(None, "--resume", "auto")) for _ in range(3)]
    for job in jobs:
        t.end(job, EITHER)
    codes = sorted(code for job in jobs for code in job.codes.values())
    t.check(codes == [OK, BAD_INPUT, BAD_INPUT], f"TWO WRITERS: exit codes {codes}")


@misuse(LOCKS, "two ranks, and a second run of two ranks in their folder")
def _(t: Try) -> None:
    job = t.start("train", *t.training(), ranks=2, setup_of={0: [t.at(IN_A_STEP, t.hold())]})
    t.wait_for(job)
    t.run("train", *t.training(), ranks=2, expected=BAD_INPUT)
    t.release()
    t.end(job, OK)


@misuse(LOCKS, "two merges into one folder")
def _(t: Try) -> None:
    second_is_refused(t, IN_A_MERGE, MERGE, MERGE, "--output_path")


@misuse(LOCKS, "a merge and a conversion into one folder")
def _(t: Try) -> None:
    second_is_refused(t, IN_A_MERGE, MERGE, CONVERT, "--output_path")


@misuse(LOCKS, "two conversions of an adapter into one folder")
def _(t: Try) -> None:
    line = "convert --input_path {adapter} --output_path {here}/new --to original"
    second_is_refused(t, "higgs_ds.adapters.convert:save_file", line, line, "--output_path")


@misuse(LOCKS, "two exports into one folder")
def _(t: Try) -> None:
    line = "export --checkpoint_path {full}/checkpoint-3 --output_path {here}/new"
    second_is_refused(t, "higgs_ds.checkpoints.complete:write_shard", line, line, "--output_path")


@misuse(LOCKS, "a merge into the merged_model of a run that merges")
def _(t: Try) -> None:
    line = "merge --base_model_path {base} --lora_adapter_path {adapter} --output_path {here}/run/merged_model"
    second_is_refused(t, IN_A_MERGE, training_line(t, " --merge_adapter_with_base"), line, "--output_path")


@misuse(LOCKS, "two preparations with one list of bad samples")
def _(t: Try) -> None:
    second_is_refused(t, "higgs_ds.data.preparation:survey", SKIP, SKIP, "--skip_bad")


@misuse(LOCKS, "two evaluations into one folder")
def _(t: Try) -> None:
    second_is_refused(t, "higgs_ds.speech.held_out:speak", EVALUATE, EVALUATE, "--output_dir")


def both_succeed(t: Try, place: str, first: str, second: str) -> None:
    """Hold the first command at a place, run the second, and let the first go on: they do not disturb each other."""
    command, *options = t.options(first)
    job = t.start(command, *options, setup=[t.at(place, t.hold())])
    t.wait_for(job)
    t.line(second, OK)
    t.release()
    t.end(job, OK)


@misuse(LOCKS, "an evaluation into the folder of a running training")
def _(t: Try) -> None:
    both_succeed(t, IN_A_STEP, training_line(t), EVALUATE)


@misuse(LOCKS, "a check of a checkpoint while the next one is written")
def _(t: Try) -> None:
    command, *options = t.options(training_line(t))
    job = t.start(command, *options, setup=[t.at("higgs_ds.checkpoints.save:write_shards", t.hold(), 2)])
    t.wait_for(job)
    t.line("validate_checkpoint_dir {here}/run/checkpoint-1", OK)
    t.line("find_lora_adapters {here}/run", OK)
    t.line("merge --base_model_path {base} --lora_adapter_path {here}/run/lora_adapters --output_path {here}/new", OK)
    t.release()
    t.end(job, OK)


@misuse(LOCKS, "two preparations fill one cache")
def _(t: Try) -> None:
    options = [
        "--train_manifest",
        t.stock.folder / "train.jsonl",
        "--allow_text_targets",
        "--base_ckpt",
        "tiny-random-base",
    ]
    jobs = [t.start("prepare", *options, cache=t / "cache") for _ in range(2)]
    for job in jobs:
        t.end(job, OK)


@misuse(LOCKS, "two trainings in two folders fill one cache")
def _(t: Try) -> None:
    jobs = [t.start("train", *t.training(t / name), cache=t / "cache") for name in ("run", "other")]
    for job in jobs:
        t.end(job, OK)


@misuse(LOCKS, "two generations into one file")
def _(t: Try) -> None:
    command, *options = t.options(GENERATE)
    jobs = [t.start(command, *options) for _ in range(2)]
    for job in jobs:
        t.end(job, EITHER)
    t.check(soundfile.info(str(t / "a.wav")).frames if (t / "a.wav").exists() else True, "the file is damaged")


# Signals, each sent by the process to itself at a moment of a training, which is then resumed

MOMENTS = {
    "at start-up": ("higgs_ds.training.startup:open_for_training", 1),
    "while clips are checked": ("higgs_ds.data.preparation:survey", 1),
    "while clips are encoded": ("higgs_ds.data.codec:Codec.encode", 2),
    "while the model is loaded": ("higgs_ds.training.startup:load_run", 1),
    "in a step": (IN_A_STEP, 2),
    "in the last step": (IN_A_STEP, 3),
    "while metrics are written": ("higgs_ds.reporting.metrics_log:MetricsLog.write", 3),
    "in a validation": ("higgs_ds.training.engine:Engine.evaluate", 2),
    "while samples are spoken": ("higgs_ds.training.samples:speak", 2),
    "in an evaluation": ("higgs_ds.speech.held_out:speak", 2),
    "while a checkpoint is written": ("higgs_ds.checkpoints.save:write_shards", 2),
    "before a checkpoint gets its name": ("higgs_ds.common.files:flush_folder", 3),
    "while the merged model is written": (IN_A_MERGE, 1),
    "while the merged model is verified": ("higgs_ds.adapters.merge:compare_merged", 1),
    "while the report is drawn": ("higgs_ds.reporting.report_page:Reporter.write", 1),
}
STEPS = ("in a step", "in the last step", "while metrics are written", "in a validation", "in an evaluation",
         "while samples are spoken", "while a checkpoint is written", "before a checkpoint gets its name", "while the report is drawn")  # fmt: skip
MORE = {
    "while samples are spoken": ["--sample_steps", "1", "--num_samples", "1"],
    "in an evaluation": ["--evaluate_steps", "1", "--evaluate_samples", "1"],
    "while the merged model is written": ["--merge_adapter_with_base"],
    "while the merged model is verified": ["--merge_adapter_with_base"],
}


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def codes_of(number: int, moment: str) -> Codes:
    """A stop signal ends the steps with code 6; otherwise the code is the shell's for this signal."""
    if number == signal.SIGKILL:
        return (-number,)
    return (STOPPED,) if moment in STEPS else (128 + number,)


def add_signal(number: signal.Signals, moment: str) -> None:
    @misuse(SIGNALS, f"train: {number.name} {moment}")
    def _(t: Try) -> None:
        place, nth = MOMENTS[moment]
        cache = t / "cache" if "encoded" in moment or "checked" in moment else None
        more = MORE.get(moment, [])
        job = t.run(
            "train", *t.training(None, *more), expected=codes_of(number, moment), cache=cache,
            setup=[t.at(place, send(number), nth)],
        )  # fmt: skip
        t.check(job.codes, "did not end")
        t.resume(None, *more, cache=cache)


for sent, sent_at in [
    *itertools.product([signal.SIGINT, signal.SIGKILL], MOMENTS),
    *itertools.product([signal.SIGTERM], ["at start-up", "while clips are encoded", "in a validation",
                       "before a checkpoint gets its name", "while the merged model is written"]),
    *itertools.product([signal.SIGUSR1], ["in a step", "while samples are spoken", "while a checkpoint is written"]),
    *itertools.product([signal.SIGHUP], ["in a step", "while the merged model is verified"]),
]:  # fmt: skip
    add_signal(sent, sent_at)


def add_step(name: str, codes: Codes, *setup: Callable[[], object], resumed: bool = True) -> None:
    """Add a misuse: do something to a training in its second step, and resume it."""

    @misuse(SIGNALS, f"train: {name}")
    def _(t: Try) -> None:
        *before, act = setup
        t.run("train", *t.training(), expected=codes, setup=[*before, t.at(IN_A_STEP, act, 2)])
        if resumed:
            t.resume()


def twice(number: int, pause_s: float) -> Callable[[], None]:
    def act() -> None:
        os.kill(os.getpid(), number)
        time.sleep(pause_s)
        os.kill(os.getpid(), number)

    return act


def storm() -> None:
    for number in [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP] * 40:
        os.kill(os.getpid(), number)


def ignoring(*numbers: int) -> Callable[[], None]:
    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    return ignore


def nothing() -> None:
    pass


# fmt: off
add_step("SIGINT twice at once, as a launcher passes it on", STOPPED, twice(signal.SIGINT, 0.0))
add_step("SIGINT twice in 1.3 s", INTERRUPTED, twice(signal.SIGINT, 1.3))
add_step("SIGTERM twice", STOPPED, twice(signal.SIGTERM, 0.1))
add_step("SIGHUP twice", STOPPED, twice(signal.SIGHUP, 0.1))
add_step("SIGUSR1, then SIGINT", STOPPED, lambda: (send(signal.SIGUSR1)(), send(signal.SIGINT)()))
add_step("120 stop signals at once", STOPPED, storm)
add_step("SIGINT is ignored, as in a shell's background", OK, ignoring(signal.SIGINT), send(signal.SIGINT))
add_step("SIGHUP is ignored, as under nohup", OK, ignoring(signal.SIGHUP), send(signal.SIGHUP))
add_step("SIGTERM was ignored by the parent", (OK, STOPPED), ignoring(signal.SIGTERM), send(signal.SIGTERM))
add_step("stop signals are blocked", OK, lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}), send(signal.SIGTERM))
add_step("SIGPIPE", OK, send(signal.SIGPIPE))
add_step("SIGWINCH, SIGCHLD and SIGCONT", OK, lambda: [send(n)() for n in (signal.SIGWINCH, signal.SIGCHLD, signal.SIGCONT)])
add_step("SIGUSR2, which has no meaning", -signal.SIGUSR2, send(signal.SIGUSR2))
add_step("SIGALRM of somebody's timer", -signal.SIGALRM, send(signal.SIGALRM))
add_step("SIGQUIT", -signal.SIGQUIT, send(signal.SIGQUIT))
add_step("SIGSEGV, as a library crashes", -signal.SIGSEGV, send(signal.SIGSEGV))
add_step("SIGABRT, as a library gives up", -signal.SIGABRT, send(signal.SIGABRT))
add_step("the CPU time limit's SIGXCPU", -signal.SIGXCPU, send(signal.SIGXCPU))
add_step("standard output is closed", OK, lambda: os.close(1))
add_step("standard error is closed", OK, lambda: os.close(2))
add_step("standard input was closed", OK, lambda: os.close(0), nothing)
add_step("standard output and error were closed by the shell", OK, lambda: (os.close(1), os.close(2)), nothing)
# fmt: on


def broken_pipe(descriptor: int) -> Callable[[], None]:
    def install() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, descriptor)
        os.close(writer)
        os.close(reader)

    return install


# fmt: off
add_step("nobody reads standard output", OK, broken_pipe(1), nothing)
add_step("nobody reads standard error", OK, broken_pipe(2), nothing)
add_step("the reader of standard output ends, then SIGTERM", STOPPED, lambda: (broken_pipe(1)(), send(signal.SIGTERM)()))
add_step("standard output leads to a full disk", OK, lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1), nothing)
# fmt: on


@misuse(SIGNALS, "train: SIGSTOP and SIGCONT in a step")
def _(t: Try) -> None:
    job = t.start("train", *t.training(), setup=[t.at(IN_A_STEP, send(signal.SIGSTOP), 2)])
    stopped = lambda: psutil.Process(job.pids[0]).status() == psutil.STATUS_STOPPED  # noqa: E731
    while not job.poll() and not stopped():
        time.sleep(0.02)
    time.sleep(0.5)
    job.signal(signal.SIGCONT)
    t.end(job, OK)


@misuse(SIGNALS, "train: SIGSTOP for longer than a lock lasts; then SIGCONT beside the run that took over")
def _(t: Try) -> None:
    # As on another machine: the second run does not see the process of the first.
    job = t.start("train", *t.training(), setup=[t.at(IN_A_STEP, send(signal.SIGSTOP), 2)])
    lock = t / "run" / ".lock"
    while not job.poll() and psutil.Process(job.pids[0]).status() != psutil.STATUS_STOPPED:
        time.sleep(0.02)
    write_lock(lock, json.loads(lock.read_text()) | {"host": "other"})
    second = t.start("train", *t.training(None, "--resume", "auto"), setup=[patience(2), t.at(IN_A_STEP, t.hold(), 1)])
    t.wait_for(second)
    job.signal(signal.SIGCONT)
    t.end(job, SAVE_FAILED, "lock")
    t.release()
    t.end(second, OK)


def add_rank(name: str, number: signal.Signals, rank: int, place: str, nth: int, codes: Codes) -> None:
    @misuse(SIGNALS, f"train on two ranks: {number.name} to rank {rank} {name}")
    def _(t: Try) -> None:
        setup, cache = {rank: [t.at(place, send(number), nth)]}, t / "cache"  # a complete cache is not checked again
        t.run("train", *t.training(), expected=codes, ranks=2, setup_of=setup, cache=cache)
        t.run("train", *t.training(None, "--resume", "auto"), expected=OK, ranks=2, cache=cache)


# fmt: off
add_rank("in a step", signal.SIGTERM, 1, IN_A_STEP, 2, STOPPED)
add_rank("in a step", signal.SIGINT, 0, IN_A_STEP, 2, STOPPED)
add_rank("in a step", signal.SIGKILL, 1, IN_A_STEP, 2, (-signal.SIGKILL, LOST_RANK))
add_rank("in a step", signal.SIGKILL, 0, IN_A_STEP, 2, (-signal.SIGKILL, LOST_RANK))
add_rank("in a validation", signal.SIGUSR1, 1, "higgs_ds.training.engine:Engine.evaluate", 2, STOPPED)
add_rank("while it writes a checkpoint", signal.SIGKILL, 0, "higgs_ds.checkpoints.save:write_shards", 2, (-signal.SIGKILL, LOST_RANK))
add_rank("while clips are checked", signal.SIGKILL, 1, "higgs_ds.data.preparation:survey", 1, (-signal.SIGKILL, LOST_RANK))
add_rank("while clips are checked", signal.SIGINT, 0, "higgs_ds.data.preparation:survey", 1, (INTERRUPTED, LOST_RANK, SAVE_FAILED))
# fmt: on


def add_other_signal(line: str, place: str, sent: signal.Signals, nth: int = 1) -> None:
    """Add a misuse: a signal to another command, which is then run again."""
    name = line.split()[0]

    @misuse(SIGNALS, f"{name}: {sent.name}")
    def _(t: Try) -> None:
        command, *options = t.options(line)
        cache = t / "cache" if command == "prepare" else None
        codes = -sent if sent == signal.SIGKILL else 128 + sent
        t.run(command, *options, expected=codes, setup=[t.at(place, send(sent), nth)], cache=cache)
        t.check(not (t / "new").exists(), "a partial result has the final name")
        t.run(command, *options, expected=OK, cache=cache)


# fmt: off
PREPARE = "prepare --train_manifest {clips} --base_ckpt {stock_base}"
GENERATE = "generate --base_model_path {stock_base} --text Hello. --temperature 1 --max_new_tokens 30 --output {here}/a.wav"
for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
    add_other_signal(MERGE, IN_A_MERGE, stop)
    add_other_signal(CONVERT, "higgs_ds.bases.conversion:write_json", stop)
    add_other_signal("export --checkpoint_path {full}/checkpoint-3 --output_path {here}/new", "higgs_ds.checkpoints.complete:write_shard", stop)
    add_other_signal(PREPARE, "higgs_ds.data.codec:Codec.encode", stop, 2)
    add_other_signal(EVALUATE, "higgs_ds.speech.held_out:speak", stop)
add_other_signal(GENERATE, "higgs_ds.speech.generate:write_audio", signal.SIGINT)
add_other_signal("validate_checkpoint_dir {run}/checkpoint-2", "higgs_ds.checkpoints.inspection:read_state", signal.SIGINT)
# fmt: on


TRAIN_SCRIPT = [sys.executable, PROJECT / "launch" / "train.py"]


@misuse(SIGNALS, "launch/train.py: SIGINT at moments of its start, among the imports")
def _(t: Try) -> None:
    # Earlier, Python itself is starting, or imports the command, and shows a traceback; nothing has begun by then.
    for seconds in (0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0):
        job = t.start_process([*TRAIN_SCRIPT, *t.training(t / f"run-{seconds}")])
        time.sleep(seconds)
        job.signal(signal.SIGINT)
        t.end(job, (OK, STOPPED, INTERRUPTED, -signal.SIGINT))


@misuse(SIGNALS, "higgs-ds: the reader of --help ends after a line")
def _(t: Try) -> None:
    line = f"{sys.executable} -m higgs_ds train --help | head -n 1"
    t.end(t.start_process(["bash", "-o", "pipefail", "-c", line]), OK)


@misuse(SIGNALS, "launch/find_lora_adapters.py: standard output is closed by the shell")
def _(t: Try) -> None:
    line = f"{sys.executable} {PROJECT}/launch/find_lora_adapters.py {t.stock.folder / 'run'} >&- 2>&-"
    t.end(t.start_process(["bash", "-c", line]), OK)


@misuse(SIGNALS, "deepspeed: SIGTERM to the launcher alone in a step")
def _(t: Try) -> None:
    deepspeed = Path(sys.executable).parent / "deepspeed"
    environment = {"PATH": f"{deepspeed.parent}:{os.environ['PATH']}"}
    options = t.training(None, "--max_steps", "400", "--save_steps", "400", "--val_steps", "400")
    command = [deepspeed, "--num_nodes", "1", "--num_gpus", "1", "--master_port", str(_free_port()), *TRAIN_SCRIPT[1:]]
    job = t.start_process([*command, *options], environment=environment)
    while not job.poll() and not (t / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    job.signal(signal.SIGTERM)
    # The launcher ends before its ranks do, which save a checkpoint and then end.
    children = lambda: [p for p in psutil.process_iter() if _is_of(p, str(t / "run"))]  # noqa: E731
    deadline = time.monotonic() + 40
    while children() and time.monotonic() < deadline:
        time.sleep(0.2)
    t.check(not children(), "ranks outlive their launcher")
    t.end(job, (STOPPED, -signal.SIGTERM, 128 + signal.SIGTERM, 1))
    t.check(list((t / "run").glob("checkpoint-*")), "no checkpoint")
    t.faults = [fault for fault in t.faults if "exit code" not in fault]  # DeepSpeed's own


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_of(process: psutil.Process, word: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return word in process.cmdline() and process.pid != os.getpid()
    return False


# Clips: their content

RATE = 24000
TONE = (0.3 * np.sin(np.arange(RATE // 2) / 20)).astype(np.float32)


def encoded(samples: Any = TONE, rate: int = RATE, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, rate, subtype, format=kind)
    return content.getvalue()


def riff(tag: int, channels: int, rate: int, bits: int, data: bytes, claimed: int | None = None) -> bytes:
    """A WAV file with any header, true or not."""
    align = channels * bits // 8
    fmt = struct.pack("<HHIIHH", tag, channels, rate, (rate * align) & 0xFFFFFFFF, align & 0xFFFF, bits)
    body = (
        b"WAVEfmt "
        + struct.pack("<I", 16)
        + fmt
        + b"data"
        + struct.pack("<I", len(data) if claimed is None else claimed)
    )
    return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data


PCM = (TONE * 30000).astype("<i2").tobytes()


def floats(*odd: float) -> bytes:
    samples = TONE.copy()
    samples[100 : 100 + len(odd)] = odd
    return encoded(samples, subtype="FLOAT")


# Name, exit codes, words of the error, the file's name, its bytes.
# fmt: off
CLIP_FILES: list[tuple[str, Codes, str, str, bytes]] = [
    ("an empty file", 2, "cannot be read", "a.wav", b""),
    ("WAV without samples", 2, "no samples", "a.wav", encoded(TONE[:0])),
    ("one sample", 2, "shorter than one frame", "a.wav", encoded(TONE[5:6])),
    ("a frame less one sample", 2, "shorter than one frame", "a.wav", encoded(TONE[:959])),
    ("text as WAV", 2, "cannot be read", "a.wav", b"Hello, I am a clip.\n" * 50),
    ("an HTML page as MP3", 2, "cannot be read", "a.mp3", b"<html><body>404 Not Found</body></html>" * 20),
    ("a Git LFS pointer", 2, "cannot be read", "a.flac", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    ("half a RIFF header", 2, "cannot be read", "a.wav", encoded()[:20]),
    ("a header alone", 2, "", "a.wav", encoded()[:44]),
    ("WAV cut in the middle", EITHER, "", "a.wav", encoded()[: len(encoded()) // 2]),
    ("FLAC cut in the middle", 2, "a.flac", "a.flac", encoded(kind="FLAC")[:3000]),
    ("Ogg cut in the middle", EITHER, "", "a.ogg", encoded(subtype="VORBIS", kind="OGG")[:2500]),
    ("MP3 cut in the middle", EITHER, "", "a.mp3", encoded(subtype="MPEG_LAYER_III", kind="MP3")[:1500]),
    ("FLAC with a flipped byte", EITHER, "", "a.flac", bytes(b ^ (i == 5000) * 255 for i, b in enumerate(encoded(kind="FLAC")))),
    ("FLAC under the name of a WAV", 0, "", "a.wav", encoded(kind="FLAC")),
    ("WAV without a suffix", 0, "", "clip", encoded()),
    ("WAV under the name .raw", 0, "", "a.raw", encoded()),
    ("a header that claims less", EITHER, "", "a.wav", riff(1, 1, RATE, 16, PCM, claimed=9600)),
    ("a header that claims 4 GB", EITHER, "", "a.wav", riff(1, 1, RATE, 16, PCM, claimed=0xFFFFFFFF)),
    ("a header that claims nothing", EITHER, "", "a.wav", riff(1, 1, RATE, 16, PCM, claimed=0)),
    ("a rate of 0 Hz", 2, "a.wav", "a.wav", riff(1, 1, 0, 16, PCM)),
    ("a rate of 1 Hz", 2, "", "a.wav", riff(1, 1, 1, 16, PCM[:2000])),
    ("a rate of 2 GHz", 2, "", "a.wav", riff(1, 1, 2_000_000_011, 16, PCM)),
    ("a rate of 4294967295 Hz", 2, "", "a.wav", riff(1, 1, 0xFFFFFFFF, 16, PCM)),
    ("a rate of 44101 Hz", EITHER, "", "a.wav", riff(1, 1, 44101, 16, PCM)),
    ("a rate of 192 kHz", 0, "", "a.wav", encoded(np.tile(TONE, 4), 192_000)),
    ("0 channels", 2, "cannot be read", "a.wav", riff(1, 0, RATE, 16, PCM)),
    ("7 channels", 0, "", "a.wav", encoded(np.stack([TONE] * 7, 1))),
    ("1000 channels", EITHER, "", "a.wav", riff(1, 1000, RATE, 16, PCM * 90)),
    ("65535 channels", EITHER, "", "a.wav", riff(1, 65535, RATE, 16, PCM * 90)),
    ("8 bits", 0, "", "a.wav", encoded(subtype="PCM_U8")),
    ("24 bits", 0, "", "a.wav", encoded(subtype="PCM_24")),
    ("64-bit floats", 0, "", "a.wav", encoded(subtype="DOUBLE")),
    ("mu-law", 0, "", "a.wav", encoded(subtype="ULAW")),
    ("GSM 6.10", 0, "", "a.wav", encoded(subtype="GSM610")),
    ("IMA ADPCM", 0, "", "a.wav", encoded(subtype="IMA_ADPCM")),
    ("an unknown coding", 2, "cannot be read", "a.wav", riff(0x7777, 1, RATE, 16, PCM)),
    ("3 bits per sample", EITHER, "", "a.wav", riff(1, 1, RATE, 3, PCM)),
    ("a NaN sample", 2, "NaN", "a.wav", floats(float("nan"))),
    ("infinite samples", 2, "infinite", "a.wav", floats(float("inf"), -float("inf"))),
    ("samples of 1e38", EITHER, "", "a.wav", floats(1e38, -1e38)),
    ("denormal samples alone", 2, "silent", "a.wav", encoded(np.full(9600, 1e-40, np.float32), subtype="FLOAT")),
    ("silence", 2, "silent", "a.wav", encoded(np.zeros(RATE, np.float32))),
    ("a constant", 0, "", "a.wav", encoded(np.full(RATE // 2, 0.5, np.float32))),
    ("clipped throughout", 0, "", "a.wav", encoded(np.sign(TONE))),
    ("12 minutes", 2, "--max_clip_s", "a.flac", encoded(np.tile(TONE, 1440), kind="FLAC")),
    ("a ZIP file as WAV", 2, "cannot be read", "a.wav", b"PK\x03\x04" + bytes(500)),
    ("random bytes as Ogg", 2, "cannot be read", "a.ogg", b"OggS" + np.random.default_rng(1).bytes(4000)),
]
# fmt: on


def check_clip(t: Try, clip: object, codes: Codes, word: str, **stretch: object) -> None:
    """Prepare a manifest of one good clip and a bad one, in a cache of its own."""
    entry = speech_sample("Bad.", "anna_00.flac")
    entry["messages"][-1]["content"] = {"type": "audio", "audio_url": clip, **stretch}
    write_manifest(t / "m.jsonl", [speech_sample("Good.", "anna_00.flac", duration=0.4), entry])
    words = [word] if word else []
    if codes == BAD_INPUT:
        words.append("m.jsonl:2")
    prepare(t, t / "m.jsonl", codes, *words)


def prepare(t: Try, path: Path, codes: Codes, *words: str, more: Sequence[object] = ()) -> Job:
    options = ["--base_ckpt", t.stock.base, "--train_manifest", path, "--num_workers", 2, *more]
    return t.run("prepare", *options, expected=codes, words=words, cache=t / "cache", limit_s=30)


for title, allowed, said, file_name, content in CLIP_FILES:

    @misuse(CLIPS, f"clip: {title}")
    def _(t: Try, codes: Codes = allowed, word: str = said, name: str = file_name, data: bytes = content) -> None:
        (t / name).write_bytes(data)
        check_clip(t, name, codes, word)


def add_place(name: str, codes: Codes, word: str, make: Callable[[Try], object], **stretch: object) -> None:
    @misuse(CLIPS, f"clip: {name}")
    def _(t: Try) -> None:
        check_clip(t, make(t), codes, word, **stretch)


def fifo(t: Try) -> str:
    os.mkfifo(t / "fifo.wav")
    return "fifo.wav"


def socket_file(t: Try) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(t / "s.wav"))
    return "s.wav"


def linked(t: Try) -> str:
    (t / "x.wav").symlink_to("x.wav")
    return "x.wav"


# fmt: off
GOOD = str(VOICES / "anna_00.flac")
add_place("a folder", 2, "not a file", lambda t: str(t.folder))
add_place("a FIFO", 2, "not a file", fifo)
add_place("a socket", 2, "not a file", socket_file)
add_place("/dev/null", 2, "not a file", lambda t: "/dev/null")
add_place("/dev/zero", 2, "not a file", lambda t: "/dev/zero")
add_place("a file of /proc", 2, "/proc", lambda t: "/proc/self/status")
add_place("a link to itself", 2, "x.wav", linked)
add_place("a missing file", 2, "no such file", lambda t: "missing.wav")
add_place("below a file", 2, "", lambda t: f"{GOOD}/a.wav")
add_place("a URL", 2, "URL", lambda t: "https://example.org/a.wav")
add_place("a data URL", 2, "URL", lambda t: "data:audio/wav;base64,AAAA")
add_place("a null character in its path", 2, "null", lambda t: "a\0.wav")
add_place("half of a surrogate pair in its path", 2, "", lambda t: "\ud800.wav")
add_place("a path of 300 characters", 2, "", lambda t: "a" * 300 + ".wav")
add_place("a path of 10,000 characters", 2, "", lambda t: "a/" * 5000 + "a.wav")
add_place("an empty path", 2, "", lambda t: "")
add_place("a number as path", 2, "", lambda t: 7)
add_place("a list as path", 2, "", lambda t: [GOOD])
add_place("a home folder as path", 2, "", lambda t: "~/a.wav")
add_place("a negative offset", 2, "offset", lambda t: GOOD, offset=-1)
add_place("a negative duration", 2, "duration", lambda t: GOOD, duration=-1)
add_place("a duration of 0", 2, "duration", lambda t: GOOD, duration=0)
add_place("a duration of a microsecond", 2, "", lambda t: GOOD, duration=1e-6)
add_place("an offset beyond the end", 2, "no samples", lambda t: GOOD, offset=1e4)
add_place("a duration beyond the end", 2, "before the end", lambda t: GOOD, duration=1e4)
add_place("an offset of NaN", 2, "offset", lambda t: GOOD, offset=float("nan"))
add_place("an infinite duration", 2, "duration", lambda t: GOOD, duration=float("inf"))
add_place("an offset of 1e300", 2, "", lambda t: GOOD, offset=1e300)
add_place("an offset of 400 digits", 2, "offset", lambda t: GOOD, offset=10**400)
add_place("a text as offset", 2, "offset", lambda t: GOOD, offset="1.5")
add_place("true as duration", 2, "duration", lambda t: GOOD, duration=True)
add_place("raw_audio that is not base64", 2, "base64", lambda t: "", raw_audio="!!!")
add_place("raw_audio of damaged base64", 2, "", lambda t: "", raw_audio=base64.b64encode(encoded()).decode()[:-101])
add_place("raw_audio of a text", 2, "", lambda t: "", raw_audio=base64.b64encode(b"hello").decode())
add_place("raw_audio that is a number", 2, "raw_audio", lambda t: "", raw_audio=7)
add_place("raw_audio that is good", 0, "", lambda t: "", raw_audio=base64.b64encode(encoded()).decode())
add_place("a misspelt key", 2, "duratoin", lambda t: GOOD, duratoin=1)
# fmt: on


# Clips: manifests

# fmt: off
LINE = json.dumps(speech_sample("Good.", "anna_00.flac", duration=0.4))
DEEP = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
MANIFESTS: list[tuple[str, Codes, str, str, str | bytes]] = [
    ("JSONL with a byte order mark", 0, "", "m.jsonl", b"\xef\xbb\xbf" + LINE.encode()),
    ("JSONL in UTF-16", 2, "m.jsonl", "m.jsonl", LINE.encode("utf-16")),
    ("JSONL in Latin-1", 2, "UTF-8", "m.jsonl", LINE.replace("Good", "Gööd").encode("latin-1")),
    ("a key twice", EITHER, "", "m.jsonl", LINE[:-1] + ', "messages": []}'),
    ("a trailing comma", 2, "not JSON", "m.jsonl", LINE[:-1] + ",}"),
    ("single quotes", 2, "m.jsonl", "m.jsonl", LINE.replace('"', "'")),
    ("very deep nesting", 2, "nested", "m.jsonl", f"{LINE}\n{DEEP}\n"),
    ("a very deep first line", 2, "m.jsonl", "m.jsonl", DEEP),
    ("a line of 10 MB", 2, "m.jsonl:2", "m.jsonl", f"{LINE}\n" + '{"messages": "' + "x" * 10_000_000 + '"}'),
    ("a number of a million digits", 2, "m.jsonl:2", "m.jsonl", f'{LINE}\n{{"start_index": {"9" * 1_000_000}}}'),
    ("an array that ends early", 2, "m.json", "m.json", f"[{LINE}, {LINE}"),
    ("text after the array", 2, "m.json", "m.json", f"[{LINE}] {LINE}"),
    ("null, numbers and lists as samples", 2, "m.jsonl:2", "m.jsonl", f"{LINE}\nnull\n7\n[]\n\"x\"\n"),
    ("lines of carriage returns alone", EITHER, "", "m.jsonl", LINE + "\r\r"),
    ("null bytes between lines", 2, "m.jsonl", "m.jsonl", LINE.encode() + b"\n\x00\x00\x00\n"),
    ("an empty file", 2, "m.jsonl", "m.jsonl", ""),
    ("blank lines alone", 2, "m.jsonl", "m.jsonl", "\n\n  \n"),
    ("100,000 bad lines", 2, "99,980 more problems: 100,000", "m.jsonl", f"{LINE}\n" + "{\n" * 100_000),
    ("layout tokens in the text", 2, "<|eot_id|>", "m.jsonl", LINE.replace("Good.", "Good.<|eot_id|>")),
    ("half of a surrogate pair in the text", 2, "UTF-8", "m.jsonl", LINE.replace("Good.", "\\ud800")),
    ("messages of 100,000 turns", 2, "m.jsonl", "m.jsonl", json.dumps({"messages": [{"role": "user", "content": "x"}] * 100_000})),
    ("CSV with an open quote", 2, "m.csv", "m.csv", f'audio,text\n{GOOD},"Hello\n{GOOD},Bye\n'),
    ("CSV with too many fields", 2, "m.csv", "m.csv", f"audio,text\n{GOOD},a,b,c\n"),
    ("CSV with a column twice", 2, "m.csv", "m.csv", f"audio,audio,text\n{GOOD},{GOOD},a\n"),
    ("CSV with null bytes", 2, "m.csv", "m.csv", f"audio,text\n{GOOD},a\0b\n"),
    ("CSV with a field of 1 MB", EITHER, "", "m.csv", f"audio,text\n{GOOD},{'word ' * 200_000}\n"),
    ("CSV of a header alone", 2, "m.csv", "m.csv", "audio,text\n"),
    ("a list with empty fields", 2, "m.txt", "m.txt", f"{GOOD}|\n|text\n||\n"),
    ("Parquet that is text", 2, "m.parquet", "m.parquet", "PAR1 hello PAR1"),
    ("a manifest that is a clip", 2, "m.wav", "m.wav", encoded()),
]
# fmt: on


for title, allowed, said, file_name, text in MANIFESTS:

    @misuse(CLIPS, f"manifest: {title}")
    def _(t: Try, codes: Codes = allowed, word: str = said, name: str = file_name, data: str | bytes = text) -> None:
        (t / name).write_bytes(data.encode() if isinstance(data, str) else data)
        prepare(t, t / name, codes, *([word] if word else []))


@misuse(CLIPS, "manifest: a FIFO that nobody writes")
def _(t: Try) -> None:
    os.mkfifo(t / "m.jsonl")
    prepare(t, t / "m.jsonl", BAD_INPUT, "m.jsonl")


@misuse(CLIPS, "manifest: /dev/zero")
def _(t: Try) -> None:
    prepare(t, Path("/dev/zero"), BAD_INPUT, "/dev/zero")


@misuse(CLIPS, "manifest: /dev/tty or a socket")
def _(t: Try) -> None:
    prepare(t, t / socket_file(t), BAD_INPUT, "s.wav")


def add_parquet(
    name: str,
    codes: Codes,
    word: str,
    table: Callable[[], dict[str, Any]],
    damage: Callable[[Path], object] | None = None,
) -> None:
    @misuse(CLIPS, f"Parquet: {name}")
    def _(t: Try) -> None:
        pyarrow.parquet.write_table(pyarrow.table(table()), t / "m.parquet")
        if damage is not None:
            damage(t / "m.parquet")
        prepare(t, t / "m.parquet", codes, *([word] if word else []))


# fmt: off
add_parquet("columns of another kind", 2, "columns", lambda: {"a": [1], "b": [2]})
add_parquet("audio as numbers", 2, "audio", lambda: {"audio": [1.5], "text": ["Hello."]})
add_parquet("audio as null", 2, "audio", lambda: {"audio": [None], "text": ["Hello."]})
add_parquet("audio as damaged bytes", 2, "row 1", lambda: {"audio": [b"RIFF1234WAVE"], "text": ["Hello."]})
add_parquet("no rows", 2, "m.parquet", lambda: {"audio": pyarrow.array([], pyarrow.string()), "text": pyarrow.array([], pyarrow.string())})
add_parquet("half a file", 2, "m.parquet", lambda: {"audio": [encoded()], "text": ["Hello."]}, cut)
add_parquet("a flipped byte in each 500", (0, 2), "", lambda: {"audio": [encoded()], "text": ["Hello."]}, lambda path: path.write_bytes(bytes(b ^ (i % 500 == 250) for i, b in enumerate(path.read_bytes()))))
# fmt: on


def add_metadata(name: str, codes: Codes, word: str, *samples: dict[str, Any]) -> None:
    @misuse(CLIPS, f"metadata: {name}")
    def _(t: Try) -> None:
        (t / "text.wav").write_text("text")
        (t / "empty.wav").touch()
        (t / "binary.txt").write_bytes(b"\xff\xfe\x00")
        (t / "folder.txt").mkdir()
        os.mkfifo(t / "fifo.txt")
        os.mkfifo(t / "fifo.wav")
        (t / "metadata.json").write_text(json.dumps({"samples": list(samples)}))
        prepare(t, t / "metadata.json", codes, *([word] if word else []))


# fmt: off
RECORDING = {"id": "a", "audio_file": GOOD, "transcript": "Hello."}
add_metadata("an id twice", EITHER, "", RECORDING, RECORDING)
add_metadata("the reference is missing", 2, "missing.wav", RECORDING | {"ref_audio_file": "missing.wav", "ref_transcript": "Me."})
add_metadata("the reference is a text", 2, "text.wav", RECORDING | {"ref_audio_file": "text.wav", "ref_transcript": "Me."})
add_metadata("the reference is a FIFO", 2, "fifo.wav", RECORDING | {"ref_audio_file": "fifo.wav", "ref_transcript": "Me."})
add_metadata("the reference has no text", 2, "ref_transcript", RECORDING | {"ref_audio_file": GOOD})
add_metadata("the transcript is a folder", 2, "folder.txt", {"id": "a", "audio_file": GOOD, "transcript_file": "folder.txt"})
add_metadata("the transcript is a FIFO", 2, "fifo.txt", {"id": "a", "audio_file": GOOD, "transcript_file": "fifo.txt"})
add_metadata("the transcript is /dev/zero", 2, "transcript_file", {"id": "a", "audio_file": GOOD, "transcript_file": "/dev/zero"})
add_metadata("the transcript is no text", 2, "UTF-8", {"id": "a", "audio_file": GOOD, "transcript_file": "binary.txt"})
# fmt: on


def add_reference(name: str, make: Callable[[Try], object]) -> None:
    @misuse(CLIPS, f"generate: the reference is {name}")
    def _(t: Try) -> None:
        options = ["--base_model_path", t.stock.base, "--text", "Hi", "--ref_text", "Me", "--ref_audio", make(t)]
        t.run("generate", *options, expected=BAD_INPUT, words=["--ref_audio"], limit_s=30)


def written(data: bytes) -> Callable[[Try], Path]:
    def write(t: Try) -> Path:
        (t / "r.wav").write_bytes(data)
        return t / "r.wav"

    return write


add_reference("a FIFO", lambda t: t / fifo(t))
add_reference("/dev/zero", lambda t: "/dev/zero")
add_reference("a folder", lambda t: t.folder)
add_reference("an empty file", written(b""))
add_reference("one sample", written(encoded(TONE[:1])))
add_reference("silence", written(encoded(np.zeros(RATE, np.float32))))
add_reference("12 minutes", written(encoded(np.tile(TONE, 1440))))
add_reference("NaN", written(floats(float("nan"))))
add_reference("too long a name", lambda t: "a" * 300 + ".wav")
