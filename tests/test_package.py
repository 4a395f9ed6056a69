"""The wheel is complete: it works in an environment that has the dependencies but no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import PROJECT

pytestmark = pytest.mark.slow

COMMANDS = (
    "train", "slice", "review", "prepare", "merge", "blend", "generate", "evaluate", "prefer", "export", "convert",
    "find_lora_adapters", "validate_adapter", "validate_checkpoint_dir",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, check=True,
        capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in tracked:
        if (PROJECT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((PROJECT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder / "dist"), str(source)], check=True
    )
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment that shares this one's dependencies; return its folder of programs."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    programs = environment / "bin"
    subprocess.run([programs / "python", "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Python searches this folder last, and does not read its .pth files, such as that of an editable install.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def run(installed: Path, folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [installed / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_files_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("ds_configs", "*.json"), ("samples", "*.jsonl"), ("samples", "*/*.flac")):
        expected = {f"higgs_ds/{path.relative_to(PROJECT)}" for path in (PROJECT / folder).glob(pattern)}
        assert expected
        assert expected <= names
    modules = {str(path.relative_to(PROJECT)) for path in (PROJECT / "higgs_ds").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests/", "launch/", "benchmarks/"))]


def test_train_prepare_and_merge_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = "import higgs_ds; print(higgs_ds.__file__)"
    assert str(installed.parent) in run(installed, tmp_path, "python", "-c", code)
    trained = run(
        installed, tmp_path, "higgs-ds", "train", "--deepspeed", "ds_configs/zero2.json", "--max_steps", "2",
        "--batch_size", "1", "--grad_accum", "1", "--precision", "fp32", "--output_dir", "run",
    )  # fmt: skip
    (merge_line,) = [line for line in trained.splitlines() if line.startswith("Merge them: ")]
    assert run(installed, tmp_path, "higgs-ds", "prepare", "--check_only")
    run(installed, tmp_path, *merge_line.removeprefix("Merge them: ").split())
    assert (tmp_path / "MERGED" / "model.safetensors").is_file()


def test_help_of_every_command(installed: Path, tmp_path: Path) -> None:
    overview = run(installed, tmp_path, "higgs-ds")
    for command in COMMANDS:
        assert f"\n  {command} " in overview
        assert run(installed, tmp_path, "higgs-ds", command, "--help").startswith(f"usage: higgs-ds {command}")
    as_module = ("python", "-m", "higgs_ds", "--local_rank=0", "merge", "--help")  # as deepspeed --module calls it
    assert run(installed, tmp_path, *as_module).startswith("usage: higgs-ds merge")


def test_an_unknown_command(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run([installed / "higgs-ds", "trian"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: trian: unknown command; did you mean train?" in done.stderr
