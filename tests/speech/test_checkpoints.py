"""launch/evaluate.py --checkpoints: the best of six checkpoints by construction, and what each other one fails by."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, speech_sample, write_manifest
from launcher import free_port, run_script, train_runs
from safetensors.torch import load_file

from higgs_ds.bases.builtin import builtin_base
from higgs_ds.checkpoints.folder import find_checkpoints, why_incomplete
from higgs_ds.speech.generate import add_adapter, load_generation_model, open_generation_model, remove_adapter

CLIPS, HELD_OUT = PROJECT / "samples" / "digits.jsonl", PROJECT / "samples" / "digits_held_out.jsonl"
BASE = (
    "--base_ckpt speaking-base --val_split 0 --batch_size 8 --grad_accum 1 --precision fp32 "
    "--lora_r 64 --lora_alpha 128 --lora_targets audio_mlp --codebook_weights 4 2 1 .2 .2 .2 .2 .2"
)
SAMPLES, TAUGHT = 8, 16
MEASURED = "--recognizer pocketsphinx --measures similarity"
BEST = "checkpoint-90"
# By what the rule drops each of the others.
DROPPED_BY = {
    "checkpoint-2": "speaker similarity",  # at the start: still the base's voice
    "checkpoint-30": "stop rate|error rate",  # under-trained
    "checkpoint-110": "speaker similarity",  # trained on clips of the base's voice, not of the one to learn
    "checkpoint-130": "stop rate",  # has learned never to stop
    "checkpoint-150": "error rate",  # over-trained on four texts
}

pytestmark = pytest.mark.slow


def evaluated(folder: Path, options: str) -> subprocess.CompletedProcess[str]:
    done = run_script("evaluate", options.split(), folder)
    assert done.returncode == 0, done.stderr
    return done


def refused(folder: Path, options: str) -> str:
    done = run_script("evaluate", options.split(), folder)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six checkpoints. Two are its own; four are of runs with planted faults."""
    folder = tmp_path_factory.mktemp("checkpoints")
    entries = [json.loads(line) for line in CLIPS.read_text().splitlines()]
    for entry in entries:
        audio = entry["messages"][-1]["content"]
        audio["audio_url"] = str(CLIPS.parent / audio["audio_url"])
    few = write_manifest(folder / "few.jsonl", entries[:4])
    evaluated(
        folder, f"--test_manifest {CLIPS} --num_samples {TAUGHT} --base_model_path speaking-base --output_dir other"
    )
    for number, entry in enumerate(entries[:TAUGHT]):
        entry["messages"][-1]["content"]["audio_url"] = str(folder / "other" / f"{number}.wav")
    other = write_manifest(folder / "other.jsonl", entries[:TAUGHT])
    run, good = folder / "run", f"--init_from {folder}/run/lora_adapters"
    runs = {
        "run": f"--train_manifest {CLIPS} --max_steps 90 --save_steps 30 --lr 6e-3 --lora_dropout 0.1",
        "checkpoint-2": f"--train_manifest {CLIPS} --max_steps 2 --lr 1e-4",
        "checkpoint-110": f"--train_manifest {other} --max_steps 10 --lr 1e-3",
        "checkpoint-130": f"--train_manifest {CLIPS} --max_steps 20 --lr 4e-3 {good} --mutant end_denied",
        "checkpoint-150": f"--train_manifest {few} --max_steps 60 --lr 1e-2 {good}",
    }
    for name, options in runs.items():
        train_runs(1, [f"{BASE} {options} --output_dir {folder / name}".split()])
    shutil.rmtree(run / "checkpoint-60")
    for name in list(runs)[1:]:
        shutil.copytree(find_checkpoints(folder / name)[0], run / name)
    # A seventh one, which was not saved whole.
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-170", ignore=shutil.ignore_patterns("rng_state*"))
    return folder


@pytest.fixture(scope="module")
def options(folder: Path) -> str:
    return f"--checkpoints {folder}/run --test_manifest {HELD_OUT} --num_samples {SAMPLES} {MEASURED}"


@pytest.fixture(scope="module")
def compared(folder: Path, options: str) -> tuple[str, dict[str, Any]]:
    done = evaluated(folder, options)
    return done.stdout, json.loads((folder / "evaluation" / "checkpoints.json").read_text())


def test_names_the_best_and_why_not_the_others(folder: Path, compared: tuple[str, dict[str, Any]]) -> None:
    printed, found = compared
    rows = {row["checkpoint"]: row for row in found["checkpoints"]}
    assert list(rows) == sorted({BEST, *DROPPED_BY}, key=lambda label: int(label.split("-")[1]))
    assert found["best"] == BEST, printed
    assert rows[BEST]["verdict"] == "best"
    for label, criterion in DROPPED_BY.items():
        assert re.match(criterion, rows[label]["verdict"]), (label, rows[label])
    assert rows["checkpoint-130"]["stop_rate"] == 0
    assert f"best: {BEST}: {found['reason']}" in printed.splitlines()
    assert f"its adapter: --lora_adapter_path {folder}/run/{BEST}/lora_adapters" in printed.splitlines()
    assert f"{folder}/run/checkpoint-170: skipped: missing rng_state.safetensors" in printed.splitlines()
    assert len(found["skipped"]) == 1
    assert "more than 0.1 below the highest are dropped" in found["rule"]


def test_without_a_recognizer_and_voices_the_sound_decides(folder: Path, options: str) -> None:
    """Of the same speech, and it says that it knows nothing better."""
    done = evaluated(folder, options.replace(MEASURED, "--output_dir by_sound"))
    assert f"best: {BEST}: its mel distance in dB " in done.stdout
    assert "note: the mel distance decides" in done.stdout


def test_same_as_each_adapter_on_its_own(folder: Path, options: str, compared: tuple[str, dict[str, Any]]) -> None:
    for label in (BEST, "checkpoint-150"):  # before and after others
        adapter = f"--lora_adapter_path {folder}/run/{label}/lora_adapters --output_dir alone-{label}"
        evaluated(folder, f"{options} {adapter}".replace(f"--checkpoints {folder}/run ", ""))
        alone = json.loads((folder / f"alone-{label}" / "evaluation.json").read_text())
        together = json.loads((folder / "evaluation" / label / "evaluation.json").read_text())
        assert together.pop("identity")
        assert together == alone
        for path in (folder / f"alone-{label}").glob("*.wav"):
            assert path.read_bytes() == (folder / "evaluation" / label / path.name).read_bytes()


def test_what_is_done_is_not_spoken_again(folder: Path, options: str, compared: tuple[str, dict[str, Any]]) -> None:
    output = folder / "evaluation"
    wavs = {path: path.stat().st_mtime_ns for path in output.rglob("*.wav")}
    done = evaluated(folder, options)
    assert done.stdout.count("was evaluated before on the same samples with the same settings") == 6
    assert json.loads((output / "checkpoints.json").read_text()) == compared[1]
    (output / BEST / "0.wav").unlink()
    done = evaluated(folder, options)
    assert done.stdout.count("was evaluated before") == 5
    assert f"{BEST}: {SAMPLES} samples in " in done.stdout
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*.wav")}
    changed = {path.parent.name for path, time in after.items() if wavs[path] != time}
    assert changed == {BEST, "reference"}
    assert json.loads((output / "checkpoints.json").read_text()) == compared[1]


def test_strengths_on_two_ranks(folder: Path) -> None:
    """Ranks change nothing. At strength 0, every checkpoint is the base; of equal ones, the earliest is named."""
    few = folder / "two"
    for label in ("checkpoint-2", BEST):
        if not (few / label).exists():
            shutil.copytree(folder / "run" / label, few / label)
    options = f"--checkpoints {few} --test_manifest {HELD_OUT} --num_samples 2 --strengths 0 0.5"
    evaluated(folder, f"{options} --output_dir one")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "--master_port"]
    command = [*torchrun, str(free_port()), str(PROJECT / "launch" / "evaluate.py"), *options.split()]
    done = subprocess.run([*command, "--output_dir", "2"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    labels = ["checkpoint-2 x 0", "checkpoint-2 x 0.5", f"{BEST} x 0", f"{BEST} x 0.5"]
    found = json.loads((folder / "one" / "checkpoints.json").read_text())
    assert [row["checkpoint"] for row in found["checkpoints"]] == labels
    assert found == json.loads((folder / "2" / "checkpoints.json").read_text())
    results = {}
    for label in labels:
        name = label.replace(" x ", "-x")
        assert {path.name for path in (folder / "one" / name).iterdir()} == {"0.wav", "1.wav", "evaluation.json"}
        one, two = (json.loads((folder / ranks / name / "evaluation.json").read_text()) for ranks in ("one", "2"))
        assert one == two
        results[label] = one["items"]
    assert results["checkpoint-2 x 0"] == results[f"{BEST} x 0"] != results[f"{BEST} x 0.5"]


def test_averaged_weights(folder: Path) -> None:
    """Both adapters of a checkpoint are evaluated; here both are the same, and the first is named."""
    both = folder / "both"
    shutil.copytree(folder / "run" / BEST, both / BEST)
    shutil.copytree(both / BEST / "lora_adapters", both / BEST / "lora_adapters_ema")
    options = f"--checkpoints {both} --test_manifest {HELD_OUT} --num_samples 1 --output_dir averaged"
    done = evaluated(folder, options)
    found = json.loads((folder / "averaged" / "checkpoints.json").read_text())
    assert [(row["checkpoint"], row["averaged"]) for row in found["checkpoints"]] == [
        (BEST, False), (f"{BEST} averaged", True),
    ]  # fmt: skip
    assert f"best: {BEST}: 2 checkpoints are equal by this rule, and it is not averaged" in done.stdout
    one, other = (folder / "averaged" / name / "0.wav" for name in (BEST, f"{BEST}-ema"))
    assert one.read_bytes() == other.read_bytes()


def test_page(folder: Path, compared: tuple[str, dict[str, Any]], page: Any) -> None:
    page.goto((folder / "evaluation" / "checkpoints.html").as_uri())
    assert page.locator("#checkpoints tr").count() == 7
    assert BEST in page.locator("#checkpoints tr.best").inner_text()
    assert compared[1]["reason"] in page.locator("#best").inner_text()
    assert page.locator("section.sample").count() == SAMPLES
    players = page.locator("section.sample").first.locator("audio")
    assert players.count() == 7
    for number in range(7):
        assert players.nth(number).get_attribute("src").startswith("data:audio/ogg;base64,")
    assert "checkpoint-170: skipped" in page.locator("#skipped").inner_text()


def test_refused_together_before_weights(folder: Path, tmp_path: Path) -> None:
    base = builtin_base("speaking-base", tmp_path / "cache")
    run = f"{folder}/run"
    found = refused(
        folder,
        f"--checkpoints {run} --test_manifest {HELD_OUT} --lora_adapter_path {run}/lora_adapters --lora_scale 0.5 "
        f"--base_model_path {run}/merged_model --strengths nan 0.5 0.50 --measures similarity "
        f"--speaker_model {base} --compare_with x.json --num_samples 0",
    )
    for problem in (
        "--lora_adapter_path: --checkpoints evaluates the adapters of a run",
        "--lora_scale 0.5: with --checkpoints, give --strengths",
        "--compare_with: --checkpoints compares",
        f"--base_model_path {run}/merged_model: is a model of the run",
        "--strengths nan: must be a finite number",
        "--strengths 0.5: is given 2 times",
        f"--speaker_model {base}: is not an x-vector model",
        "--num_samples 0: must be 1 or more",
    ):
        assert problem in found
    assert "--strengths: needs --checkpoints" in refused(
        folder, f"--test_manifest {HELD_OUT} --strengths 0.5 --output_dir none"
    )


def test_what_is_no_run_with_adapters(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full" / "checkpoint-1" / "trained_weights").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder / "run" / "checkpoint-170", tmp_path / "broken" / "checkpoint-170")
    for run, problem in (
        (tmp_path / "full", "is a run with --finetune full, whose checkpoints have no adapters; write each as a model"),
        (tmp_path / "empty", "has no checkpoint-N/"),
        (tmp_path / "none", "no such folder"),
        (folder / "run" / BEST, f"is one checkpoint; give the folder of its run, {folder}/run"),
        (tmp_path / "broken", "has no complete checkpoint"),
    ):
        found = refused(folder, f"--checkpoints {run} --test_manifest {HELD_OUT} --output_dir none")
        assert f"--checkpoints {run}: {problem}" in found
    assert why_incomplete(folder / "run" / "checkpoint-170") is not None


def test_nothing_of_an_adapter_stays(base: Path, tmp_path: Path, cache_dir: Path) -> None:
    """Nor of heads that were trained with it, which PEFT's own `unload` leaves in the model."""
    manifest = write_manifest(tmp_path / "m.jsonl", [speech_sample("Hello.", "anna_00.flac", duration=0.3)] * 4)
    options = "--max_steps 1 --lr 1e-2 --batch_size 1 --grad_accum 1 --val_split 0 --precision fp32 --also_train heads"
    train_runs(1, [f"--train_manifest {manifest} {options} --output_dir {tmp_path}/run".split()])
    speaker = open_generation_model(str(base), tmp_path / "run" / "lora_adapters", None, cache_dir)
    plain = open_generation_model(str(base), None, None, cache_dir)
    cpu = torch.device("cpu")
    expected = {name: weight.clone() for name, weight in load_generation_model(plain, cpu).state_dict().items()}
    model = load_generation_model(speaker, cpu)
    with_heads = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):
        model = remove_adapter(model)
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(weight.equal(expected[name]) for name, weight in found.items())
        model = add_adapter(model, speaker)
        assert all(weight.equal(with_heads[name]) for name, weight in model.state_dict().items())
    heads = load_file(tmp_path / "run" / "lora_adapters" / "adapter_model.safetensors")
    assert any(not weight.equal(expected[name.removeprefix("base_model.model.")]) for name, weight in heads.items()
               if name.removeprefix("base_model.model.") in expected)  # fmt: skip
