"""launch/evaluate.py: it generates the same as plain transformers; sharing samples over ranks changes nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import PROJECT, speech_sample, text_sample, write_manifest
from launcher import free_port, run_script
from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

pytestmark = pytest.mark.slow

ENTRIES = [
    speech_sample("Good morning.", "anna_00.flac", duration=0.5),
    speech_sample("Turn left here.", "ben_00.flac", duration=0.7),
    speech_sample("The next bus leaves.", "ben_01.flac", duration=0.4),
]

RANDOM = "--base_model_path tiny-random-base"


def evaluate(folder: Path, options: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    if ranks == 1:
        return run_script("evaluate", options.split(), folder)
    torchrun = str(Path(sys.executable).parent / "torchrun")
    launcher = [torchrun, "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    command = [*launcher, str(PROJECT / "launch" / "evaluate.py"), *options.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    manifest = write_manifest(folder / "held_out.jsonl", ENTRIES)
    for ranks in (1, 2):
        options = f"{RANDOM} --test_manifest {manifest} --output_dir {ranks} --recognizer pocketsphinx"
        done = evaluate(folder, options, ranks)
        assert done.returncode == 0, done.stderr
        (folder / f"{ranks}.txt").write_text(done.stdout)
    return folder


def test_said_is_what_transformers_says(folder: Path, base: Path) -> None:
    processor = AutoProcessor.from_pretrained(base)
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16).eval()
    results = json.loads((folder / "1" / "evaluation.json").read_text())
    for number, (entry, item) in enumerate(zip(ENTRIES, results["items"], strict=True)):
        reference = soundfile.info(folder / "1" / "reference" / f"{number}.wav").frames // 960
        inputs = processor.apply_chat_template(
            entry["messages"][:2], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        rows = model.generate(**inputs, max_new_tokens=2 * reference + 25, do_sample=False)
        expected = processor.batch_decode(rows)[0].float().flatten()
        said, rate = soundfile.read(folder / "1" / f"{number}.wav", dtype="float32")
        assert rate == 24000
        torch.testing.assert_close(torch.from_numpy(said), expected.clamp(-1, 1), rtol=0, atol=1e-4)
        assert item["length_ratio"] == pytest.approx(len(expected) / 960 / reference)
        assert item["stopped"] == bool((rows[0, -1] == 1025).all())
        assert item["words"] == entry["messages"][1]["content"]


def test_ranks_change_nothing(folder: Path) -> None:
    one, two = (json.loads((folder / name / "evaluation.json").read_text()) for name in ("1", "2"))
    assert one == two
    assert (folder / "1.txt").read_text().splitlines()[:-1] == (folder / "2.txt").read_text().splitlines()[:-1]
    for path in (folder / "1").rglob("*.wav"):
        assert path.read_bytes() == (folder / "2" / path.relative_to(folder / "1")).read_bytes()


def test_table(folder: Path) -> None:
    results = json.loads((folder / "1" / "evaluation.json").read_text())
    names = {"samples", "stop_rate", "length_ratio", "exact_first_codebook", "code_agreement", "mel_distance_db"}
    assert names | {"median_pitch_hz", "word_error_rate", "reference_word_error_rate"} <= results.keys()
    assert results["samples"] == 3
    lines = (folder / "1.txt").read_text().splitlines()
    assert lines[0].split() == ["samples", "3"]
    assert lines[-1] == "evaluation: 1/evaluation.json"
    assert any(line.startswith("warning: stop rate 0 is bad") for line in lines) == (results["stop_rate"] == 0)


def test_comparison_with_another_evaluation(folder: Path) -> None:
    options = f"{RANDOM} --test_manifest {folder}/held_out.jsonl --num_samples 1 --output_dir fewer"
    done = evaluate(folder, f"{options} --compare_with 1/evaluation.json")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines()[:-1] if not line.startswith("warning:")]
    head, samples, *rows = (re.split(r"\s{3,}", line.strip()) for line in lines)
    assert (head, samples) == (["current", "compared with"], ["samples", "1", "3"])
    assert rows[0][0] == "stop rate"
    assert all(len(row) == 3 for row in rows)


def test_refused(tmp_path: Path) -> None:
    """All problems at once: a sample without audio, two numbers, a base, a file that is not an evaluation."""
    manifest = write_manifest(tmp_path / "bad.jsonl", [text_sample("Question?", "Answer.")])
    options = f"--test_manifest {manifest} --num_samples 0 --temperature -1"
    for file, problem in (
        (tmp_path / "none.json", "cannot be read"),
        (PROJECT / "ds_configs" / "zero0.json", "is not an evaluation.json of"),
    ):
        done = evaluate(tmp_path, f"{options} --base_model_path nowhere --compare_with {file}")
        assert done.returncode == 2
        found = f"--compare_with {file}: {problem}"
        numbers = ("--num_samples 0: must be 1 or more", "--temperature -1.0: must be")
        for message in (*numbers, f"{manifest}:1", "nowhere: ", found):
            assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_several_at_once(tmp_path: Path) -> None:
    """Batches give the numbers and the sound of one sample at a time, also of the last, smaller batch."""
    found = {}
    for size in (1, 4):
        options = (
            f"--test_manifest {PROJECT}/samples/digits_held_out.jsonl --num_samples 6 --base_model_path speaking-base"
        )
        done = evaluate(tmp_path, f"{options} --output_dir {size} --batch_size {size}")
        assert done.returncode == 0, done.stderr
        sounds = [(tmp_path / str(size) / f"{number}.wav").read_bytes() for number in range(6)]
        found[size] = json.loads((tmp_path / str(size) / "evaluation.json").read_text()), sounds
    assert found[1] == found[4]
    assert evaluate(tmp_path, f"{options} --output_dir 0 --batch_size 0").returncode == 2
