"""report.html of a real run in a browser: from disk, without a network, without any error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import play, read_metrics
from launcher import train_runs

from higgs_ds.options.train import TrainOptions
from higgs_ds.reporting.report_page import RunFacts, write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "my <voice>"
    options = (
        f"--deepspeed {ds_file(2)} --precision fp32 --train_manifest {mixed_manifest} --allow_text_targets "
        "--val_split 0.34 --batch_size 1 --grad_accum 1 --max_steps 4 --log_steps 1 --val_steps 2 --save_steps 2 "
        "--sample_steps 2 --ema_decay 0.9 --loraplus_lr_ratio 4 --evaluate_steps 2 --evaluate_samples 1"
    )
    train_runs(2, [[*options.split(), "--output_dir", str(folder)]], report=True)
    return folder


def test_page_of_a_run(run: Path, page: Any, tmp_path: Path) -> None:
    page.goto((run / "report.html").as_uri())
    assert page.locator("h1").inner_text() == "my <voice>"
    assert "finished, at step 4 of 4" in page.locator("body").inner_text()
    curves = page.locator("figure")
    titles = [curves.nth(i).get_attribute("aria-label") for i in range(curves.count())]
    assert titles[:5] == [
        "loss", "text loss", "audio loss", "audio loss by codebook, training", "audio loss by codebook, validation",
    ]  # fmt: skip
    assert {"learning rate", "gradient norm", "tokens per second", "peak memory, GiB"} <= set(titles)
    for i in range(curves.count()):
        box = curves.nth(i).locator("svg").bounding_box()
        assert box["width"] > 300
        assert box["height"] > 150
        # matplotlib draws each line of values as a path.
        assert curves.nth(i).locator("g[id^=line2d] > path").count() > 0
    labels = {
        "learning rate": "lora_B", "audio loss": "validation, averaged weights",
        "evaluation: mel distance, dB": "averaged weights",
    }  # fmt: skip
    for title, label in labels.items():
        assert label in curves.nth(titles.index(title)).locator("svg").text_content()
    last = {key: value for line in read_metrics(run) for key, value in line.items() if value is not None}
    rows = dict(page.locator("#numbers tr").evaluate_all("rows => rows.map(r => [r.cells[0].innerText, r.innerText])"))
    assert f"{last['train/audio_loss']:.4g}" in rows["audio_loss"]
    assert f"{last['val/audio_loss']:.4g}" in rows["audio_loss"]
    assert f"{last['grad_norm']:.4g}" in rows["grad_norm"]
    links = page.locator("a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert {"lora_adapters", "checkpoint-2", "checkpoint-4", "metrics.jsonl", "settings.json"} <= set(links)
    assert f"{last['eval/mel_distance_db']:.4g}" in rows["mel_distance_db, evaluation"]
    assert {"lora_adapters_ema", "evaluation"} <= set(links)
    val_losses = {line["step"]: line["val/loss"] for line in read_metrics(run) if "val/loss" in line}
    best = min(val_losses, key=val_losses.__getitem__)
    assert page.locator("#best").inner_text() == (
        f"Lowest validation loss: {val_losses[best]:.4g}, at step {best} (checkpoint-{best})."
    )
    assert all((run / link).exists() for link in links)
    text = page.locator("body").inner_text()
    assert "samples: 9" in text  # of the data
    assert "--allow_text_targets True" in page.locator(".changed").all_inner_texts()
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_what_was_said_plays(run: Path, page: Any) -> None:
    """Reference and samples of each prompt play from the page itself, although a random model generates little."""
    page.goto((run / "report.html").as_uri())
    words = json.loads((run / "samples" / "prompts.json").read_text())
    table = page.locator("#samples")
    assert table.locator("th").all_inner_texts() == words
    players = table.locator("audio")
    written = list((run / "samples").rglob("*.wav"))
    assert players.count() == len(written) >= len(words)
    names = table.locator("td:first-child").all_inner_texts()
    assert names.count("reference") == len(words)
    for i in range(players.count()):
        length = play(players.nth(i))
        assert 0 < length[0] <= length[1]
    durations = sorted(soundfile.info(path).duration for path in written)
    played = sorted(players.evaluate_all("players => players.map(player => player.duration)"))
    assert played == pytest.approx(durations, abs=0.02)


def test_a_thousand_steps(tmp_path: Path, page: Any) -> None:
    """A page of 1000 logged steps, with a validation at every tenth, is below 5 MB and is drawn."""
    lines = []
    for step in range(1, 1001):
        values = {"loss": math.exp(-step / 300), "text_loss": 0.1, "audio_loss": None if step < 5 else 2 / step}
        values |= {f"audio_loss/cb{k}": k + math.exp(-step / 300) for k in range(8)} | {"text_accuracy": step / 1000}
        line = {"step": step, "epoch": step / 500, "lr": 1e-4 * step, "grad_norm": 0.0 if step == 3 else 1.0}
        lines.append(line | {f"train/{name}": value for name, value in values.items()})
        if step % 10 == 0:
            lines.append({"step": step, "epoch": step / 500} | {f"val/{name}": value for name, value in values.items()})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "settings.json").write_text(json.dumps(TrainOptions().flat()))
    path = write_report(tmp_path)
    assert path.stat().st_size < 5e6
    page.goto(path.as_uri())
    assert "ended before its last step, at step 1000" in page.locator("body").inner_text()
    assert page.locator("figure svg").count() == 7
    assert page.locator("#flat").inner_text() == "Not drawn, as they have one value only: text loss (0.1)."


def test_what_is_bad_is_marked(tmp_path: Path, page: Any) -> None:
    lines = [
        {"step": 10, "epoch": 1.0, "train/loss": 3.0, "train/text_loss": None, "train/audio_loss": 3.0, "lr": 1e-4},
        {"step": 10, "epoch": 1.0, "val/loss": 2.0},
        {"step": 20, "epoch": 2.0, "train/loss": 2.0, "train/text_loss": None, "train/audio_loss": 2.0, "lr": 1e-4},
        {"step": 20, "epoch": 2.0, "val/loss": 2.5},
        {"step": 20, "epoch": 2.0, "sample/stop_rate": 0.0, "sample/length_ratio": 1.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "settings.json").write_text(json.dumps(TrainOptions().flat()))
    (tmp_path / "flagged_samples.tsv").write_text("m:1\tsilence\t1\ta\nm:1\tlevel\t1\tb\nm:7\tlevel\t1\tb\n")
    facts = RunFacts(30, ["--precision auto: fp32"])
    page.goto(write_report(tmp_path, facts, reason="val/loss is <inf>").as_uri())
    assert page.locator("#bad li").all_inner_texts() == [
        "val/loss is <inf>",
        "the validation loss rises: 2.0000 at step 10, 2.5000 at step 20; a checkpoint near step 10 is likely to be "
        "better",
        "stop rate 0: none of the last samples ended on its own",
        "2 samples of the data may be bad: see flagged_samples.tsv",
    ]
    assert page.locator("#numbers .bad").all_inner_texts() == ["2.5", "0"]
    best = "Lowest validation loss: 2, at step 10, of which there is no checkpoint."
    assert page.locator("#best").inner_text() == best
    rows = page.locator("#numbers tr td:first-child").all_inner_texts()
    assert rows == ["loss", "audio_loss", "lr", "stop_rate", "length_ratio"]  # no row without a value
    assert page.locator("#overruled li").all_inner_texts() == ["--precision auto: fp32"]
    assert "at step 20 of 30" in page.locator("body").inner_text()
    flat = page.locator("#flat").inner_text()
    assert all(f"{title} (" in flat for title in ("learning rate", "share of samples that stopped on their own"))


@pytest.mark.parametrize("is_running", [True, False])
def test_the_page_renews_itself_while_the_run_goes_on(tmp_path: Path, page: Any, is_running: bool) -> None:
    """After a minute, but not while a sample plays."""
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "settings.json").write_text(json.dumps(TrainOptions().flat()))
    page.clock.install()
    path = write_report(tmp_path, is_running=is_running)
    page.goto(path.as_uri())
    assert page.locator("p").first.inner_text().startswith("running" if is_running else "ended before its last step")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 7, "epoch": 1.0, "train/loss": 2.0}) + "\n")
    write_report(tmp_path, is_running=is_running)
    page.evaluate("playing = document.body.appendChild(document.createElement('audio'))")
    page.evaluate("Object.defineProperty(playing, 'paused', {value: false, configurable: true})")
    page.clock.run_for(61_000)
    assert "at step 0" in page.locator("p").first.inner_text()
    page.evaluate("Object.defineProperty(playing, 'paused', {value: true})")
    page.clock.run_for(61_000)
    page.wait_for_function(f"document.title.includes('step {7 if is_running else 0} ')")


def test_before_the_first_numbers(tmp_path: Path, page: Any) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "settings.json").write_text(json.dumps(TrainOptions().flat()))
    page.goto(write_report(tmp_path).as_uri())
    assert page.locator("figure").count() == 0


def test_best_by_a_measure(tmp_path: Path, page: Any) -> None:
    """Of equal steps the first; not step 0, which has no checkpoint."""
    values = {0: 0.9, 10: 0.5, 20: None, 30: 0.75, 40: 0.75, 50: 0.25}
    lines = [{"step": step, "epoch": 1.0, "eval/stop_rate": value} for step, value in values.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = TrainOptions().flat() | {"metric_for_best_model": "eval/stop_rate"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "checkpoint-30").mkdir()
    page.goto(write_report(tmp_path).as_uri())
    assert page.locator("#best").inner_text() == "Highest stop rate: 0.75, at step 30 (checkpoint-30)."
    assert page.locator("#best a").get_attribute("href") == "checkpoint-30"
