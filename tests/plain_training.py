"""Losses and steps of plain torch on transformers' model, on the batches of a run: what runs are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conftest import native_inputs
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_ds.bases.bundle import open_bundle
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.preparation import Preparation
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.options.train import DataOptions


def load(folder: Path) -> HiggsAudioV2ForConditionalGeneration:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, dtype=torch.float32).eval()


def windows_of(base: Path, manifest: Path, cache: Path, steps: int) -> list[list[Any]]:
    """Return the batches of every step of a run on one rank with batch size 1 and 4 accumulated."""
    bundle = open_bundle(str(base), None, None, cache)
    with Preparation(DataOptions(allow_text_targets=True), bundle.coder(cache), cache) as preparation:
        checked = preparation.check(manifest)
        preparation.encode(checked, torch.device("cpu"))
        assert preparation.coder
        index = preparation.keep(checked)
        data = Dataset(index, torch.arange(len(index)).numpy(), preparation.coder)
        sampler = WindowSampler(
            lengths=data.lengths, micro_batch_size=1, gradient_accumulation_steps=4, rank=0, world_size=1, seed=42,
            bucket_size=1024, max_tokens=None,
        )  # fmt: skip
        return [[data.batch(i) for i in window.micro_batches] for window in sampler.windows(0, steps)]


def plain_loss(higgs: HiggsAudioV2ForConditionalGeneration, batches: Sequence[Any]) -> torch.Tensor:
    """Return the loss over batches. Within the text and each codebook, all targets of the batches weigh the same."""
    sums, counts = torch.zeros(9), torch.zeros(9)
    for batch in batches:
        inputs = native_inputs(batch, higgs.config.audio_token_id)
        hidden = higgs.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        text, audio = (hidden[batch.positions[at]] for at in (batch.text_places, batch.audio_places))
        logits = higgs.audio_lm_head(audio).view(len(audio), 8, higgs.config.codebook_size)
        parts = [(higgs.text_lm_head(text), batch.text_targets)]
        parts += [(logits[:, k], batch.audio_targets[:, k]) for k in range(8)]
        sums = sums + torch.stack([F.cross_entropy(*part, reduction="sum") for part in parts])
        counts += torch.tensor([(targets != -100).sum() for _, targets in parts])
    means = sums / counts.clamp(min=1)
    return means[0] + means[1:].mean()


def plain_steps(
    higgs: HiggsAudioV2ForConditionalGeneration,
    windows: Sequence[Sequence[Any]],
    optimizer: torch.optim.Optimizer,
    shares: Sequence[float],
) -> list[float]:
    """Train one step per window, at these shares of the optimizer's learning rates. Return the losses."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    peaks, losses = [group["lr"] for group in optimizer.param_groups], []
    for batches, share in zip(windows, shares, strict=True):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        loss = plain_loss(higgs, batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
