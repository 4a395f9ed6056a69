"""Options from the command line and from files, and the messages for unknown ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT

from higgs_ds.options.command_line import parse_inspect_options, parse_prepare_options, parse_train_options
from higgs_ds.options.other_names import OPTION_OF
from higgs_ds.options.train import TrainOptions

LINE = (
    "--lr 1e-3 --lora_targets attention audio_mlp --codebook_weights 2 1 1 1 1 1 1 1 --merge_adapter_with_base "
    "--val_manifest v.jsonl --max_steps 5 --activation_checkpointing 3 --base_ckpt some/base --group_lr attention=1e-4 "
    "audio_mlp=2e-4 --train_manifest a.jsonl b.jsonl --mix 1 0.5"
).split()
BY_NAME: dict[str, Any] = {
    "lr": "1e-3",  # YAML reads it as a string, because it requires a point in a float
    "lora_targets": ["attention", "audio_mlp"],
    "codebook_weights": [2, 1, 1, 1, 1, 1, 1, 1.0],
    "merge_adapter_with_base": True,
    "train_manifest": ["a.jsonl", "b.jsonl"],
    "mix": [1, 0.5],
    "val_manifest": "v.jsonl",
    "max_steps": 5,
    "activation_checkpointing": "3",
    "base_ckpt": "some/base",
    "group_lr": ["attention=1e-4", "audio_mlp=2e-4"],
    "dry_run": False,
    "max_seq_len": None,
}


def written(path: Path, values: object) -> str:
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_file_equals_the_command_line(tmp_path: Path, suffix: str) -> None:
    expected, given = parse_train_options(LINE)
    options, given_by_file = parse_train_options(["--config", written(tmp_path / f"run{suffix}", BY_NAME)])
    assert options == expected
    assert given_by_file == given | {"dry_run"}


def test_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "run.yaml", BY_NAME)
    options, _ = parse_train_options(["--lr", "5e-4", "--config", path, "--max_steps", "9"])
    assert (options.optim.lr, options.optim.max_steps) == (5e-4, 9)
    assert options.model.base_ckpt == "some/base"


def test_settings_of_a_run_are_an_options_file(tmp_path: Path) -> None:
    """settings.json, as a run writes it when it starts."""
    options, _ = parse_train_options(LINE)
    path = written(tmp_path / "settings.json", options.flat())
    assert parse_train_options(["--config", path])[0] == options
    path = written(tmp_path / "settings.json", TrainOptions().flat())
    assert parse_train_options(["--config", path])[0] == TrainOptions()


def test_prepare_accepts_the_same_file(tmp_path: Path) -> None:
    _, model, prepare_options, _ = parse_prepare_options(
        ["--config", written(tmp_path / "run.yaml", BY_NAME), "--check_only"]
    )
    assert model.base_ckpt == "some/base"
    assert prepare_options.check_only


BAD = {
    "learning_rat": 1, "lora_rr": 8, "lr": "fast", "max_steps": 2.5, "batch_size": True, "dry_run": "yes",
    "optim": "sgd", "lora_targets": ["attention", "heads"], "train_manifest": 3, "codebook_weights": ["a"],
}  # fmt: skip


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "run.yaml", BAD)
    with pytest.raises(SystemExit) as caught:
        parse_train_options(["--config", path])
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert f"error: {len(BAD)} problems:" in stderr
    for name, words in {
        "lora_rr": "unknown option; did you mean lora_r?", "lr": "'fast' is not a number",
        "max_steps": "2.5 is not a whole number", "batch_size": "True is not a whole number",
        "dry_run": "'yes' is not true or false", "optim": "'sgd' is not one of adamw,",
        "lora_targets": "is not a list whose items are each one of attention, text_mlp, audio_mlp",
        "train_manifest": "3 is not a list whose items are each a path",
        "codebook_weights": "is not a list whose items are each a number",
        "learning_rat": "unknown option",
    }.items():  # fmt: skip
        assert any(f"--config {path}: {name}: " in line and words in line for line in stderr.splitlines()), (
            name,
            stderr,
        )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.yaml", "lr: [1", "not valid YAML: while parsing"),
        ("run.json", "{", "not valid JSON: "),
        ("run.yaml", "- lr", "must map option names to values"),
        ("run.yaml", "!!python/object/apply:os.system [touch x]", "not valid YAML: could not determine a constructor"),
        ("none.yaml", None, "No such file or directory"),
    ],
)
def test_unreadable_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, words: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as caught:
        parse_train_options(["--config", str(tmp_path / name)])
    assert caught.value.code == 2
    assert f"--config {tmp_path / name}: {words}" in capsys.readouterr().err


def test_mistyped_option_gets_a_suggestion() -> None:
    """Printed by the command itself."""
    command = [sys.executable, str(PROJECT / "launch" / "train.py"), "--lora-rank", "8", "--grad_acum", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unrecognized arguments: --lora-rank 8 --grad_acum 2" in done.stderr
    assert "; --lora-rank did you mean --lora_r?; --grad_acum did you mean --grad_accum?" in done.stderr


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_train_options(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "meant"),
    {
        "--learning_rate": "--lr", "--num_train_epochs": "--epochs", "--per_device_train_batch_size": "--batch_size",
        "--gradient_accumulation_steps": "--grad_accum", "--bf16": "--precision bf16", "--fp16": "--precision fp16",
        "--resume_from_checkpoint": "--resume", "--model_name_or_path": "--base_ckpt", "--r": "--lora_r",
        "--gradient-checkpointing": "--activation_checkpointing every_layer", "--dataset_path": "--train_manifest",
    }.items(),
)  # fmt: skip
def test_options_of_other_trainers(name: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"; {name} did you mean {meant}?" in error_of([name], capsys)


def test_every_hint_names_an_option() -> None:
    """And no name that has a hint is an option here, which would be taken without one."""
    known = TrainOptions().flat().keys()
    assert {option.split(" ")[0] for option in OPTION_OF.values()} <= known
    assert not OPTION_OF.keys() & known
    for option in filter(lambda option: " " in option, OPTION_OF.values()):
        name, value = option.split(" ")
        assert str(parse_train_options([f"--{name}", value])[0].flat()[name]) == value


def test_other_names_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "run.yaml", {"learning_rate": 1e-4})
    assert "learning_rate: unknown option; did you mean lr?" in error_of(["--config", path], capsys)


def test_misspelt_value_gets_a_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value, hint in (("kalid", "did you mean kaldi?"), ("mp3", "")):
        assert re.search(rf"argument --format: invalid choice: '{value}'.*\)(; )?{re.escape(hint)}$",
                         error_of(["--format", value], capsys).strip(), re.M)  # fmt: skip
    path = written(tmp_path / "run.yaml", {"format": "kalid", "lora_targets": ["atention"]})
    problems = error_of(["--config", path], capsys)
    assert "format: 'kalid' is not one of auto, " in problems
    assert "; did you mean kaldi?" in problems
    assert "; did you mean attention?" in problems


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--lr 1e-4 --lr 2e-4", "argument --lr: given twice, with 0.0001 and 0.0002; leave one out"),
        ("--train_manifest a.jsonl --train_manifest b.jsonl", "argument --train_manifest: given twice"),
        (
            "--lora_targets attention --lora_targets audio_mlp text_mlp",
            "argument --lora_targets: given twice, with attention and audio_mlp text_mlp; give all values after one",
        ),
    ],
)
def test_an_option_given_twice(argv: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in error_of(argv.split(), capsys)


def test_options_of_inspection_commands() -> None:
    options = parse_inspect_options("validate_adapter", ["some/folder", "--json", "--base_model_path", "b"])
    assert (options.path, options.as_json, options.base_model_path) == (Path("some/folder"), True, "b")
    assert parse_inspect_options("find_lora_adapters", []).path == Path()
