"""Runs whose references are drawn and left out by epoch: the same for any split over ranks, and when resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import VOICES, read_metrics, write_manifest
from launcher import RANDOM, run_script, train_runs
from safetensors.torch import load_file

from higgs_ds.checkpoints.folder import manifest_of
from higgs_ds.common.errors import EXIT_BAD_INPUT
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.options.train import TrainOptions
from higgs_ds.training.startup import _check_and_encode

pytestmark = pytest.mark.slow

LOSS = 1e-6  # relative, as in test_invariance.py
STEPS, SAVED_STEP = 8, 3
OPTIONS = "--reference random --reference_dropout 0.4"


def forget_options(checkpoint: Path) -> None:
    """Make a checkpoint one of a version without the options, which is to be resumed."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["settings"].pop("reference_dropout") == 0
    assert state["settings"].pop("random_references") is False
    assert state["settings"].pop("mix") is None
    assert state["settings"].pop("trim_silence") is None
    assert state["settings"].pop("speaker_prompt") == "none"
    path.write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest_of(checkpoint)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one rank with accumulation, the same resumed within an epoch, and of two ranks."""
    root = tmp_path_factory.mktemp("runs")
    entries = [
        {
            "audio": f"{VOICES / who}_0{i}.flac",
            "text": f"{who} {i}",
            "speaker": who,
            "offset": 0,
            "duration": (3 + 5 * i) / 10,
        }
        for who in ("anna", "ben")
        for i in range(4)
    ]
    manifest = write_manifest(root / "clips.jsonl", entries)

    def command(name: str, batching: str, more: str = OPTIONS) -> list[str]:
        line = (
            f"--train_manifest {manifest} --val_split 0.1 --precision fp32 --lora_dropout 0 --lr 1e-3 --log_steps 1 "
            f"--max_steps {STEPS} --val_steps 4 --save_steps {SAVED_STEP} --output_dir {root / name} {batching} {more}"
        )
        return line.split()

    alone, tokens = "--batch_size 2 --grad_accum 2", "--max_tokens_per_batch 450 --grad_accum 2"
    train_runs(1, [command("alone", alone), command("tokens", tokens), command("old", alone, "")])
    train_runs(2, [command("ranks", "--batch_size 2 --grad_accum 1"), command("tokens-ranks", tokens[:-1] + "1")])
    forget_options(root / "old" / f"checkpoint-{STEPS}")
    unfinished = shutil.ignore_patterns(f"checkpoint-{2 * SAVED_STEP}", f"checkpoint-{STEPS}", "lora_adapters")
    resumed = []
    for name, batching in (("alone", alone), ("tokens", tokens)):
        shutil.copytree(root / name, root / f"{name}-resumed", ignore=unfinished)
        resumed.append([*command(f"{name}-resumed", batching), "--resume", "auto"])
    train_runs(1, [*resumed, [*command("old", alone, ""), "--resume", "auto"]])  # raises if one is refused
    return root


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line[f"{part}/text_loss"], line[f"{part}/audio_loss"])
            for line in read_metrics(run) for part in ("train", "val") if f"{part}/audio_loss" in line]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), [("alone", "ranks"), ("tokens", "tokens-ranks")])
def test_same_losses_on_two_ranks(runs: Path, one: str, other: str) -> None:
    expected, found = losses(runs / one), losses(runs / other)
    assert len(expected) >= STEPS + 2
    assert len(found) == len(expected)
    assert all(a == pytest.approx(b, rel=LOSS) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ["alone", "tokens"])
def test_each_epoch_has_its_own_references(runs: Path, tmp_path: Path, lone_rank: None, name: str) -> None:
    """The samples of each step, and how long they are, are those of that epoch's references."""
    settings = json.loads((runs / name / "settings.json").read_text())
    options = TrainOptions().replace(
        **{option: settings[option] for option in ("val_split", "reference", "reference_dropout", "base_ckpt")},
        train_manifest=tuple(map(Path, settings["train_manifest"])), output_dir=tmp_path,
    )  # fmt: skip
    train, max_tokens = _check_and_encode(options, set(), FolderLock()).train, settings["max_tokens_per_batch"]
    sampler = WindowSampler(train.lengths, 2, 2, 0, 1, 42, 1024, max_tokens, train.lengths_in)
    lengths = [
        [train.lengths_in(window.epoch_number)[i] for batch in window.micro_batches for i in batch]
        for window in sampler.windows(0, STEPS)
    ]
    lines = [line for line in read_metrics(runs / name) if "tokens_per_s" in line]
    means = [line["tokens_per_s"] / line["samples_per_s"] for line in lines]
    assert means == pytest.approx([sum(of_step) / len(of_step) for of_step in lengths])
    totals = [sum(train.lengths), *(sum(train.lengths_in(epoch)) for epoch in range(4))]
    assert len(set(totals)) == len(totals)


@pytest.mark.parametrize("name", ["alone", "tokens"])
def test_resumed_within_an_epoch(runs: Path, name: str) -> None:
    whole, resumed = runs / name, runs / f"{name}-resumed"
    assert losses(whole) == losses(resumed)
    for file in ("lora_adapters/adapter_model.safetensors", f"checkpoint-{STEPS}/optimizer.safetensors"):
        expected, found = load_file(whole / file), load_file(resumed / file)
        assert expected.keys() == found.keys()
        assert all(tensor.equal(found[key]) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ("--reference context", ["random_references True, but this run has False"]),
        (
            "--reference random --trim_silence 0.2",
            ["reference_dropout 0.4, but this run has 0.0", "trim_silence None, but this run has 0.2"],
        ),
    ],
)
def test_resume_needs_the_same_options(runs: Path, options: str, messages: list[str]) -> None:
    line = f"--config {runs / 'alone' / 'settings.json'} --resume auto --reference_dropout 0 {options}"
    done = run_script("train", [*RANDOM, *line.split()], runs)
    assert done.returncode == EXIT_BAD_INPUT
    for message in messages:
        assert f"was trained with {message}" in done.stderr
