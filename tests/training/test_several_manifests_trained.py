"""Runs on several manifests with --mix: the same on two ranks and when resumed, and the validation losses of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import VOICES, read_metrics, write_manifest
from launcher import train_runs
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LOSS = 1e-6  # relative, as in test_invariance.py
STEPS, SAVED_STEP = 6, 2  # three steps an epoch


def recordings(path: Path, voice: str, count: int) -> Path:
    entries = [
        {"audio": f"{VOICES}/{voice}_0{i % 5}.flac", "text": f"{path.stem} {i}", "offset": 0, "duration": 0.3 + i / 10}
        for i in range(count)
    ]
    return write_manifest(path, entries)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one rank with accumulation, the same resumed within an epoch and of two ranks, and with other lists for
    validation: one with all lines, and the second one alone."""
    root = tmp_path_factory.mktemp("runs")
    anna, ben = recordings(root / "anna.jsonl", "anna", 8), recordings(root / "ben.jsonl", "ben", 3)
    one, other = recordings(root / "one.jsonl", "anna", 3), recordings(root / "other.jsonl", "ben", 2)
    both = root / "both.jsonl"
    both.write_text(one.read_text() + other.read_text())

    def command(name: str, *val: Path, accum: int = 2) -> list[str]:
        return (
            f"--train_manifest {anna} {ben} --mix 0.5 2 --val_manifest {' '.join(map(str, val))} --precision fp32 "
            f"--lora_dropout 0 --lr 1e-3 --log_steps 1 --epochs 2 --val_steps 3 --save_steps {SAVED_STEP} "
            f"--batch_size 2 --grad_accum {accum} --output_dir {root / name}"
        ).split()

    train_runs(1, [command("alone", one, other)], report=True)
    unfinished = shutil.ignore_patterns(f"checkpoint-{2 * SAVED_STEP}", f"checkpoint-{STEPS}", "lora_adapters")
    shutil.copytree(root / "alone", root / "resumed", ignore=unfinished)
    resumed = [*command("resumed", one, other), "--resume", "auto"]
    train_runs(1, [resumed, command("joined", both), command("second", other)])
    train_runs(2, [command("ranks", one, other, accum=1)])
    return root


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], key, line[key]) for line in read_metrics(run) for key in line if "loss" in key]


def test_same_losses_on_two_ranks(runs: Path) -> None:
    expected, found = losses(runs / "alone"), losses(runs / "ranks")
    assert [entry[:2] for entry in expected] == [entry[:2] for entry in found]
    assert {step for step, *_ in expected} == set(range(1, STEPS + 1))
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected], rel=LOSS)


def test_resumed_within_an_epoch(runs: Path) -> None:
    assert losses(runs / "resumed") == losses(runs / "alone")
    for file in ("lora_adapters/adapter_model.safetensors", f"checkpoint-{STEPS}/optimizer.safetensors"):
        expected, found = (load_file(runs / name / file) for name in ("alone", "resumed"))
        assert expected.keys() == found.keys()
        assert all(tensor.equal(found[key]) for key, tensor in expected.items())


def test_validation_of_all_and_of_each(runs: Path) -> None:
    """The total is that of one list with all lines, and each manifest's loss that of a validation on it alone."""
    several, joined, second = ([line for line in read_metrics(runs / name) if "val/loss" in line]
                               for name in ("alone", "joined", "second"))  # fmt: skip
    assert [line["step"] for line in several] == [3, 6]
    for line, of_all, of_second in zip(several, joined, second, strict=True):
        manifests = {key for key in line if key.startswith(("val/one.jsonl/", "val/other.jsonl/"))}
        assert manifests == {f"val/{name}.jsonl/{part}" for name in ("one", "other")
                             for part in ("loss", "text_loss", "audio_loss")}  # fmt: skip
        assert line.keys() - manifests == of_all.keys() == of_second.keys()
        for key, value in of_all.items():
            if key.startswith("val/"):
                assert line[key] == pytest.approx(value, rel=LOSS), key
        for part in ("loss", "text_loss", "audio_loss"):
            assert line[f"val/other.jsonl/{part}"] == pytest.approx(of_second[f"val/{part}"], rel=LOSS)
        assert line["val/one.jsonl/loss"] != pytest.approx(line["val/other.jsonl/loss"], rel=1e-3)


def test_what_a_run_writes_about_its_manifests(runs: Path) -> None:
    settings = json.loads((runs / "alone" / "settings.json").read_text())
    assert [Path(path).name for path in settings["train_manifest"]] == ["anna.jsonl", "ben.jsonl"]
    assert settings["mix"] == [0.5, 2]
    state = json.loads((runs / "alone" / "trainer_state.json").read_text())
    assert state["settings"]["mix"] == [0.5, 2]
    assert state["total_steps"] == STEPS
    summary = (runs / "alone" / "data_summary.txt").read_text()
    assert "  anna.jsonl: 8 training samples, 0.00 hours; mix 0.5: 4 samples per epoch, 40.0% of all\n" in summary
    assert "  ben.jsonl: 3 training samples, 0.00 hours; mix 2: 6 samples per epoch, 60.0% of all\n" in summary
    page = (runs / "alone" / "report.html").read_text()
    assert "loss by manifest, validation" in page
    assert "loss, other.jsonl" in page
