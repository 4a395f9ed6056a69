"""Misuse folders, locks, signals and clips in many ways: no traceback, no lost checkpoint, no two writers.

python tests/misuses.py [--only GROUP|NAME] [--list]; the misuses are listed in misuse_list.py.

Each misuse runs in a folder of its own, in forks of this process, two at a time. Checked of every command: it ends in
time, with a documented exit code and the expected one; it prints no traceback; code 2 comes with a line that begins
with "error:" and names an option or a file. Checked of every misuse: each checkpoint that was complete is still
complete and the same, byte by byte; so are the inputs; metrics.jsonl has no line twice; a command that ended on its own
leaves no lock, no temporary file and no process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import forks  # noqa: F401 - before anything that imports torch
from conftest import PROJECT, speech_sample, text_sample, write_manifest
from full_disk import small_disk
from launcher import free_port, overriding, rank_environment
from safetensors.torch import load_file

from higgs_ds import cli
from higgs_ds.checkpoints.folder import why_incomplete
from higgs_ds.common import errors
from higgs_ds.common.files import sha256_of
from higgs_ds.common.interrupts import STOP_SIGNALS
from higgs_ds.common.process import run_command
from higgs_ds.common.run_files import STATE_FILE

Setup = Callable[[], object]  # called in the process of a command, before the command
Digests = dict[str, str]

AT_ONCE = 2
LIMIT_S = 60.0  # for one command
MISUSE_LIMIT_S = 240.0  # a safeguard, for all commands of one misuse
MEMORY_BYTES = 3 << 30  # that a command may take in addition to what its imports have mapped
TAIL = 1200  # characters of output that are shown of a failure
DOCUMENTED = {value for name, value in vars(errors).items() if name.startswith("EXIT_")} - {errors.EXIT_BUG}
DOCUMENTED |= {errors.EXIT_SIGNAL + number for number in STOP_SIGNALS}
_ERROR = re.compile(r"^(.*: )?error: ", re.MULTILINE)  # argparse begins with the program's name
_NAMES_SOMETHING = re.compile(r"--\w|/|\w+\.\w+|\w:")
_LEFT_OVER = re.compile(r"\..+\.tmp(\.old)?|\..*lock(\.takeover)?")


@dataclass(frozen=True)
class Stock:
    """What all misuses start from. They use copies of it, except of the cache and of what they only read."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def base(self) -> Path:
        return next(self.cache.glob("builtin-*/tiny-random-base"))

    def copy(self, name: str, here: Path) -> Path:
        """Return this misuse's copy of a stock folder or file."""
        target = here / (f"{name}.jsonl" if name == "clips" else name)
        if name == "base":
            return target if target.exists() else Path(shutil.copytree(self.base, target))
        source = self.folder / {"adapter": "run/lora_adapters", "clips": "clips.jsonl"}.get(name, name)
        if not target.exists() and source.is_dir():
            shutil.copytree(source, target)
        elif not target.exists():
            shutil.copy(source, target)
        return target


@dataclass
class Job:
    """A started command: its processes, one per rank, and its output."""

    words: str
    pids: list[int]
    out: Path
    err: Path
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Collect the processes that have ended; return whether all have."""
        for pid in set(self.pids) - self.codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def text(self) -> str:
        return "".join(path.read_text(errors="replace") for path in (self.out, self.err) if path.is_file())

    def signal(self, number: int, rank: int = 0) -> None:
        if self.pids[rank] not in self.codes:
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """Kill what is left of the processes and of their children, which are in their process groups."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        while not self.poll():
            time.sleep(0.01)


class Try:
    """One misuse: its folder, its commands, and what is found wrong."""

    def __init__(self, folder: Path, stock: Stock) -> None:
        self.folder: Path = folder
        self.stock: Stock = stock
        self.faults: list[str] = []
        self.jobs: list[Job] = []
        self.last = ""  # output of the first command with a fault, or else of the last command
        self.kept: dict[Path, Digests] = {}  # inputs and checkpoints, which must stay the same
        self.given_up: set[Path] = set()  # folders that the misuse itself destroys
        self.may_be_left: Callable[[], Collection[Path]] = tuple
        folder.mkdir(parents=True)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def check(self, good: object, what: str) -> None:
        if not good:
            self.faults.append(what)

    # Inputs

    def copy(self, name: str) -> Path:
        """This misuse's copy of a stock folder or file; see `build_stock`."""
        return self.stock.copy(name, self.folder)

    def keep(self, *paths: Path) -> None:
        """Demand that files and folders stay the same. Files may be added."""
        for path in paths:
            self.kept[path] = digests_of(path)

    def give_up(self, path: Path) -> None:
        """Allow that a folder changes: the misuse itself does it."""
        self.given_up.add(path)

    def keep_checkpoints(self) -> None:
        for path in self.folder.rglob("checkpoint-*"):
            hidden = any(part.startswith(".") for part in path.relative_to(self.folder).parts)
            if path not in self.kept and not hidden and path.is_dir() and not _why_incomplete(path):
                self.keep(path)

    def options(self, line: str) -> list[str]:
        """Split a command line: {base} and so on are copies of stock, {stock_base} is none, {here} is the folder."""
        copies = _Copies(self)
        return [word.format_map(copies) if "{" in word else word for word in shlex.split(line)]

    # Commands

    def start(
        self,
        command: str,
        *options: object,
        setup: Sequence[Setup] = (),
        ranks: int = 1,
        cache: Path | None = None,
        setup_of: Mapping[int, Sequence[Setup]] | None = None,
    ) -> Job:
        """Start a command of cli.py in the misuse's folder. Of an option that is given again, the last one holds.

        Args:
            setup_of: what else to call in the processes of single ranks.
        """
        self.keep_checkpoints()
        number, port, pids = len(self.jobs), free_port(), []
        words = overriding([str(option) for option in options])
        out, err = self.folder / f"out-{number}.txt", self.folder / f"err-{number}.txt"
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                try:
                    environment = rank_environment(rank, ranks, port) if ranks > 1 or command == "train" else {}
                    _become_command(self.folder, out, err, environment, cache or self.stock.cache)
                    for action in [*setup, *(setup_of or {}).get(rank, ())]:
                        action()
                    run_command(lambda: cli.COMMANDS[command](words, None))
                except SystemExit as end:  # of argparse
                    code = end.code if isinstance(end.code, int) else 1
                except BaseException as error:  # noqa: BLE001 - a fork must not return
                    print(f"Traceback: misuses.py itself: {error!r}", file=sys.stderr)
                    code = 1
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            pids.append(pid)
        return self._add(Job(" ".join([command, *map(str, options)]), pids, out, err))

    def start_process(
        self, argv: Sequence[object], stdout: int | None = None, environment: dict[str, str] | None = None
    ) -> Job:
        """Start a new process, for what a fork cannot show: imports, launchers, pipes."""
        self.keep_checkpoints()
        number = len(self.jobs)
        out, err = self.folder / f"out-{number}.txt", self.folder / f"err-{number}.txt"
        words = [str(word) for word in argv]
        own = {"HIGGS_DS_CACHE": str(self.stock.cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        with out.open("w") as out_file, err.open("w") as err_file:
            process = subprocess.Popen(
                words, cwd=self.folder, env=os.environ | own | (environment or {}), stdin=subprocess.DEVNULL,
                stdout=out_file if stdout is None else stdout, stderr=err_file, start_new_session=True,
            )  # fmt: skip
        process.returncode = 0  # `Job` waits for it
        return self._add(Job(" ".join(words), [process.pid], out, err))

    def _add(self, job: Job) -> Job:
        self.jobs.append(job)
        return job

    def end(self, job: Job, expected: int | Collection[int], *words: str, limit_s: float = LIMIT_S) -> Job:
        """Wait for a command and check it.

        Args:
            expected: the exit code, or those that are allowed; of each rank.
            words: parts of its output.
        """
        wait_until(job.poll, limit_s)
        in_time = job.poll()
        codes = [job.codes.get(pid) for pid in job.pids]
        processes_left = in_time and all(code is not None and code >= 0 for code in codes) and self._has_children(job)
        job.kill()
        text = job.text()
        if not self.faults:
            self.last = f"$ {job.words}\n{text[-TAIL:]}"
        self.check(in_time, f"did not end within {limit_s:g} s: {job.words[:100]}")
        self.check("Traceback" not in text and "misuses.py itself" not in text, "traceback")
        self.check(not processes_left, "left processes behind")
        allowed = [expected] if isinstance(expected, int) else sorted(expected)
        for code in codes if in_time else ():
            assert code is not None
            self.check(code in allowed, f"exit code {code} instead of {' or '.join(map(str, allowed))}")
            self.check(code in DOCUMENTED or code < 0, f"exit code {code} is not documented")
            if code == errors.EXIT_BAD_INPUT:
                error = _ERROR.search(job.err.read_text(errors="replace"))
                self.check(error, 'code 2 without a line that begins with "error:"')
                self.check(not error or _NAMES_SOMETHING.search(text), "the error names no option and no file")
        missing = [word for word in words if word not in text]
        self.check(not missing, f"not in the output: {missing}")
        return job

    def run(
        self,
        command: str,
        *options: object,
        expected: int | Collection[int],
        words: Sequence[str] = (),
        limit_s: float = LIMIT_S,
        setup: Sequence[Setup] = (),
        ranks: int = 1,
        cache: Path | None = None,
        setup_of: Mapping[int, Sequence[Setup]] | None = None,
    ) -> Job:
        job = self.start(command, *options, setup=setup, ranks=ranks, cache=cache, setup_of=setup_of)
        return self.end(job, expected, *words, limit_s=limit_s)

    def line(self, line: str, expected: int | Collection[int], *words: str, setup: Sequence[Setup] = ()) -> Job:
        """Run a command line; see `options`."""
        command, *options = self.options(line)
        return self.run(command, *options, expected=expected, words=words, setup=setup)

    def training(self, out: object = None, *more: object) -> list[object]:
        """Options of a training of three steps, which validates and saves at each."""
        options = (
            f"--base_ckpt {self.stock.base} --deepspeed {PROJECT}/ds_configs/zero0.json --allow_text_targets --lr 1e-3 "
            f"--train_manifest {self.stock.folder}/train.jsonl --val_manifest {self.stock.folder}/val.jsonl "
            "--precision fp32 --batch_size 1 --grad_accum 1 --log_steps 1 --val_steps 1 --save_steps 1 --max_steps 3 "
            "--num_workers 1 --no_report"
        )
        words = [*options.split(), "--output_dir", self.folder / "run" if out is None else out, *more]
        return [*overriding([str(word) for word in words])]

    def resume(self, out: Path | None = None, *more: object, same: bool = True, cache: Path | None = None) -> None:
        """Resume a run with --resume auto: it must reach the end, with the adapter of an undisturbed run."""
        out = out or self.folder / "run"
        last = out / "checkpoint-3"
        if last.is_dir() and re.search(r'_due": true', (last / STATE_FILE).read_text()):
            self.give_up(last)  # it is written again with what is due
        self.run("train", *self.training(out, "--resume", "auto", *more), expected=0, cache=cache)
        name = Path("lora_adapters") / "adapter_model.safetensors"
        result, undisturbed = out / name, self.stock.folder / "run" / name
        self.check(result.is_file(), "no adapter after --resume auto")
        if same and result.is_file():
            expected, found = load_file(undisturbed), load_file(result)  # the order of a file's metadata is not fixed
            equal = all(expected[key].equal(found[key]) for key in expected.keys() | found.keys())
            self.check(equal, "another adapter than that of an undisturbed run")

    def _has_children(self, job: Job) -> bool:
        return not wait_until(lambda: not any(_group_exists(pid) for pid in job.pids), 5)

    # The end

    def close(self) -> None:
        for job in self.jobs:
            job.kill()
        for path, digests in self.kept.items():
            if any(path.is_relative_to(given_up) for given_up in self.given_up):
                continue
            if path.name.startswith("checkpoint-"):
                self.check(_why_incomplete(path) is None, f"LOST CHECKPOINT {path.name}: {_why_incomplete(path)}")
            now = digests_of(path)
            changed = [name for name, digest in digests.items() if now.get(name) != digest]
            self.check(not changed, f"LOST INPUT: {path.name}: changed or removed: {', '.join(changed)[:200]}")
        for path in self.folder.rglob("metrics.jsonl"):
            if path.is_file() and path.stat().st_size:
                self._check_metrics(path)
        if all(code >= 0 for job in self.jobs for code in job.codes.values()):
            left = {path for path in self.folder.rglob(".*") if _LEFT_OVER.fullmatch(path.name)}
            names = sorted(str(path.relative_to(self.folder)) for path in left - set(self.may_be_left()))
            self.check(not names, f"left behind: {', '.join(names)[:200]}")

    def _check_metrics(self, path: Path) -> None:
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            kinds = ("train/loss", "val/loss", "sample/stop_rate")
            seen = [(line["step"], *(kind in line for kind in kinds)) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            self.check(False, f"{path.name}: {error!r}")
            return
        self.check(len(set(seen)) == len(seen), f"TWO WRITERS: {path.name} has a line twice: {seen}")
        self.check(seen == sorted(seen, key=lambda line: line[0]), f"TWO WRITERS: {path.name} is not in order: {seen}")

    @contextlib.contextmanager
    def disk(self, mib: int, how: str | None = None) -> Iterator[Path]:
        """A small disk, full or read-only if `how` says so."""
        with small_disk(mib, how) as disk:
            yield disk

    @staticmethod
    def at(place: str, action: Setup, nth: int = 1) -> Setup:
        """Return a setup that calls `action` before the nth call of a function: MODULE:NAME or MODULE:CLASS.NAME."""

        def install() -> None:
            module, _, path = place.partition(":")
            *parents, name = path.split(".")
            holder = functools.reduce(getattr, parents, importlib.import_module(module))
            original, calls = getattr(holder, name), [0]

            @functools.wraps(original)
            def replacement(*args: object, **options: object) -> object:
                calls[0] += 1
                if calls[0] == nth:
                    action()
                return original(*args, **options)

            setattr(holder, name, replacement)

        return install

    def hold(self, name: str = "held") -> Setup:
        """Return an action that waits until `release` is called."""

        def wait() -> None:
            (self.folder / f"{name}.reached").touch()
            wait_until((self.folder / f"{name}.go").exists, LIMIT_S)

        return wait

    def wait_for(self, job: Job, name: str = "held") -> None:
        reached = wait_until(lambda: job.poll() or (self.folder / f"{name}.reached").exists(), LIMIT_S)
        self.check(reached and not job.poll(), f"did not come to the moment {name!r}: {job.text()[-300:]}")

    def release(self, name: str = "held") -> None:
        (self.folder / f"{name}.go").touch()


class _Copies(dict[str, str]):
    def __init__(self, misuse: Try) -> None:
        super().__init__(here=str(misuse.folder), stock_base=str(misuse.stock.base), stock=str(misuse.stock.folder))
        self.misuse = misuse

    def __missing__(self, name: str) -> str:
        path = self.misuse.copy(name)
        if path not in self.misuse.kept and name not in ("run", "full"):
            self.misuse.keep(path)
        return str(path)


def _become_command(folder: Path, out: Path, err: Path, environment: dict[str, str], cache: Path) -> None:
    """Make this fork look like the new process of a command."""
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update({**environment, "HIGGS_DS_CACHE": str(cache)})
    os.chdir(folder)
    # Forks keep the memory of all imports mapped.
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for path, stream, flags in ((os.devnull, 0, os.O_RDONLY), (out, 1, os.O_WRONLY), (err, 2, os.O_WRONLY)):
        descriptor = os.open(path, flags | (os.O_CREAT | os.O_APPEND if stream else 0))
        os.dup2(descriptor, stream)
        os.close(descriptor)


def wait_until(condition: Callable[[], object], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def digests_of(path: Path) -> Digests:
    if path.is_file():
        return {path.name: sha256_of(path)}
    return {str(file.relative_to(path)): sha256_of(file) for file in sorted(path.rglob("*")) if file.is_file()}


def _why_incomplete(checkpoint: Path) -> str | None:
    """As the product sees it; a checkpoint without its state is not complete, whatever its manifest says."""
    try:
        return why_incomplete(checkpoint) or (None if (checkpoint / "trainer_state.json").is_file() else "no state")
    except RecursionError:
        return "manifest.json is nested too deeply"


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def build_stock(folder: Path) -> Stock:
    """Make the random base, two manifests, a finished run and one of full fine-tuning."""
    stock = Stock(folder)
    clips = [speech_sample(f"Clip {i}.", f"{who}_00.flac", duration=0.4) for i, who in enumerate(("anna", "ben"))]
    builder = Try(folder, stock)
    train = write_manifest(folder / "train.jsonl", [*clips, *(text_sample(f"Question {i}?", "Yes.") for i in range(4))])
    write_manifest(folder / "val.jsonl", [speech_sample("Clip 3.", "carla_00.flac", duration=0.4)])
    write_manifest(folder / "clips.jsonl", clips)
    options = ["--base_ckpt", "tiny-random-base", "--train_manifest", train, "--allow_text_targets"]
    builder.run("prepare", *options, expected=0)
    full = builder.training(folder / "full", "--finetune", "full", "--train_groups", "heads")
    jobs = [builder.start("train", *builder.training(folder / "run")), builder.start("train", *full)]
    for job in jobs:
        builder.end(job, 0)
    builder.line("convert --input_path {stock_base} --output_path {here}/original --to original", 0)
    merge = "merge --base_model_path {stock_base} --lora_adapter_path {here}/run/lora_adapters --no_verify"
    builder.line(f"{merge} --output_path {{here}}/merged", 0)
    (folder / "evaluation.json").write_text(json.dumps({"stop_rate": 0.5}))
    if builder.faults:
        raise SystemExit(f"the stock could not be built: {builder.faults}\n{builder.last}")
    return stock


def supervise(misuse: Callable[[Try], None], folder: Path, stock: Stock, result: Path) -> None:
    """Run one misuse in this process, a fork, and write what is wrong."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    tempfile.tempdir = str(folder / "tmp")
    attempt = Try(folder, stock)
    Path(tempfile.tempdir).mkdir()
    try:
        misuse(attempt)
    except Exception as error:  # noqa: BLE001 - the other misuses go on
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        attempt.check(False, f"misuse_list.py: {error!r} in line {place.tb_lineno if place else '?'}")
    finally:
        attempt.close()
    seconds = time.monotonic() - began
    result.write_text(json.dumps({"faults": attempt.faults, "last": attempt.last, "seconds": seconds}))


def run_all(chosen: Sequence[tuple[str, str, Callable[[Try], None]]], work: Path) -> list[dict[str, object]]:
    """Run the misuses, AT_ONCE at a time, and return their results in order."""
    stock = build_stock(work / "stock")
    results: list[dict[str, object]] = [{} for _ in chosen]
    running: dict[int, tuple[int, float]] = {}
    waiting = list(range(len(chosen)))
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                number = waiting.pop(0)
                pid = os.fork()
                if pid == 0:
                    try:
                        supervise(chosen[number][2], work / str(number), stock, work / f"{number}.json")
                    finally:
                        os._exit(0)
                running[pid] = number, time.monotonic()
            for pid, (number, began) in list(running.items()):
                if time.monotonic() - began > MISUSE_LIMIT_S:
                    os.kill(pid, signal.SIGTERM)
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del running[pid]
                    results[number] = _result_of(work, number)
                    group, name, _ = chosen[number]
                    faults, seconds = results[number]["faults"], results[number]["seconds"]
                    print(f"{'FAIL' if faults else 'good'}  {group}: {name}  ({seconds:.1f} s)", flush=True)
            time.sleep(0.01)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
    return results


def _result_of(work: Path, number: int) -> dict[str, object]:
    path = work / f"{number}.json"
    result = {"faults": ["the misuse did not end in time"], "last": "", "seconds": MISUSE_LIMIT_S}
    if path.is_file():
        result = json.loads(path.read_text())
    shutil.rmtree(work / str(number), ignore_errors=True)
    return result


def main() -> int:
    from misuse_list import GROUPS, MISUSES

    parser = argparse.ArgumentParser(description="Try the misuses of misuse_list.py.")
    parser.add_argument("--only", default="", help="a group, or a part of names")
    parser.add_argument("--list", action="store_true", help="print the names and try nothing")
    options = parser.parse_args()
    chosen = [
        row for row in MISUSES if options.only == row[0] or (options.only not in GROUPS and options.only in row[1])
    ]
    names = [(group, name) for group, name, _ in MISUSES]
    assert len(set(names)) == len(names), "two misuses have the same name"
    if options.list:
        print("\n".join(f"{group}: {name}" for group, name, _ in chosen))
        print(", ".join(f"{sum(row[0] == group for row in chosen)} {group}" for group in GROUPS))
        return 0
    began, work = time.monotonic(), Path(tempfile.mkdtemp(prefix="misuses-"))
    try:
        results = run_all(chosen, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    failed = [(row, result) for row, result in zip(chosen, results, strict=True) if result["faults"]]
    for (group, name, _), result in failed:
        print(f"\n--- {group}: {name}\n" + "\n".join(f"  * {fault}" for fault in result["faults"]))  # type: ignore[attr-defined]
        print(result["last"])
    print(f"\n{'group':<10}{'tried':>6}{'passed':>8}")
    for group in GROUPS:
        tried = sum(row[0] == group for row in chosen)
        print(f"{group:<10}{tried:>6}{tried - sum(row[0] == group for row, _ in failed):>8}")
    print(f"{len(chosen) - len(failed)} of {len(chosen)} passed in {(time.monotonic() - began) / 60:.1f} min")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
