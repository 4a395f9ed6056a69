"""Compare the planned total with the peak of allocated memory on a GPU. Skipped without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import PROJECT, speech_batch
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_ds.adapters.save import trained_parameters
from higgs_ds.data.collate import Batch
from higgs_ds.model.config import read_config
from higgs_ds.model.lora import add_lora
from higgs_ds.model.loss import LossWeights
from higgs_ds.model.v2.loss_model import DualLossModel
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.planning.activations import TEXT_POSITIONS
from higgs_ds.planning.dry_run import make_setting
from higgs_ds.planning.plan import plan
from higgs_ds.planning.weights import Setting
from higgs_ds.training.engine import Engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = 0.05


def base_config() -> HiggsAudioV2Config:
    """Large enough that activations and weights, about 1 GiB each, outweigh what libraries allocate."""
    return HiggsAudioV2Config(
        hidden_size=1536, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=4,
        head_dim=128, vocab_size=32000, codebook_size=1026, num_codebooks=8, pad_token_id=0, audio_token_id=270,
        audio_delay_token_id=268,
    )  # fmt: skip


def speech(setting: Setting) -> Batch:
    size, length = setting.batch_shape()
    return speech_batch(size, length, TEXT_POSITIONS, setting.config.num_codebooks, 1024)


@pytest.mark.parametrize("recompute", ["none", "every_layer"])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.usefixtures("lone_rank")
def test_total_against_allocated_memory(tmp_path: Path, stage: int, recompute: str) -> None:
    base_config().save_pretrained(tmp_path)
    options = (
        f"--dry_run --base_ckpt {tmp_path} --deepspeed {PROJECT}/ds_configs/zero{stage}.json --batch_size 2 "
        f"--grad_accum 2 --max_seq_len 1024 --activation_checkpointing {recompute}"
    )
    setting = make_setting(*parse_train_options(options.split()))
    higgs = HiggsAudioV2ForConditionalGeneration(read_config(tmp_path), use_text_head=True).to(setting.dtype)
    higgs.requires_grad_(False)
    if recompute == "every_layer":
        higgs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = add_lora(higgs, setting.options.lora, "", setting.dtype)
    earlier = torch.cuda.memory_allocated()
    engine = Engine(
        DualLossModel(adapted),
        trained_parameters(adapted),
        setting.ds_settings,
        setting.options.optim,
        10,
        LossWeights.of(1, 1, 8, None),
    )
    batch = speech(setting)
    engine.train_step([batch, batch])  # allocates Adam's state
    torch.cuda.reset_peak_memory_stats()
    engine.train_step([batch, batch])
    planned = plan(setting)
    print(planned, torch.cuda.max_memory_allocated() - earlier)
    assert planned.total == pytest.approx(torch.cuda.max_memory_allocated() - earlier, rel=TOLERANCE)
