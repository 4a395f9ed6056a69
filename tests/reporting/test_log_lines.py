"""What a run prints of its metrics fits into 100 characters, whatever the numbers and names are."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import read_metrics

from higgs_ds.common.errors import NotFiniteError
from higgs_ds.model.loss import LossWeights
from higgs_ds.reporting import meter as meter_module
from higgs_ds.reporting import metrics_log
from higgs_ds.reporting.log_lines import SHOWN, log_lines
from higgs_ds.reporting.meter import Meter
from higgs_ds.reporting.metrics_log import MetricsLog
from higgs_ds.training.objectives import Supervised

CODEBOOKS = {f"train/audio_loss/cb{k}": 6.9 for k in range(8)}
TRAINING = {
    "train/loss": 7.1234567, "train/text_loss": 0.25, "train/audio_loss": 6.8734567, **CODEBOOKS,
    "train/audio_accuracy": 0.5, "padding": 0.1, "samples_per_s": 3.2, "tokens_per_s": 1234.5, "step_time_s": 0.7,
    "lr": 2e-4, "lr/lora_B": 8e-4, "grad_norm": 3.0, "loss_scale": 65536, "overflows": 1,
}  # fmt: skip
VALIDATION = {
    "val/loss": 7.0, "val/text_loss": 0.25, "val/audio_loss": 6.75, "val/audio_loss/cb0": 6.9,
    "val/text_accuracy": 0.9, "val/audio_accuracy": 0.25, "val/eos_accuracy": 1.0,
}  # fmt: skip


def test_training() -> None:
    assert log_lines(120, 1000, TRAINING, left_s=616.4) == [
        "step 120/1000: loss 7.1235 (text 0.2500 audio 6.8735), lr 0.0002, 1234 tok/s, 0:10:16 left"
    ]


def test_training_without_text_targets_and_after_the_last_step() -> None:
    values = TRAINING | {"train/text_loss": math.nan, "skipped_steps": 2}
    assert log_lines(1000, 1000, values, left_s=0.0) == [
        "step 1000/1000: loss 7.1235 (audio 6.8735), lr 0.0002, 1234 tok/s, 2 skipped"
    ]


def test_all_steps_were_skipped() -> None:
    values = {key: value for key, value in TRAINING.items() if not key.startswith("train/")} | {"skipped_steps": 3}
    assert log_lines(3, 1000, values, left_s=100_000) == [
        "step 3/1000: no step was applied, lr 0.0002, 1234 tok/s, 1.2 d left, 3 skipped"
    ]


def test_validation_with_averages_and_manifests() -> None:
    averaged = {key.replace("val/", "val_ema/"): value / 2 for key, value in VALIDATION.items()}
    manifests = {"val/digits/loss": 7.5, "val/digits/text_loss": 0.3, "val/a/b.jsonl/loss": 6.5}
    assert log_lines(200, 1000, VALIDATION | averaged | manifests) == [
        "step 200/1000: validation: loss 7.0000 (text 0.2500 audio 6.7500), accuracy: audio 0.250 end 1.000",
        "step 200/1000: validation, averaged weights: loss 3.5000 (text 0.1250 audio 3.3750)",
        "step 200/1000: validation of digits: loss 7.5000",
        "step 200/1000: validation of a/b.jsonl: loss 6.5000",
    ]


@pytest.mark.parametrize(
    ("rate", "line"),
    [
        (0.5, "step 5/9: samples: stop rate 0.5, length 1.02 of the references'"),
        (0.0, "step 5/9: samples: stop rate 0 (bad: none ended on its own), length 1.02 of the references'"),
    ],
)
def test_samples(rate: float, line: str) -> None:
    assert log_lines(5, 9, {"sample/stop_rate": rate, "sample/length_ratio": 1.0234}) == [line]


def test_evaluation() -> None:
    measured = {
        "eval/stop_rate": 0.9, "eval/length_ratio": 1.0234, "eval/speaking_rate": 1.1, "eval/mel_distance_db": 3.25,
        "eval/word_error_rate": 0.125, "eval/speaker_similarity": 0.875, "eval/mos": 3.5, "eval/mos_voice": 3.9,
    }  # fmt: skip
    averaged = {"eval_ema/stop_rate": 0.0, "eval_ema/mel_distance_db": 4.0, "eval_ema/length_ratio": 2.0}
    assert log_lines(5, 9, measured | averaged) == [
        "step 5/9: evaluation: stop rate 0.9, word error rate 0.125, speaker similarity 0.875, mos 3.5",
        "step 5/9: evaluation, averaged weights: stop rate 0 (bad: none ended on its own), length ratio 2",
    ]


@pytest.mark.parametrize("loss", [7.1, 1.2345e-5, 123456.789, math.inf, math.nan, 0.0])
@pytest.mark.parametrize("steps", [(1, 9), (654321, 987654), (1234567, 9876543)])
def test_no_line_is_too_long(loss: float, steps: tuple[int, int]) -> None:
    """Long names, many steps, unusual numbers; the important parts are in them."""
    names = ["n" * 300, "/".join(["folder"] * 40), "\u00fcber" * 50]
    manifests = {f"val/{name}/{kind}": loss for name in names for kind in ("loss", "text_loss")}
    kinds = [
        {key: loss if "loss" in key else value for key, value in TRAINING.items()}
        | {"lr": 1.23456e-5, "tokens_per_s": 987654.3, "skipped_steps": 4321},
        {key: loss if "loss" in key else value for key, value in VALIDATION.items()} | manifests,
        {f"val_ema/{key.removeprefix('val/')}": loss for key in VALIDATION},
        {"sample/stop_rate": 0.0, "sample/length_ratio": 1.23456e7},
        {f"eval_ema/{name}": 1.23456e7 for name in SHOWN} | {"eval_ema/stop_rate": 0.0},
    ]
    for values, left_s in itertools.product(kinds, (None, 59.0, 86399.0, 99.96 * 86400)):
        lines = log_lines(*steps, values, left_s)
        assert lines
        assert max(map(len, lines)) <= 100, lines
    (line,) = log_lines(*steps, kinds[0], 99.9 * 86400)
    assert line.startswith(f"step {steps[0]}/{steps[1]}: loss ")
    assert all(f"{part} " in line for part in ("text", "audio", "lr", "988k")) or math.isnan(loss)
    assert steps[1] > 1_000_000 or "99.9 d left" in line
    assert sum("validation of nnn" in line for line in log_lines(*steps, kinds[1])) == 1


def test_the_log_prints_the_lines_and_keeps_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path, 0, 1000)
    log.write(120, 1.5, TRAINING)
    log.write(120, 1.5, VALIDATION)
    with pytest.raises(NotFiniteError, match=r"train/loss is nan at step 130; see .*metrics\.jsonl"):
        log.write(130, 1.6, TRAINING | {"train/loss": math.nan})
    log.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["step 120/1000", "step 120/1000", "step 130/1000"]
    assert "0:10:16 left" in printed[0]
    written = read_metrics(tmp_path)
    assert TRAINING.items() <= written[0].items()
    assert VALIDATION.items() <= written[1].items()
    assert written[2]["train/loss"] is None


def test_remaining_time_has_what_is_done_between_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take 0.7 s; from step 100 to 200, validations and evaluations take 130 s beside them."""
    now = [1000.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    log = MetricsLog(tmp_path, 0, 1000)
    log.write(100, 1.0, TRAINING)
    now[0] += 200
    log.write(200, 2.0, TRAINING)
    log.close()
    left = [line.split(", ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert left == ["0:10:30 left", "0:26:40 left"]


def test_speed_leaves_out_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is read, or a new interval begins, within one: two steps of 5 s, beside pauses of 100 s."""
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    meter = Meter(Supervised(LossWeights.of(1, 1, 8, None)), 8, torch.device("cpu"))
    times = []
    for _ in range(2):
        for _ in range(2):
            now[0] += 5
            meter.steps, meter.num_positions = meter.steps + 1, 10
        with meter.paused():
            now[0] += 100
            times.append(meter.read()["step_time_s"])
            meter.reset()
            now[0] += 100
    assert times == [5, 5]
