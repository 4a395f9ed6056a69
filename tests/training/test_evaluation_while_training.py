"""--evaluate_steps: the numbers are those of launch/evaluate.py, training does not change, and the best is kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import read_metrics, speech_sample, text_sample, write_manifest
from launcher import RANDOM, overriding, run_code, run_script, train_runs
from safetensors.torch import load_file, save_file

from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base
from higgs_ds.checkpoints.folder import why_incomplete
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common.errors import InputError
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.training import startup

ADAPTER = Path("lora_adapters") / "adapter_model.safetensors"
CLIPS = {"Good morning.": "anna_00.flac", "Turn left here.": "ben_00.flac", "Guten Abend.": "carla_00.flac"}
BASES = {"v2": RANDOM_BASE, "v3": f"{RANDOM_BASE}-v3"}
# Of each run: its base, ZeRO stage, and how many samples are spoken at once, at which temperature. Two ranks share
# three samples, and one of them has none in the second batch.
RUNS = {
    "greedy": ("v2", 2, 1, 0.0),
    "sampled": ("v2", 0, 2, 1.0),
    "sharded": ("v2", 3, 1, 1.0),
    "sharded_batches": ("v2", 3, 2, 1.0),
    "v3": ("v3", 3, 1, 1.0),
    "v3_batches": ("v3", 3, 2, 1.0),
}
COMPARED = ("greedy", "sharded_batches", "v3")  # with the same training without evaluations


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = [speech_sample(text, clip, duration=0.25) for text, clip in CLIPS.items()]
    return write_manifest(tmp_path_factory.mktemp("clips") / "clips.jsonl", clips)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Path]:
    """The random bases in float32, which launch/evaluate.py computes in the dtype of their files."""
    folders = {}
    for name, builtin in BASES.items():
        folders[name] = tmp_path_factory.mktemp("bases") / name
        shutil.copytree(builtin_base(builtin, cache_dir), folders[name])
        for path in folders[name].glob("*.safetensors"):
            save_file({key: tensor.float() for key, tensor in load_file(path).items()}, path, {"format": "pt"})
        config = (folders[name] / "config.json").read_text().replace('"bfloat16"', '"float32"')
        (folders[name] / "config.json").write_text(config)
    return folders


def line(manifest: Path, ds_json: Path, more: str) -> list[str]:
    """Four steps with dropout and validations."""
    given = (
        f"--deepspeed {ds_json} --precision fp32 --train_manifest {manifest} --val_manifest {manifest} --batch_size 1 "
        f"--grad_accum 1 --max_steps 4 --log_steps 1 --val_steps 2 --save_steps 3 --lr 2e-2 {more}"
    )
    return given.split()


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, manifest: Path, ds_file: Callable[[int], Path], bases: dict[str, Path]
) -> Path:
    """The same trainings with and without evaluations, on two ranks."""
    root, lines = tmp_path_factory.mktemp("evaluated"), []
    for name, (base, stage, batch_size, temperature) in RUNS.items():
        plain = line(
            manifest, ds_file(stage), f"--base_ckpt {bases[base]}{' --ema_decay 0.5' if name == 'greedy' else ''}"
        )
        evaluated = f"--evaluate_steps 4 --evaluate_batch_size {batch_size} --evaluate_temperature {temperature}"
        lines.append([*plain, "--output_dir", str(root / f"{name}-plain")])
        lines.append([*plain, *evaluated.split(), "--output_dir", str(root / name)])
    train_runs(2, lines)
    return root


def evaluation(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_training_does_not_change(runs: Path, name: str) -> None:
    expected, found = (load_file(runs / run / ADAPTER) for run in (f"{name}-plain", name))
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())
    losses = [
        [(one["step"], one.get("train/loss"), one.get("val/loss")) for one in read_metrics(runs / run)
         if "eval/stop_rate" not in one]
        for run in (f"{name}-plain", name)
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert not (runs / f"{name}-plain" / "evaluation").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "adapter"),
    [(name, step, "lora_adapters") for name in RUNS for step in (0, 4)] + [("greedy", 4, "lora_adapters_ema")],
)
def test_numbers_of_the_command(
    runs: Path, manifest: Path, bases: dict[str, Path], tmp_path: Path, name: str, step: int, adapter: str
) -> None:
    """launch/evaluate.py on one process, with the base alone before the first step, else with the saved adapter."""
    base, _, batch_size, temperature = RUNS[name]
    options = (
        f"--test_manifest {manifest} --base_model_path {bases[base]} --batch_size {batch_size} "
        f"--temperature {temperature} --output_dir {tmp_path}/alone"
    )
    if step:
        options += f" --lora_adapter_path {runs / name / adapter}"
    done = run_script("evaluate", options.split(), tmp_path)
    assert done.returncode == 0, done.stderr
    folder = runs / name / "evaluation" / (f"step-{step}-ema" if adapter.endswith("_ema") else f"step-{step}")
    expected, found = evaluation(tmp_path / "alone"), evaluation(folder)
    expected.pop("lora_scale", None)
    assert [item["agreement"] for item in found["items"]] == [item["agreement"] for item in expected["items"]]
    for key in ("samples", "stop_rate", "length_ratio", "mel_distance_db", "median_pitch_hz"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key
    assert found.keys() == expected.keys()
    for number in range(len(CLIPS)):
        said, alone = (soundfile.read(one / f"{number}.wav")[0] for one in (folder, tmp_path / "alone"))
        assert np.allclose(said, alone, rtol=0, atol=1e-4)
    assert len(list((runs / name / "evaluation" / "reference").glob("*.wav"))) == len(CLIPS)
    kind = "eval_ema" if adapter.endswith("_ema") else "eval"
    logged = {one["step"]: one for one in read_metrics(runs / name) if "eval/stop_rate" in one}
    assert list(logged) == [0, 4]
    for key in ("stop_rate", "length_ratio", "mel_distance_db"):
        assert logged[step][f"{kind}/{key}"] == found[key]


@pytest.fixture
def recorded(runs: Path) -> TrainerState:
    state = json.loads((runs / "greedy" / "trainer_state.json").read_text())
    state.pop("finished")
    return TrainerState(**state)


@pytest.mark.slow
def test_what_the_state_records(runs: Path, recorded: TrainerState) -> None:
    lines = {str(one["step"]): one for one in read_metrics(runs / "greedy") if "eval/stop_rate" in one}
    assert recorded.evaluations == {
        step: {key: value for key, value in lines[step].items() if key.startswith("eval")} for step in ("0", "4")
    }
    assert recorded.evaluation_due is False


@pytest.mark.slow
def test_early_stopping_and_the_best_checkpoint(tmp_path: Path, manifest: Path, ds_file: Callable[[int], Path]) -> None:
    """No evaluation is 1000 dB better than the first, so that the run ends after the third; the best is kept."""
    metric = "--metric_for_best_model eval/mel_distance_db --early_stopping_patience 2"
    more = f"--evaluate_steps 1 --evaluate_samples 1 {metric} --early_stopping_min_delta 1000 --keep_checkpoints 1"
    early = [*line(manifest, ds_file(2), more), "--save_steps", "100", "--output_dir", str(tmp_path / "early")]
    train_runs(2, [early])
    state = json.loads((tmp_path / "early" / "trainer_state.json").read_text())
    assert (state["step"], state["stopped_early"], state["metric"]) == (3, True, "eval/mel_distance_db")
    distances = {step: values["eval/mel_distance_db"] for step, values in state["evaluations"].items() if int(step)}
    assert list(distances) == ["1", "2", "3"]
    best = min(distances, key=distances.__getitem__)
    kept = {path.name for path in (tmp_path / "early").glob("checkpoint-*")}
    assert kept == {"checkpoint-3", f"checkpoint-{best}"}


@pytest.mark.parametrize(
    ("metric", "values", "best", "is_out"),
    [
        ("eval/word_error_rate", [0.3, 0.1, 0.2], 10, False),
        ("eval/word_error_rate", [0.1, 0.3, 0.2], 9, True),
        ("eval/speaker_similarity", [0.3, 0.1, 0.2], 9, True),
        ("eval/speaker_similarity", [0.1, 0.2, 0.3], 11, False),
        ("eval/speaker_similarity", [None, 0.2, None], 10, False),  # silence has no voice
        ("eval/mos", [None, None, None], None, True),
        ("eval/mos", ["not asked for", 3.0, 3.0], 10, False),
        ("val/loss", [0.3, 0.1, 0.2], 11, False),
    ],
)
def test_the_best_by_a_metric(metric: str, values: list[Any], best: int | None, is_out: bool) -> None:
    """Steps 9 to 11: as strings, they would sort differently. The validation losses fall."""
    evaluations = {
        str(9 + i): {"eval/stop_rate": 1.0} | ({metric: value} if value != "not asked for" else {})
        for i, value in enumerate(values)
    }
    evaluations["0"] = {metric: -1.0}  # has no checkpoint
    losses = {"9": 3.0, "10": 2.0, "11": 1.0}
    state = TrainerState(20, {}, val_losses=losses, evaluations=evaluations, metric=metric)
    assert state.best_step == best
    assert state.is_out_of_patience(2, 0) is is_out


@pytest.mark.parametrize(
    ("metric", "start", "later", "warned"),
    [
        ("eval/word_error_rate", 0.1, 0.2, True),
        ("eval/word_error_rate", 0.2, 0.1, False),
        ("eval/word_error_rate", 0.2, 0.2, False),
        ("eval/speaker_similarity", 0.2, 0.1, True),
        ("eval/speaker_similarity", 0.1, 0.2, False),
        ("eval/speaker_similarity", None, 0.2, False),
        ("val/loss", 0.1, 0.2, False),
    ],
)
def test_better_before_the_first_step(metric: str, start: float | None, later: float, warned: bool) -> None:
    state = TrainerState(9, {}, metric=metric, evaluations={"0": {metric: start}, "3": {metric: later}})
    assert state.better_start == (start if warned else None)


# Trains, and sends a signal to itself when the first or another sample is spoken.
SIGNALLED = """
import os, signal

from higgs_ds import cli
from higgs_ds.common.process import run_command
from higgs_ds.speech import held_out
from launcher import free_port, rank_environment

speak, calls = held_out.speak, []

def speak_and_signal(*arguments):
    calls.append(1)
    if len(calls) == AT:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert len(calls) <= AT
    return speak(*arguments)

held_out.speak = speak_and_signal
os.environ.update(rank_environment(0, 1, free_port()))
run_command(lambda: cli.train(OPTIONS))
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, manifest: Path, ds_file: Callable[[int], Path]) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_runs(1, [[*line(manifest, ds_file(2), "--evaluate_steps 2"), "--output_dir", str(folder)]])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("at", "step"), [(1, 0), (5, 2), (8, 4)])
def test_interrupted_and_resumed(
    uninterrupted: Path, manifest: Path, ds_file: Callable[[int], Path], tmp_path: Path, at: int, step: int
) -> None:
    """A signal while the first sample is spoken, before the first step, or the second at step 2, or at the last."""
    more = f"--evaluate_steps 2 --resume auto --output_dir {tmp_path}/run"
    argv = line(manifest, ds_file(2), more)
    done = run_code(f"AT, OPTIONS = {at}, {overriding([*RANDOM, *argv])!r}\n{SIGNALLED}", tmp_path)
    assert done.returncode == 6, done.stderr
    assert f"stopped by SIGUSR1 at step {step} of 4" in done.stderr
    if step:
        assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["evaluation_due"] is True
        lines = read_metrics(tmp_path / "run")
        assert [one["step"] for one in lines if "eval/stop_rate" in one] == list(range(0, step, 2))
    train_runs(1, [argv])
    expected, found = (
        [{key: value for key, value in one.items() if re.match(r"step$|val|eval|train/(text|audio)", key)} for one in
         read_metrics(folder)]
        for folder in (uninterrupted, tmp_path / "run")
    )  # fmt: skip
    assert expected == found
    tensors = load_file(tmp_path / "run" / ADAPTER)
    assert all(tensor.equal(tensors[name]) for name, tensor in load_file(uninterrupted / ADAPTER).items())
    states = [json.loads((path / "trainer_state.json").read_text()) for path in (uninterrupted, tmp_path / "run")]
    assert states[0]["evaluations"] == states[1]["evaluations"]
    assert states[1]["evaluation_due"] is False
    assert why_incomplete(tmp_path / "run" / "checkpoint-4") is None


@pytest.mark.slow
def test_resumed_with_other_options(
    uninterrupted: Path, manifest: Path, ds_file: Callable[[int], Path], tmp_path: Path
) -> None:
    """Evaluations of other samples are not compared with later ones; without the option, none follows."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    more = f"--resume auto --output_dir {tmp_path}/run --max_steps"

    def resumed(options: str) -> dict[str, Any]:
        train_runs(1, [line(manifest, ds_file(2), f"{more} {options}")])
        return json.loads((tmp_path / "run" / "trainer_state.json").read_text())

    assert list(resumed("5")["evaluations"]) == ["0", "2", "4"]
    assert list(resumed("6 --evaluate_steps 2")["evaluations"]) == ["0", "2", "4", "6"]
    state = resumed("7 --evaluate_steps 7 --evaluate_samples 2")
    assert list(state["evaluations"]) == ["7"]
    assert state["evaluated_with"]["evaluate_samples"] == 2


@pytest.mark.usefixtures("lone_rank")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--val_split 0 --lr -1", "(?s)--evaluate_steps: needs held-out samples, and --val_split is 0.*--lr -1"),
        ("--val_manifest {texts} --allow_text_targets", "--evaluate_steps 2: no validation sample has audio to gener"),
        (
            "--val_manifest {nowhere} --recognizer {nowhere} --measures similarity --speaker_model {nowhere}",
            "(?s)--recognizer .*is not a speech recognizer.*--speaker_model .*nowhere: no such file or folder",
        ),
        ("--val_manifest {clips} --recognizer pocketsphinx", "its English dictionary does not have guten"),
        ("--val_manifest {clips} --measures similarity --speaker_model {nowhere}", "--speaker_model "),
    ],
)
def test_refused_before_weights_are_loaded(
    manifest: Path, ds_file: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(startup, "load_run", lambda _: pytest.fail("the base would be loaded"))
    texts = write_manifest(tmp_path / "texts.jsonl", [text_sample("Who?", "You.")])
    given = more.format(clips=manifest, nowhere=tmp_path / "nowhere", texts=texts)
    argv = (
        f"--deepspeed {ds_file(2)} --train_manifest {manifest} --evaluate_steps 2 {given} --output_dir {tmp_path}/run"
    )
    with pytest.raises(InputError, match=message):
        startup.start(*parse_train_options(overriding([*RANDOM, *argv.split()])), FolderLock())


@pytest.mark.usefixtures("lone_rank")
def test_no_room_in_the_output_folder(manifest: Path, ds_file: Callable[[int], Path], tmp_path: Path) -> None:
    """Is reported with what is wrong in the data."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "evaluation").touch()
    argv = f"--deepspeed {ds_file(2)} --evaluate_steps 2 --train_manifest {tmp_path}/nowhere --output_dir {run}"
    with pytest.raises(InputError, match=f"(?s)--output_dir {run}/evaluation: .* is a file, not a folder.*nowhere: "):
        startup.start(*parse_train_options(overriding([*RANDOM, *argv.split()])), FolderLock())


@pytest.mark.slow
def test_of_pairs_the_chosen_are_spoken(tmp_path: Path, ds_file: Callable[[int], Path]) -> None:
    def pair(text: str, chosen: str, rejected: str) -> dict[str, Any]:
        *prompt, answer = speech_sample(text, chosen, duration=0.25)["messages"]
        other = speech_sample(text, rejected, duration=0.4)["messages"][-1]
        return {"prompt": prompt, "chosen": [answer], "rejected": [other]}

    pairs = write_manifest(tmp_path / "pairs.jsonl", [pair(text, clip, "anna_03.flac") for text, clip in CLIPS.items()])
    given = (
        f"--objective dpo --pairs {pairs} --val_manifest {pairs} --deepspeed {ds_file(2)} --output_dir {tmp_path}/run "
        "--max_steps 1 --evaluate_steps 1"
    )
    train_runs(1, [given.split()])
    items = evaluation(tmp_path / "run" / "evaluation" / "step-1")["items"]
    assert [item["words"] for item in items] == list(CLIPS)
    lengths = [soundfile.info(path).duration for path in (tmp_path / "run" / "evaluation" / "reference").glob("*.wav")]
    assert max(lengths) < 0.3  # of the chosen clips
