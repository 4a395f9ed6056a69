"""Checkpoints and adapters that are damaged, unfinished or of another run are detected."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from higgs_ds.adapters.save import ADAPTER_WEIGHTS, AdapterFormat, verify_adapter, write_adapter
from higgs_ds.checkpoints.folder import (
    MANIFEST_FILE,
    RNG_FILE,
    checkpoints_to_delete,
    find_checkpoints,
    manifest_of,
    newest_complete,
    read_state,
    why_incomplete,
)
from higgs_ds.checkpoints.state import TrainerState, check_same_run
from higgs_ds.common.errors import InputError, NotFiniteError, SaveError
from higgs_ds.common.files import new_folder, remove_folder, replaced_file, replaced_folder, write_json
from higgs_ds.common.run_files import STATE_FILE
from higgs_ds.reporting.metrics_log import MetricsLog

FORM = AdapterFormat(LoraConfig(r=2, target_modules=["self_attn.q_proj"], base_model_name_or_path="base"))
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


def checkpoint(folder: Path) -> Path:
    (folder / "lora_adapters").mkdir(parents=True)
    for name in ("optimizer.safetensors", RNG_FILE, "lora_adapters/adapter_model.safetensors"):
        save_file({"x": torch.zeros(9)}, folder / name)
    write_json(folder / STATE_FILE, TrainerState(10, {}, step=1).to_json())
    write_json(folder / MANIFEST_FILE, manifest_of(folder))
    return folder


def test_newest_complete_checkpoint_is_used(tmp_path: Path) -> None:
    folders = {step: checkpoint(tmp_path / f"checkpoint-{step}") for step in (2, 4, 6, 8, 10, 12)}
    (folders[12] / MANIFEST_FILE).unlink()
    (folders[10] / "optimizer.safetensors").unlink()
    (folders[8] / "optimizer.safetensors").write_bytes(b"o" * 999)
    save_file({"x": torch.ones(9)}, folders[6] / "lora_adapters" / "adapter_model.safetensors")
    (tmp_path / ".checkpoint-14.x.tmp").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [folder.name for folder in find_checkpoints(tmp_path)] == [f"checkpoint-{s}" for s in (12, 10, 8, 6, 4, 2)]
    newest, skipped = newest_complete(tmp_path)
    assert newest == folders[4]
    assert [note.split(": skipped: ")[1] for note in skipped] == [
        "manifest.json cannot be read (FileNotFoundError)",
        "missing optimizer.safetensors",
        "optimizer.safetensors has changed since it was written",
        "lora_adapters/adapter_model.safetensors has changed since it was written",
    ]
    assert newest_complete(tmp_path / "none") == (None, [])


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 100):
        checkpoint(tmp_path / f"checkpoint-{step}")
    state = TrainerState(10, {}, step=8, val_losses={"2": 3.0, "3": 0.5, "4": 1.0, "6": 2.0, "8": 2.5, "100": 0.1})
    assert checkpoints_to_delete(tmp_path, state, keep=5) == []
    assert {path.name for path in checkpoints_to_delete(tmp_path, state, keep=1)} == {"checkpoint-6", "checkpoint-2"}
    assert {path.name for path in checkpoints_to_delete(tmp_path, state, keep=3)} == {"checkpoint-2"}
    state.metric = "eval/mos"
    state.evaluations = {"2": {"eval/mos": 3.0}, "4": {"eval/mos": 2.0}, "6": {}, "8": {"eval/mos": 1.0}}
    assert {path.name for path in checkpoints_to_delete(tmp_path, state, keep=1)} == {"checkpoint-6", "checkpoint-4"}
    state.evaluations = {str(step): {"eval/mos": 3.0} for step in (2, 4, 6, 8)}  # of equal ones, the first
    assert {path.name for path in checkpoints_to_delete(tmp_path, state, keep=1)} == {"checkpoint-6", "checkpoint-4"}
    assert state.best_step == 2
    state.evaluations = {}
    assert {path.name for path in checkpoints_to_delete(tmp_path, state, keep=2)} == {"checkpoint-4", "checkpoint-2"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"step": 11}, "step 11 of 10 is not possible"),
        ({"metric": "eval/fun"}, "'eval/fun' is not a metric of this version"),
        ({"metric": []}, r"\[\] is not a metric of this version"),
        ({"new": 1}, "cannot be read: TypeError"),
    ],
)
def test_states_that_this_version_did_not_write(tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    write_json(tmp_path / STATE_FILE, TrainerState(10, {}, step=1).to_json() | values)
    with pytest.raises(InputError, match=problem):
        read_state(tmp_path)


def test_removed_folder_is_gone(tmp_path: Path) -> None:
    remove_folder(checkpoint(tmp_path / "checkpoint-2"))
    assert list(tmp_path.iterdir()) == []


def test_torn_manifest(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint-1")
    (folder / MANIFEST_FILE).write_text((folder / MANIFEST_FILE).read_text()[:-20])
    assert why_incomplete(folder) == "manifest.json cannot be read (JSONDecodeError)"


def test_other_settings_are_named(tmp_path: Path) -> None:
    saved = TrainerState(total_steps=10, settings={"lr": 1e-4, "seed": 1})
    check_same_run(saved, TrainerState(10, {"lr": 1e-4, "seed": 1}), tmp_path)
    with pytest.raises(InputError) as caught:
        check_same_run(saved, TrainerState(5, {"lr": 2e-4, "seed": 1}), tmp_path)
    assert f"{tmp_path}: was trained with lr 0.0001, but this run has 0.0002" in caught.value.problems
    assert any(problem.startswith(f"{tmp_path}: is of a run of 10 steps, but") for problem in caught.value.problems)
    assert len(caught.value.problems) == 3


def test_adapter_is_verified(tmp_path: Path) -> None:
    tensors = {A: torch.randn(2, 8), B: torch.randn(8, 2)}
    write_adapter(tmp_path / "good", tensors, FORM, must_have_moved=True)
    assert sorted(path.name for path in (tmp_path / "good").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"], config["inference_mode"]) == (2, "base", True)
    assert load_file(tmp_path / "good" / ADAPTER_WEIGHTS).keys() == tensors.keys()

    with pytest.raises(NotFiniteError, match="1 of 2 trained tensors"):
        write_adapter(tmp_path / "nan", tensors | {A: torch.full((2, 8), float("nan"))}, FORM, True)
    assert not (tmp_path / "nan").exists()
    untouched = tensors | {B: torch.zeros(8, 2)}
    with pytest.raises(SaveError, match="every lora_B is zero"):
        write_adapter(tmp_path / "zero", untouched, FORM, must_have_moved=True)
    write_adapter(tmp_path / "warming up", untouched, FORM, must_have_moved=False)
    with pytest.raises(SaveError, match="1 tensors read back differently than written"):
        verify_adapter(tmp_path / "good", tensors | {A: tensors[A] + 1}, True)
    (tmp_path / "good" / ADAPTER_WEIGHTS).write_bytes(b"torn")
    with pytest.raises(SaveError, match="does not read back"):
        verify_adapter(tmp_path / "good", tensors, True)


def test_files_and_folders_are_written_atomically(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def killed_while(writing: AbstractContextManager[Path], name: str) -> None:
        with writing as temporary:
            (temporary / name).write_text("half")
            raise Killed

    path, folder = tmp_path / "file", tmp_path / "folder"
    path.write_text("old")
    folder.mkdir()
    (folder / "a").write_text("old")
    for writing, name in [
        (replaced_file(path), ""),
        (replaced_folder(folder), "a"),
        (new_folder(tmp_path / "new"), "a"),
    ]:
        with pytest.raises(Killed):
            killed_while(writing, name)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
    assert path.read_text() == (folder / "a").read_text() == "old"

    with replaced_file(path) as temporary:
        temporary.write_text("new")
    with replaced_folder(folder) as temporary:
        (temporary / "b").write_text("new")
    with new_folder(folder) as temporary:  # the first one stays
        (temporary / "c").write_text("late")
    assert path.read_text() == "new"
    assert [entry.name for entry in folder.iterdir()] == ["b"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_metrics_file_goes_on_without_doubled_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "tr')
    log = MetricsLog(tmp_path, first_step=2, total_steps=4)
    log.write(3, 0.5, {"lr": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
