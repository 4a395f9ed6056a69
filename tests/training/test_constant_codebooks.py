"""Codebooks that are constant in the data are named, and the audio loss without them is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOICES_MANIFEST, read_metrics, speech_sample, write_manifest
from launcher import run_script

from higgs_ds.bases.builtin import DEFAULT_BASE, builtin_base
from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.preparation import Preparation
from higgs_ds.model.loss import LossWeights
from higgs_ds.options.train import DataOptions
from higgs_ds.training.constant_codebooks import ConstantCodebooks, find_constant

WEIGHTS = LossWeights.of(1, 1, 4, [4, 2, 1, 1])
LOSSES = {"train/loss": 1.6, "train/audio_loss": 1.5, **{f"train/audio_loss/cb{k}": 2.0 - k for k in range(3)}}


@pytest.fixture(scope="module")
def bundle(base: Path) -> Bundle:
    return open_bundle(str(base), None, None, base.parent)


@pytest.fixture(scope="module")
def speaking(cache_dir: Path) -> Path:
    return builtin_base(DEFAULT_BASE, cache_dir)


def dataset(bundle: Bundle, manifest: Path, cache: Path) -> Dataset:
    options = DataOptions(allow_text_targets=True)
    with Preparation(options, bundle.coder(cache), cache) as preparation:
        checked = preparation.check(manifest)
        preparation.encode(checked, torch.device("cpu"))
        index = preparation.keep(checked)
        assert preparation.coder is not None
        return Dataset(index, np.arange(len(index)), preparation.coder)


def test_found_in_the_codes(bundle: Bundle, speaking: Path, lone_rank: None, tmp_path: Path) -> None:
    """The speaking base's codec has three codebooks that vary, the random one's all vary in the first sample."""
    entries = [speech_sample(f"Clip {i}.", f"anna_0{i}.flac", duration=0.5) for i in range(3)]
    manifest = write_manifest(tmp_path / "m.jsonl", entries)
    data = dataset(open_bundle(str(speaking), None, None, tmp_path), manifest, tmp_path / "cache")
    codes = torch.cat([data.encoded(i).codes[0] for i in range(3)], dim=1)
    constant = [k for k, row in enumerate(codes) if len(row.unique()) == 1]
    assert 0 < len(constant) < 8
    assert find_constant(data) == (constant, 3)
    assert find_constant(dataset(bundle, manifest, tmp_path / "other")) == ([], 1)


def test_without_audio_targets(bundle: Bundle, lone_rank: None, tmp_path: Path) -> None:
    entry = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]}
    assert find_constant(dataset(bundle, write_manifest(tmp_path / "m.jsonl", [entry]), tmp_path)) == ([], 0)


def test_losses_without_them() -> None:
    found = ConstantCodebooks((1, 3), 9, WEIGHTS)
    values = LOSSES | {"train/audio_loss/cb3": 0.0} | {"val/loss": 1.0}
    assert found.losses_of_others(values) == {"train/audio_loss_varying": pytest.approx((4 * 2.0 + 1 * 0.0) / 5)}
    assert ConstantCodebooks((), 9, WEIGHTS).losses_of_others(values) == {}
    assert ConstantCodebooks((0, 1, 2, 3), 9, WEIGHTS).losses_of_others(values) == {}


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            ConstantCodebooks((1, 2, 3), 1000, WEIGHTS),
            "warning: codebooks 1 to 3 of 4: the same code in 1,000 training samples, all that were checked; the mean "
            "audio loss looks small for that: at step 5 it is 1.5000, without them 4.0000 (train/audio_loss_varying). "
            "Listen to recordings that went through this codec: does it code such voices?",
        ),
        (
            ConstantCodebooks((3,), 1, WEIGHTS, is_expected=True),
            "note: codebook 3 of 4: unused by the codec of the built-in base; the mean audio loss looks small for "
            "that: at step 5 it is 1.5000, without it 4.0000 (train/audio_loss_varying)",
        ),
    ],
)
def test_said_once(found: ConstantCodebooks, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    found.report_once(4, {"train/audio_loss": math.nan})
    for step in (5, 6):
        found.report_once(step, {"train/audio_loss": 1.5, "train/audio_loss_varying": 4.0})
    ConstantCodebooks((), 1000, WEIGHTS).report_once(5, {"train/audio_loss": 1.5})
    assert capsys.readouterr().out == f"{line}\n"


@pytest.mark.slow
def test_in_a_run(speaking: Path, tmp_path: Path, ds_file: Callable[[int], Path]) -> None:
    """Its metrics, and a warning with the numbers of its first log line: the folder is no built-in base by name."""
    argv = (
        f"--deepspeed {ds_file(2)} --base_ckpt {speaking} --train_manifest {VOICES_MANIFEST} --val_split 0.1 --quiet "
        f"--output_dir {tmp_path}/run --precision fp32 --max_steps 2 --log_steps 1 --val_steps 2 --no_report "
        "--batch_size 1 --grad_accum 1"
    )
    done = run_script("train", argv.split(), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, _, validation = read_metrics(tmp_path / "run")
    for kind, line in (("train", first), ("val", validation)):
        of_three = [line[f"{kind}/audio_loss/cb{k}"] for k in range(3)]
        assert line[f"{kind}/audio_loss_varying"] == pytest.approx(sum(of_three) / 3)
    *_, warning = done.stdout.splitlines()
    assert warning.startswith("warning: codebooks 3 to 7 of 8: the same code in 22 training samples, all ")
    expected = f"at step 1 it is {first['train/audio_loss']:.4f}, without them {first['train/audio_loss_varying']:.4f} "
    assert expected in warning
