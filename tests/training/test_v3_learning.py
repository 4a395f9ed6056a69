"""The built-in base of Higgs Audio v3 speaks unseen strings; LoRA and QLoRA teach it the new voice of the demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, write_manifest
from launcher import train_runs
from test_learning import (
    CLIPS,
    HELD_OUT,
    NEW_VOICE_HZ,
    OLD_VOICE_HZ,
    STEPS,
    TRAINING,
    evaluated,
    held_out_lines,
    missed,
)

pytestmark = pytest.mark.slow

BASE = "speaking-base-v3"
NUM_HELD_OUT = 100
FEMININE = "<|style:feminine|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("v3-learning")


@pytest.fixture(scope="module")
def base_results(folder: Path) -> dict[str, Any]:
    """The base's results on strings that are not in any training data, in its own voices."""
    entries = [json.loads(line) for line in held_out_lines(folder)]
    for entry in entries:
        system, *turns = entry["messages"]
        entry["messages"], entry["start_index"] = turns, len(turns) - 1
        if "feminine" in system["content"]:
            turns[-2]["content"] = FEMININE + turns[-2]["content"]
    manifest = write_manifest(folder / "held_out.jsonl", entries[:NUM_HELD_OUT])
    return evaluated(folder, "base", f"--base_model_path {BASE} --test_manifest {manifest}")


def test_base_says_strings_that_it_never_heard(base_results: dict[str, Any]) -> None:
    assert base_results["samples"] == NUM_HELD_OUT
    assert base_results["stop_rate"] == 1
    assert base_results["exact_first_codebook"] >= 0.95
    for hz in (100, 200):  # each sample is in the voice that its text asks for
        of_voice = [item for item in base_results["items"] if abs(item["reference_pitch_hz"] - hz) < 5]
        assert len(of_voice) > 30
        assert sum(abs(item["pitch_hz"] - hz) < 5 for item in of_voice) >= 0.9 * len(of_voice)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_new_voice(folder: Path, base_results: dict[str, Any], kind: str) -> None:
    run = folder / kind
    options = TRAINING.replace("speaking-base", BASE)
    train_runs(1, [f"{options} {STEPS} --finetune {kind} --train_manifest {CLIPS} --output_dir {run}".split()])
    results = evaluated(folder, f"after_{kind}", f"--test_manifest {HELD_OUT} --lora_adapter_path {run}/lora_adapters")
    assert missed(results, base_results) == []


def test_base_does_not_speak_in_the_new_voice(folder: Path, base_results: dict[str, Any]) -> None:
    before = evaluated(folder, "before", f"--base_model_path {BASE} --test_manifest {HELD_OUT}")
    assert before["median_pitch_hz"] == pytest.approx(OLD_VOICE_HZ, abs=5)
    assert abs(before["median_pitch_hz"] - NEW_VOICE_HZ) > 40
    assert "pitch" in missed(before, base_results)


def test_its_files_are_small() -> None:
    assets = PROJECT / "higgs_ds" / "bases" / "assets" / BASE
    assert sum(path.stat().st_size for path in assets.iterdir()) < 15_000_000
    assert json.loads((assets / "config.json").read_text(encoding="utf-8"))["model_type"] == "higgs_multimodal_qwen3"
