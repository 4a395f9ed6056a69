"""Runs with --speaker_prompt: what they record, keep in every form of the result, and speak and evaluate with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import VOICES, write_manifest
from launcher import run_script, train_runs

from higgs_ds.adapters.convert import convert_adapter
from higgs_ds.adapters.speakers import TrainedSpeakers, read_speakers
from higgs_ds.bases.bundle import open_bundle
from higgs_ds.checkpoints.complete import complete_model
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.index import Index
from higgs_ds.model.v2.prompt import render_generation, tokenize
from higgs_ds.options.commands import GenerateOptions
from higgs_ds.speech.voices import prompt_of, voices_of

pytestmark = pytest.mark.slow

TAGS = TrainedSpeakers("tag", {"anna": "anna", "ben": "ben"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step with adapters and one of full fine-tuning, with tags."""
    root = tmp_path_factory.mktemp("runs")
    entries = [
        {"audio": str(VOICES / f"{who}_00.flac"), "text": f"I am {who}.", "speaker": who, "offset": 0, "duration": 0.4}
        for who in ("anna", "ben")
    ]
    manifest = write_manifest(root / "clips.jsonl", entries)
    common = f"--train_manifest {manifest} --val_split 0 --batch_size 1 --grad_accum 2 --max_steps 1 --lr 1e-3"
    common += f" --cache_dir {root / 'cache'} --speaker_prompt tag --output_dir {root}"
    merged = "--merge_adapter_with_base --export_layout both"
    train_runs(1, [f"{common}/lora {merged}".split(), f"{common}/full --finetune full".split()])
    return root


def test_recorded_wherever_the_result_is(runs: Path, base: Path, tmp_path: Path) -> None:
    lora, full = runs / "lora", runs / "full"
    convert_adapter(lora / "lora_adapters", tmp_path / "original", "original")
    complete_model(full / "checkpoint-1", base, tmp_path / "model")
    folders = [lora / name for name in ("lora_adapters", "checkpoint-1/lora_adapters", "final_model")]
    folders += [lora / "merged_model" / layout for layout in ("native", "original")]
    for folder in [*folders, full / "final_model", tmp_path / "original", tmp_path / "model"]:
        assert read_speakers(folder) == TAGS, folder
    for card in (
        lora / "lora_adapters",
        lora / "merged_model",
        full / "final_model",
        lora / "checkpoint-1/lora_adapters",
    ):
        assert "\n- `anna`\n- `ben`\n" in (card / "README.md").read_text()
    assert json.loads((lora / "settings.json").read_text())["speaker_prompt"] == "tag"


def test_spoken_with_the_trained_prompt(runs: Path, base: Path) -> None:
    """The tokens before the speech are those of the training sample."""
    bundle = open_bundle(str(base), None, None, runs / "cache")
    index = Index(next((runs / "cache" / "index").glob("*/index.json")).parent)
    data = Dataset(index, np.arange(len(index)), bundle.coder(runs / "cache"))
    for number, name in enumerate(("anna", "ben")):
        options = GenerateOptions(text=f"I am {name}.", speaker=(name,))
        messages = prompt_of(options.text, voices_of(options, TAGS), options.scene)
        ids = tokenize(render_generation(messages), [], bundle.tokenizer, bundle.stream).input_ids
        assert ids == data.encoded(number).prompt.input_ids[: len(ids)]


def test_evaluated_with_the_trained_prompt(runs: Path, tmp_path: Path) -> None:
    """As with a manifest that describes the speaker."""
    results = []
    for name, more in (("plain", {}), ("described", {"style": "anna"})):
        entry = {
            "audio": str(VOICES / "anna_01.flac"),
            "text": "Hello.",
            "speaker": "anna",
            "offset": 0,
            "duration": 0.4,
        }
        manifest = write_manifest(tmp_path / f"{name}.jsonl", [entry | more])
        adapter = f"--lora_adapter_path {runs / 'lora' / 'lora_adapters'} --output_dir {name}"
        done = run_script("evaluate", f"--test_manifest {manifest} {adapter}".split(), tmp_path)
        assert done.returncode == 0, done.stderr
        results.append((tmp_path / name / "0.wav").read_bytes())
    assert results[0] == results[1]
