"""Two voices of the built-in base as two adapters: their blends speak, and the pitch follows the weights."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import corpus
import pytest
from launcher import run_script, train_runs

pytestmark = pytest.mark.slow

PITCH_HZ = {"emil": 100, "dora": 200}
NUM_HELD_OUT = 12
TRAINING = (
    "--base_ckpt speaking-base --val_split 0 --batch_size 8 --grad_accum 1 --precision fp32 --max_steps 20 --lr 6e-3 "
    "--codebook_weights 4 2 1 .2 .2 .2 .2 .2"
)
# Different ranks, alphas, scalings and targets.
LORA = {
    "emil": "--lora_r 8 --lora_alpha 16 --lora_targets attention audio_mlp",
    "dora": "--lora_r 16 --lora_alpha 16 --lora_targets audio_mlp --use_rslora",
}


def spoken(folder: Path, part: corpus.Part, rng: random.Random, held_out: set[str]) -> Path:
    """Write clips whose prompt does not name a voice, so that only the adapter can decide."""
    lines = [json.loads(line) for line in corpus.written(part, part.clips, corpus.Recordings(folder), rng, held_out)]
    for entry in lines:
        entry["messages"][0]["content"] = "Speak."
    path = folder / f"{part.name}.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for each voice, and strings that neither has heard, half of them in each voice."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs espeak-ng")
    folder = tmp_path_factory.mktemp("voices")
    rng, held_out = random.Random(2), set[str]()
    spoken(folder, corpus.Part("held_out", tuple(PITCH_HZ), NUM_HELD_OUT, longest=5), rng, held_out)
    runs = []
    for voice in PITCH_HZ:
        manifest = spoken(folder, corpus.Part(f"{voice}_train", (voice,), 40, longest=5), rng, held_out)
        runs.append(f"{TRAINING} {LORA[voice]} --train_manifest {manifest} --output_dir {folder / voice}".split())
    train_runs(1, runs)
    return folder


def speech(folder: Path, emil: float, dora: float) -> dict[str, Any]:
    """Return what launch/evaluate.py measures of a blend."""
    name = f"{emil}-{dora}"
    parts = [f"emil/lora_adapters={emil}", f"dora/lora_adapters={dora}"]
    done = run_script("blend", [*parts, "--output_path", name], folder)
    assert done.returncode == 0, done.stderr
    line = f"--test_manifest held_out.jsonl --lora_adapter_path {name} --output_dir {name}-speech"
    done = run_script("evaluate", line.split(), folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{name}-speech" / "evaluation.json").read_text())


def test_blends_of_two_voices(folder: Path) -> None:
    """The base has learned to keep to a voice: between the two, each string is in one or the other, and exact."""
    blends = [speech(folder, 1 - dora, dora) for dora in (0, 0.5, 1)]
    mean_hz = [sum(item["pitch_hz"] for item in blend["items"]) / NUM_HELD_OUT for blend in blends]
    assert [blend["stop_rate"] for blend in blends] == [1, 1, 1]
    assert mean_hz == sorted(mean_hz)
    assert mean_hz[0] == pytest.approx(PITCH_HZ["emil"], abs=5)
    assert mean_hz[2] == pytest.approx(PITCH_HZ["dora"], abs=5)
    for blend in blends:
        in_its_voice = [item for item in blend["items"] if abs(item["pitch_hz"] - item["reference_pitch_hz"]) < 5]
        assert all(min(abs(item["pitch_hz"] - hz) for hz in PITCH_HZ.values()) < 5 for item in blend["items"])
        assert len(in_its_voice) >= NUM_HELD_OUT // 2 - 1
        assert sum(item["exact"] for item in in_its_voice) >= 0.8 * len(in_its_voice)
