"""--samples, --sample_steps: samples equal what the adapter generates on its own, and do not change the training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import read_metrics
from launcher import train_runs
from peft import PeftModel
from safetensors.torch import load_file

from higgs_ds.bases.bundle import open_bundle
from higgs_ds.data.codec import Codec
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.model.loading import load_base
from higgs_ds.options.train import DataOptions
from higgs_ds.speech.generate import generation_settings, speak

pytestmark = pytest.mark.slow

NUM_SAMPLES = {2: 3, 3: 1}  # by stage; at stage 3 each layer is gathered for each frame
ADAPTER = "lora_adapters/adapter_model.safetensors"


@pytest.fixture(scope="module", params=NUM_SAMPLES)
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    mixed_manifest: Path,
    ds_file: Callable[[int], Path],
    base: Path,
) -> Path:
    """The same training with and without samples, on two ranks, with dropout; at stage 3 both ranks generate."""
    root = tmp_path_factory.mktemp("listen")
    line = (
        f"--deepspeed {ds_file(request.param)} --precision fp32 "
        f"--train_manifest {mixed_manifest} --val_manifest {mixed_manifest} "
        "--allow_text_targets --batch_size 1 --grad_accum 1 --max_steps 4 --log_steps 1 --val_steps 2 --save_steps 2 "
        f"--lr 2e-2 --base_ckpt {base} --activation_checkpointing 2"
    ).split()
    train_runs(
        2,
        [
            [*line, "--output_dir", str(root / "silent")],
            [
                *line,
                "--output_dir",
                str(root / "heard"),
                "--sample_steps",
                "3",
                "--num_samples",
                str(NUM_SAMPLES[request.param]),
            ],
        ],
        report=True,
    )
    return root


def test_samples_do_not_change_training(runs: Path) -> None:
    expected, found = (load_file(runs / name / ADAPTER) for name in ("silent", "heard"))
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    lines = [[(line["step"], line.get("train/loss"), line.get("val/loss")) for line in read_metrics(runs / name)
              if "sample/stop_rate" not in line] for name in ("silent", "heard")]  # fmt: skip
    assert lines[0] == lines[1]


def test_files_and_numbers(runs: Path) -> None:
    folder = runs / "heard" / "samples"
    assert {path.name for path in folder.iterdir()} == {"prompts.json", "reference", "step-0", "step-3", "step-4"}
    words = json.loads((folder / "prompts.json").read_text())
    assert len(words) in NUM_SAMPLES.values()
    assert all(words)
    for number in range(len(words)):
        reference = soundfile.info(folder / "reference" / f"{number}.wav")
        assert reference.samplerate == 24000
        assert reference.frames > 5000
    logged = [line for line in read_metrics(runs / "heard") if "sample/stop_rate" in line]
    assert [line["step"] for line in logged] == [0, 3, 4]
    assert all(0 <= line["sample/stop_rate"] <= 1 and line["sample/length_ratio"] >= 0 for line in logged)
    assert not (runs / "silent" / "samples").exists()


@pytest.mark.parametrize("step", [0, 4])
def test_said_is_what_the_adapter_says(runs: Path, base: Path, mixed_manifest: Path, tmp_path: Path, step: int) -> None:
    """Plain PEFT on the plain base, greedy, from the same prompts; before the first step, the base alone."""
    words = json.loads((runs / "heard" / "samples" / "prompts.json").read_text())
    options = DataOptions(allow_text_targets=True)
    samples = [entry.sample for entry in read_entries(mixed_manifest, options) if entry.sample]
    bundle = open_bundle(str(base), None, None, tmp_path)
    model = load_base(base, torch.float32).eval()
    if step:
        model = PeftModel.from_pretrained(model, runs / "heard" / "lora_adapters").eval()
    codec = Codec(bundle.codec.folder, torch.device("cpu"))
    compared = 0
    for number, text in enumerate(words):
        (sample,) = [
            s for s in samples if s.messages[-2].parts == (text,) and s.messages[-1].clips and len(s.clips) == 1
        ]
        frames = soundfile.info(runs / "heard" / "samples" / "reference" / f"{number}.wav").frames // 960
        settings = generation_settings(0.0) | {"max_new_tokens": 2 * frames + 25}
        speech = speak(model, bundle, list(sample.messages[:-1]), [], settings)
        path = runs / "heard" / "samples" / f"step-{step}" / f"{number}.wav"
        assert path.is_file() == bool(speech.codes.shape[1])
        if speech.codes.shape[1]:
            expected = codec.decode(speech.codes.clamp(max=1023))
            found = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            torch.testing.assert_close(found, expected.clamp(-1, 1), rtol=0, atol=1e-4)
            compared += 1
    assert compared
