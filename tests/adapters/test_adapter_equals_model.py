"""The saved adapter in plain transformers + PEFT, and the merged model, compared with the trained model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launcher import train_runs
from peft import PeftModel
from safetensors.torch import load_file
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_ds.adapters.merge import merge

pytestmark = pytest.mark.slow

PASSED_TO_FORWARD = ("input_ids", "audio_input_ids", "audio_input_ids_mask")


@pytest.fixture(scope="module")
def float_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random base with float32 weights."""
    import shutil

    folder = tmp_path_factory.mktemp("float") / "base"
    shutil.copytree(base, folder)
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(base, use_text_head=True, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


RUNS = [(1, 0, ""), (1, 2, ""), (2, 2, "--use_dora"), (2, 2, "--use_rslora"), (2, 3, "")]


@pytest.fixture(scope="module", params=RUNS, ids=lambda p: f"{p[0]} ranks, ZeRO-{p[1]}{p[2]}")
def run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    float_base: Path,
    mixed_manifest: Path,
    ds_file: Callable[[int], Path],
) -> Path:
    """A finished run, with the logits of one batch from the training process itself (logits.safetensors)."""
    ranks, stage, more = request.param
    folder = tmp_path_factory.mktemp("run") / "run"
    options = (
        f"--deepspeed {ds_file(stage)} --output_dir {folder} --base_ckpt {float_base} --precision fp32 "
        f"--train_manifest {mixed_manifest} --val_split 0 --allow_text_targets --batch_size 1 --grad_accum 2 "
        f"--max_steps 8 --lr 5e-3 --lora_dropout 0 {more} --dump_logits {folder}/logits.safetensors"
    )
    train_runs(ranks, [options.split()])
    return folder


def logits(model: torch.nn.Module, dumped: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and audio logits at the positions of the dump."""
    higgs = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = {name: dumped[name] for name in PASSED_TO_FORWARD}
    with torch.no_grad():
        audio = model(**inputs).logits.flatten(0, 1)[dumped["audio_positions"]]
        hidden = higgs.model(**inputs).last_hidden_state.flatten(0, 1)
        return higgs.text_lm_head(hidden[dumped["text_positions"]]), audio


def load(folder: Path) -> HiggsAudioV2ForConditionalGeneration:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, dtype=torch.float32).eval()


def test_plain_peft_and_merged(run: Path, float_base: Path, tmp_path: Path) -> None:
    dumped = load_file(run / "logits.safetensors")
    before = logits(load(float_base), dumped)
    adapted = logits(PeftModel.from_pretrained(load(float_base), run / "lora_adapters").eval(), dumped)
    merge(float_base, run / "lora_adapters", tmp_path / "merged")
    merged = logits(load(tmp_path / "merged"), dumped)
    for i, name in enumerate(["text_logits", "audio_logits"]):
        trained = dumped[name]
        assert len(trained) > 0
        assert (before[i] - trained).abs().max() > 0.5  # training changed them by far more than the tolerance below
        assert (adapted[i] - trained).abs().max() <= 1e-5
        assert (merged[i] - trained).abs().max() <= 1e-4
