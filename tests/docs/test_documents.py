"""Every command in the README and the documents is run, as printed, in a folder like a user's.

Commands of `launch/` run in forks of a process that has imported everything, also those of `deepspeed` on one rank.
Those of a new user, with torchrun and for two machines run in processes of their own. A hub id stands for the
random base in the original layout, placed in the hub's cache. Runs are cut to one step, and eight GPUs to two ranks.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import PROJECT, VOICES, VOICES_MANIFEST, play
from hub_server import TOKEN, local_hub
from launcher import default_port, free_port, run_script
from long_recording import srt_of, write_recording

from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base
from higgs_ds.common.hub import PINNED

pytestmark = pytest.mark.slow

# The others are generated, or record earlier runs.
DOCUMENTS = [
    PROJECT / "README.md", PROJECT / "ds_configs" / "README.md",
    *sorted(path for path in (PROJECT / "docs").glob("*.md") if path.name not in ("benchmarks.md", "log.md")),
]  # fmt: skip
PROGRAMS = ("make", "source", "python", "deepspeed", "torchrun", "sbatch", "hf", "pip")
BASE, CODEC = "bosonai/higgs-audio-v2-generation-3B-base", "bosonai/higgs-audio-v2-tokenizer"
V3_BASE = "bosonai/higgs-tts-3-4b"
# Commands that run uncut elsewhere: the file that runs them, and a string which that file must contain.
ELSEWHERE = {
    "make install": ("Makefile", "install: "),
    "pip install .": ("tests/test_package.py", '"pip", "install"'),
    "make demo": (".ci/run", "make demo"),
    "make demo BASE=v3": ("Makefile", "BASE ?="),
    "make test": (".ci/run", "make test"),
    "make chaos": ("tests/checkpoints/test_chaos.py", "chaos"),
    "deepspeed launch/train.py --deepspeed ds_configs/zero2.json": ("tests/launch/test_commands.py", "def main_job("),
    "deepspeed --hostfile hosts ": ("tests/launch/test_hostfile.py", "--hostfile"),
    "sbatch launch/slurm/train.sbatch": ("tests/slurm/test_slurm_cluster.py", "train.sbatch"),
    "python benchmarks/gpu.py": ("tests/benchmarks/test_gpu_command.py", "def test_every_part_in_miniature("),
    "deepspeed launch/prepare.py": ("tests/data/test_prepare_command.py", "prepare.py"),
    "python tests/v3_in_runtimes.py ": ("tests/bases/test_v3_runtimes.py", "v3_in_runtimes.py"),
    # With a recognizer that is a download of 3 GB.
    "python launch/slice.py interview.flac --recognizer ": ("tests/speech/test_recognizers.py", "def test_whisper_"),
    "python launch/review.py my_clips": ("tests/reviewing/test_review_server.py", "def test_command("),
    "python launch/review.py preferences/pairs.jsonl": ("tests/reviewing/test_review_server.py", "def test_command("),
    "deepspeed launch/prefer.py": ("tests/speech/test_prefer.py", "def test_ranks_change_nothing("),
    "deepspeed launch/evaluate.py": ("tests/speech/test_evaluate.py", "def test_ranks_change_nothing("),
}
SMALLER = {
    "python benchmarks/manifest.py": " --lines 1000 --pairs 200 --stretches 2",
    "python benchmarks/padding.py": " --samples 500",
}


def commands_in(text: str) -> list[str]:
    """Return the commands in blocks and in backticks; lines continued with a backslash are joined."""
    joined = re.sub(r" *\\\n *", " ", text)
    program = rf"(?:{'|'.join(PROGRAMS)}) "
    blocks = re.findall(rf"^    ({program}.*?)(?:  +#.*)?$", joined, re.MULTILINE)
    inline = re.findall(rf"`({program}[^`]+)`", joined.replace("\n", " "))
    return [*blocks, *inline]


ALL = list(dict.fromkeys(command for path in DOCUMENTS for command in commands_in(path.read_text(encoding="utf-8"))))


def runs_elsewhere(command: str) -> tuple[str, str] | None:
    for beginning, where in ELSEWHERE.items():
        if command == beginning or (beginning.endswith(" ") and command.startswith(beginning)):
            return where
    return None


HERE = [command for command in ALL if not runs_elsewhere(command)]
NEW_USERS = commands_in(
    (PROJECT / "README.md").read_text(encoding="utf-8").split("## Your own clips")[1].split("\n## ")[0]
)
# The three commands of the path from clips to speech; others in that section set up, or are for a small card.
NEW_USERS = [command for command in NEW_USERS if re.search(r"--check_only|my_voice( |/)", command)]
# What others depend on: the README's run with the real base's name, its adapter's merge, full fine-tuning, slicing,
# preference pairs.
FIRST = (
    rf"deepspeed .*--output_dir my_voice --base_ckpt {BASE}|python launch/merge.* merged$|deepspeed .*--finetune full|"
    "python launch/slice.* --subtitles|python launch/prefer"
)
IN_ORDER = [c for c in HERE if re.match(FIRST, c)]
NODES, HUB = "torchrun --nnodes 2 ", "hf "  # both need more than one process


@dataclass(frozen=True)
class Workshop:
    """A folder with the project's folders, a user's clips, and the results of runs."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment | environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return self._checked(command, done)

    def run_fast(self, command: str) -> subprocess.CompletedProcess[str]:
        """Like `run`, but without the seconds in which a new Python imports everything for this project's commands."""
        script = re.fullmatch(r"(?:python|deepspeed) launch/(\w+)\.py (.*)", re.sub(r" --master_port \d+", "", command))
        if script is None:
            return self.run(command)
        options = shlex.split(script[2])
        return self._checked(command, run_script(script[1], options, self.folder, environment=self.environment))

    @staticmethod
    def _checked(command: str, done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done


def in_hub_cache(home: Path, name: str, files: Path) -> None:
    """Put files into the hub's cache as if the repository had been downloaded, at its pinned commit if it has one."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = PINNED.get(name, "0" * 40)
    shutil.copytree(files, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)  # the newest commit, which transformers requests


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, base: Path, cache_dir: Path) -> Workshop:
    folder = tmp_path_factory.mktemp("documents")
    for name in ("launch", "ds_configs", "benchmarks", "samples"):
        (folder / name).symlink_to(PROJECT / name)
    transcripts = {
        sample["messages"][-1]["content"]["audio_url"]: sample["messages"][-2]["content"]
        for sample in map(json.loads, VOICES_MANIFEST.read_text().splitlines())
    }
    for clips in ("my_clips", "clips"):
        (folder / clips).mkdir()
        for number, (path, words) in enumerate(list(transcripts.items())[:6], 1):
            samples, rate = soundfile.read(VOICES / Path(path).name)
            soundfile.write(folder / clips / f"{number:04d}.wav", samples[:rate], rate)
            if clips == "my_clips":
                (folder / clips / f"{number:04d}.txt").write_text(words)
    (folder / "interview.srt").write_text(srt_of(write_recording(folder / "interview.flac", 6)))
    (example,) = re.findall(r'^    (\{"messages": .*?\]\})$', (PROJECT / "README.md").read_text(), re.M | re.S)
    lines = [json.dumps(json.loads(example)).replace("0001", f"{number:04d}") for number in range(1, 7)]
    (folder / "my_voice.jsonl").write_text("\n".join(lines) + "\n")
    (folder / ".venv").symlink_to(sys.prefix)
    home = tmp_path_factory.mktemp("hub")
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "HF_HOME": str(home), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    shop = Workshop(folder, environment)
    shop.run_fast(f"python launch/convert.py --input_path {base} --output_path {home}/original --to original")
    in_hub_cache(home, BASE, home / "original")
    in_hub_cache(home, CODEC, base.parent / "tiny-random-codec")
    in_hub_cache(home, V3_BASE, builtin_base(f"{RANDOM_BASE}-v3", cache_dir))
    return shop


@pytest.fixture(scope="session")
def trained(workshop: Workshop) -> Workshop:
    """The workshop after the commands that others depend on."""
    for command in IN_ORDER:
        workshop.run_fast(cut(command))
    return workshop


def cut(command: str) -> str:
    """Return a command cut to the size of a test."""
    command = re.sub(r"--nproc_per_node 8", "--nproc_per_node 2", command)
    command = re.sub(r"checkpoint-\d+", "checkpoint-1", command).replace("pip install", "pip install --dry-run")
    if re.search(r"launch/train\.py|higgs_ds train", command) and not re.search(r"--dry_run|--help", command):
        launched = command.startswith(("deepspeed", "torchrun")) and not command.startswith(NODES)
        port = f" --master_port {free_port()}" if launched else ""
        command = re.sub(r" (launch/train\.py|--module higgs_ds)", rf"{port} \1", command)
        command += " --precision fp32 --max_steps 1 --batch_size 1 --grad_accum 1 --num_workers 1"
    return command + SMALLER.get(command, "")


def test_commands_are_found() -> None:
    assert len(ALL) > 25
    assert all(command.split()[0] in PROGRAMS for command in ALL)


@pytest.mark.parametrize("command", [command for command in ALL if runs_elsewhere(command)])
def test_runs_elsewhere(command: str) -> None:
    path, word = runs_elsewhere(command) or ("", "")
    assert word in (PROJECT / path).read_text()


def elsewhere(command: str) -> str:
    """Return a command with its own output folder, because others read the folder that the documents name."""
    fresh = f"out_{free_port()}"
    return re.sub(r"(--output_dir|--output_path) \S+", rf"\1 {fresh}", command)


@pytest.mark.parametrize(
    "command", [c for c in HERE if c not in NEW_USERS + IN_ORDER and not c.startswith((NODES, HUB))]
)
def test_runs(trained: Workshop, command: str) -> None:
    done = trained.run_fast(elsewhere(cut(command)))
    assert "Traceback" not in done.stdout + done.stderr


def test_two_machines(trained: Workshop) -> None:
    """The command for two machines, run twice on this one."""
    (command,) = [c for c in HERE if c.startswith(NODES)]
    command = elsewhere(cut(command)).replace("node1:29500", f"127.0.0.1:{free_port()}")
    command = command.replace("--nproc_per_node 2", "--nproc_per_node 1")
    nodes = [
        subprocess.Popen(
            ["bash", "-c", command], cwd=trained.folder, env=trained.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum("x 1 accumulated x 2 ranks" in " ".join(text.split()) for text in outputs) == 1


def test_blocks_for_transformers(trained: Workshop, tmp_path: Path) -> None:
    """The code blocks of docs/serving.md for transformers and PEFT: the first with a merged model of the real base's
    name, both with a run on a native base.
    """
    blocks = re.findall(r"^```py run\n(.*?)^```$", (PROJECT / "docs" / "serving.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    (tmp_path / "launch").symlink_to(PROJECT / "launch")
    for name in ("clips", "my_clips"):
        (tmp_path / name).symlink_to(trained.folder / name)
    on_native = Workshop(tmp_path, trained.environment)
    native = re.sub(r"--base_ckpt \S+ ", "", NEW_USERS[1]).replace("ds_configs", f"{PROJECT}/ds_configs")
    on_native.run(cut(native))
    for shop, number, written in ((trained, 1, "hello.wav"), (on_native, 2, "cloned.wav")):
        (shop.folder / "blocks.py").write_text("\n".join(blocks[:number]))
        (shop.folder / written).unlink(missing_ok=True)
        shop.run("python blocks.py")
        assert soundfile.info(shop.folder / written).samplerate == 24000


def test_hub_commands(workshop: Workshop, tmp_path: Path) -> None:
    """`hf auth login` with a token, and the download of a dataset, against a hub on this machine."""
    hub_commands = [c for c in HERE if c.startswith(HUB)]
    assert {c.split(" --")[0] for c in hub_commands} == {"hf auth login", "hf download"}
    with local_hub() as hub:
        hub.repositories["OWNER/NAME"] = {"data.csv": b"audio,text\n"}
        at_hub = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        for command in sorted(hub_commands):
            workshop.run(command + (f" --token {TOKEN}" if "login" in command else ""), **at_hub)
    assert (workshop.folder / "FOLDER" / "data.csv").read_text() == "audio,text\n"


def test_from_a_folder_of_clips_to_a_page_that_speaks(workshop: Workshop, tmp_path: Path, page: Any) -> None:
    """The README's commands for a new user, one by one and unchanged; the base is the random one, by the real name."""
    assert [re.findall(r"launch/(\w+)", command)[0] for command in NEW_USERS] == ["prepare", "train", "generate"]
    for path in workshop.folder.iterdir():
        if path.name in ("launch", "ds_configs", "my_clips"):
            (tmp_path / path.name).symlink_to(path)
    new_user = Workshop(tmp_path, workshop.environment)
    with default_port():
        checked, trained, spoken = (new_user.run(command).stdout for command in NEW_USERS)
    assert "samples: 6" in checked
    assert "report: my_voice/report.html" in trained
    assert "warning: 2 steps are few (5 training samples, 2 epochs, 16 samples per step)" in trained
    assert spoken.startswith("WAV: hello.wav (")
    assert soundfile.info(tmp_path / "hello.wav").samplerate == 24000
    page.goto((tmp_path / "my_voice" / "report.html").as_uri())
    assert page.locator("figure svg").count() > 0
    players = page.locator("#samples audio")
    assert players.count() >= 2
    for i in range(players.count()):
        assert play(players.nth(i))[0] > 0
