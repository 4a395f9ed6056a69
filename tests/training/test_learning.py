"""Learning: the built-in base speaks unseen strings, adapters teach it a new voice, and wrong labels do not."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import corpus
import pytest
import soundfile
import torch
from conftest import PROJECT, processor_in, write_manifest
from launcher import run_script, train_runs
from mutants import MUTANTS
from transformers import HiggsAudioV2ForConditionalGeneration

pytestmark = pytest.mark.slow

CLIPS, HELD_OUT = PROJECT / "samples" / "digits.jsonl", PROJECT / "samples" / "digits_held_out.jsonl"
OLD_VOICE_HZ, NEW_VOICE_HZ = 100, 150
NUM_HELD_OUT = 60  # of 200; pretraining/README.md has the results on all
# Of the base's share of exact clips. 32 runs with other seeds, steps and rates reached 0.75 to 1 of 24 clips, wrong
# labels less than 0.6.
EXACT_SHARE = 0.75
TRAINING = (
    "--base_ckpt speaking-base --val_split 0 --batch_size 8 --grad_accum 1 --precision fp32 "
    "--lora_r 64 --lora_alpha 128 --lora_targets audio_mlp --codebook_weights 4 2 1 .2 .2 .2 .2 .2"
)
STEPS = "--max_steps 120 --lr 6e-3 --lora_dropout 0.1"  # as in the Makefile's demo
STEPS_WITH_REFERENCES = "--max_steps 200 --lr 4e-3 --lora_dropout 0.2"  # half of the prompts are other ones then

# The requirements of a new voice that each mutant fails, at least.
MISSES = {
    "audio_unshifted": {"stops", "exact"},
    "delay_off": {"exact"},
    "eos_masked": {"exact"},  # the base has learned to stop
    "reference_trained": {"exact"},
}


def evaluated(folder: Path, name: str, options: str) -> dict[str, Any]:
    """Return what launch/evaluate.py measures."""
    done = run_script("evaluate", f"--output_dir {name} {options}".split(), folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / name / "evaluation.json").read_text())


def missed(results: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Return the requirements of a new voice that a model does not meet."""
    shift_hz = (results["median_pitch_hz"] or math.nan) - OLD_VOICE_HZ
    requirements = {
        "stops": results["stop_rate"] == 1,
        "exact": results["exact_first_codebook"] >= EXACT_SHARE * base["exact_first_codebook"],
        "pitch": shift_hz >= 0.8 * (NEW_VOICE_HZ - OLD_VOICE_HZ),
    }
    return [name for name, holds in requirements.items() if not holds]


def held_out_lines(folder: Path) -> list[str]:
    """Return the lines of the corpus that no base was trained on; their clips are in the folder."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs espeak-ng")
    rng, recordings, held_out = random.Random(1), corpus.Recordings(folder), set[str]()
    _, lines = [list(corpus.written(part, part.clips, recordings, rng, held_out)) for part in corpus.PARTS[:2]]
    assert corpus.PARTS[1].name == "base_held_out"
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def base_results(folder: Path) -> dict[str, Any]:
    """The base's results on strings that are not in any training data, in its own voices."""
    (folder / "held_out.jsonl").write_text("".join(held_out_lines(folder)[:NUM_HELD_OUT]))
    options = f"--test_manifest {folder}/held_out.jsonl --recognizer pocketsphinx"
    return evaluated(folder, "base", options)


@pytest.fixture(scope="module")
def with_wrong_references(folder: Path) -> Path:
    """The new voice's clips; half of them follow a reference whose audio does not match its transcript.

    References are not learned, so this does no harm.
    """
    entries = [json.loads(line) for line in CLIPS.read_text().splitlines()]
    for entry in entries:
        audio = entry["messages"][-1]["content"]
        audio["audio_url"] = str(CLIPS.parent / audio["audio_url"])
    turns = [entry["messages"][1:] for entry in entries]
    for number, entry in enumerate(entries):
        if number % 2:
            words, speech = turns[number - 1][0], turns[(number + 10) % len(turns)][1]
            entry["messages"][1:1] = [words, speech]
            entry["start_index"] = 3
    return write_manifest(folder / "voice.jsonl", entries)


def trained(folder: Path, name: str, more: str = "", manifest: Path = CLIPS) -> Path:
    steps = STEPS if manifest == CLIPS else STEPS_WITH_REFERENCES
    train_runs(1, [f"{TRAINING} {steps} --train_manifest {manifest} --output_dir {folder}/{name} {more}".split()])
    return folder / name


@pytest.fixture(scope="module")
def lora(folder: Path, with_wrong_references: Path) -> Path:
    return trained(folder, "lora", "--merge_adapter_with_base", with_wrong_references)


def test_base_says_strings_that_it_never_heard(base_results: dict[str, Any]) -> None:
    assert base_results["samples"] == NUM_HELD_OUT
    assert base_results["stop_rate"] == 1
    assert base_results["exact_first_codebook"] >= 0.95
    assert base_results["word_error_rate"] <= 0.2
    for hz in (100, 200):  # each sample is in the voice that its prompt asks for
        of_voice = [item for item in base_results["items"] if abs(item["reference_pitch_hz"] - hz) < 5]
        assert len(of_voice) > 20
        assert sum(abs(item["pitch_hz"] - hz) < 5 for item in of_voice) >= 0.9 * len(of_voice)


def test_new_voice_by_lora(folder: Path, base_results: dict[str, Any], lora: Path) -> None:
    options = f"--test_manifest {HELD_OUT}"
    before = evaluated(folder, "before", options)
    assert before["median_pitch_hz"] == pytest.approx(OLD_VOICE_HZ, abs=5)
    after = evaluated(folder, "after", f"{options} --lora_adapter_path {lora}/lora_adapters")
    assert missed(after, base_results) == []
    assert missed(before, base_results) == ["exact", "pitch"]


def test_new_voice_by_qlora(folder: Path, base_results: dict[str, Any]) -> None:
    run = trained(folder, "qlora", "--finetune qlora")
    adapter = f"--test_manifest {HELD_OUT} --lora_adapter_path {run}/lora_adapters"
    assert missed(evaluated(folder, "after_qlora", adapter), base_results) == []


def test_merged_and_by_plain_transformers(folder: Path, base_results: dict[str, Any], lora: Path) -> None:
    """The merged model keeps what was learned; plain transformers generates the same audio."""
    merged = lora / "merged_model"
    results = evaluated(folder, "after_merge", f"--test_manifest {HELD_OUT} --base_model_path {merged}")
    assert missed(results, base_results) == []
    processor = processor_in(merged)
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(merged).eval()
    entries = [json.loads(line) for line in HELD_OUT.read_text().splitlines()[:4]]
    for number, entry in enumerate(entries):
        inputs = processor.apply_chat_template(
            entry["messages"][:2], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        rows = model.generate(**inputs, do_sample=False, max_new_tokens=300)
        expected = processor.batch_decode(rows)[0].float().flatten()
        said, _ = soundfile.read(folder / "after_merge" / f"{number}.wav", dtype="float32")
        torch.testing.assert_close(torch.from_numpy(said), expected.clamp(-1, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_labels_are_noticed(
    folder: Path, base_results: dict[str, Any], with_wrong_references: Path, mutant: str
) -> None:
    """On the data with which the tests above learn the voice: QLoRA's without references, LoRA's with wrong ones."""
    manifest = with_wrong_references if mutant == "reference_trained" else CLIPS
    run = trained(folder, mutant, f"--mutant {mutant}", manifest)
    adapter = f"--test_manifest {HELD_OUT} --num_samples 12 --lora_adapter_path {run}/lora_adapters"
    results = evaluated(folder, f"after_{mutant}", adapter)
    assert MISSES[mutant] <= set(missed(results, base_results))
    assert results["exact_first_codebook"] < 0.6
