"""Train the codec of the built-in base on the corpus, in phases; a stopped run resumes.

    python pretraining/codec.py outputs/corpus outputs/codec

autoencoder: encoder and decoder are trained without quantization. codebooks: the latents between them are quantized by
a varying number of codebooks, which are moving averages. decoder, four times: encoder and codebooks are frozen, and the
decoder trains on, each time from a high learning rate to a low one; its weights are averaged.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from codec_model import LATENT, build_codec, latents_of, sound_of
from corpus import FRAME, RATE
from spectral_loss import SpectralLoss
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import HiggsAudioV2TokenizerModel
from vector_quantize_pytorch import ResidualVQ

from higgs_ds.bases.tiny_random import CODEBOOK_SIZE, save_model
from higgs_ds.common.files import replaced_file

# Each further codebook would carry almost nothing and cost the language model 9 bits per frame: its code is always 0.
CODEBOOKS_WITH_SOUND = 3
PHASES = ("autoencoder", "codebooks", "decoder 1", "decoder 2", "decoder 3", "decoder 4")
DECODER_ALONE = PHASES[2:]
LEARNING_RATES = dict(zip(PHASES, (2e-3, 1e-3, 5e-4, 1e-3, 1e-3, 7e-4), strict=True))
WARMUP_STEPS = 20
AVERAGED_OVER = 0.98
STATE_FILE, CODEC_FOLDER = "state.pt", "speaking-codec"


@dataclass
class Training:
    """The state of training, saved so that a stopped run can resume."""

    model: HiggsAudioV2TokenizerModel
    quantizer: ResidualVQ
    averaged: AveragedModel
    phase: int = 0
    step: int = 0
    seconds: float = 0.0
    optimizer: torch.optim.Optimizer | None = None

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "quantizer": self.quantizer.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "progress": (self.phase, self.step, self.seconds),
            "rng": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.quantizer.load_state_dict(state["quantizer"])
        self.averaged.load_state_dict(state["averaged"])
        self.phase, self.step, self.seconds = state["progress"]
        if state["optimizer"]:
            begin_phase(self).load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument(
        "--steps",
        type=int,
        nargs=len(PHASES),
        default=[300, 300, 200, 400, 600, 400],
        metavar="N",
        help="steps of each phase",
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--stretch_frames", type=int, default=20, help="frames of 40 ms in each segment")
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    clips, held_out = read(options.corpus / "codec_train.jsonl"), read(options.corpus / "codec_held_out.jsonl")
    training = new_training()
    path = options.output_dir / STATE_FILE
    if path.exists():
        training.load(torch.load(path, weights_only=True))
    loss_of = SpectralLoss(RATE)
    began = time.monotonic() - training.seconds
    while training.phase < len(PHASES):
        last = options.steps[training.phase]
        if training.step == 0:
            begin_phase(training)
            if PHASES[training.phase] == "codebooks":
                start_codebooks(training, clips)
        while training.step < last:
            batch = stretches(clips, options.batch_size, options.stretch_frames)
            loss = one_step(training, loss_of, batch, last)
            if training.step % options.save_steps == 0 or training.step == last:
                training.seconds = time.monotonic() - began
                print(
                    f"{PHASES[training.phase]} {training.step}/{last} loss {loss:.3f} "
                    f"held out {held_out_loss(training, loss_of, held_out[:8]):.3f} {training.seconds:.0f} s",
                    flush=True,
                )
                keep(training, path)
        training.phase, training.step, training.optimizer = training.phase + 1, 0, None
        keep(training, path)
    save_model(finished(training), options.output_dir / CODEC_FOLDER)
    print(f"codec: {options.output_dir / CODEC_FOLDER}")


def new_training() -> Training:
    model = build_codec()
    quantizer = ResidualVQ(
        dim=LATENT,
        codebook_size=CODEBOOK_SIZE,
        num_quantizers=CODEBOOKS_WITH_SOUND,
        kmeans_init=True,
        quantize_dropout=True,
        decay=0.95,
        threshold_ema_dead_code=0,
    )
    return Training(
        model, quantizer, AveragedModel(model.acoustic_decoder, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED_OVER))
    )


def begin_phase(training: Training) -> torch.optim.Optimizer:
    """Select what the phase trains; store its new optimizer in `training` and return it."""
    phase = PHASES[training.phase]
    training.model.acoustic_decoder.requires_grad_(True)
    training.model.acoustic_encoder.requires_grad_(phase not in DECODER_ALONE)
    training.quantizer.train(phase == "codebooks")
    trained = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    training.optimizer = torch.optim.AdamW(trained, LEARNING_RATES[phase], betas=(0.8, 0.99), weight_decay=0)
    return training.optimizer


@torch.no_grad()
def start_codebooks(training: Training, clips: list[torch.Tensor]) -> None:
    """Initialize the codebooks with k-means centres of the latents of all clips."""
    latents = torch.cat([latents_of(training.model, clip[None])[0] for clip in clips])
    training.quantizer.quantize_dropout = False  # initialize all codebooks
    training.quantizer(latents[None])
    training.quantizer.quantize_dropout = True


def one_step(training: Training, loss_of: nn.Module, batch: torch.Tensor, last: int) -> float:
    """Train on a batch of waveforms (B, num_samples); return the loss before the update."""
    phase, optimizer = PHASES[training.phase], training.optimizer
    assert optimizer is not None
    rate = min(1.0, (training.step + 1) / WARMUP_STEPS) * (0.55 + 0.45 * math.cos(math.pi * training.step / last))
    optimizer.param_groups[0]["lr"] = LEARNING_RATES[phase] * rate
    latents = latents_of(training.model, batch)
    if phase == "autoencoder":
        loss = loss_of(sound_of(training.model, latents), batch)
    else:
        quantized, _, commitment = training.quantizer(latents)
        loss = loss_of(sound_of(training.model, quantized), batch) + commitment.sum()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    if phase in DECODER_ALONE:
        training.averaged.update_parameters(training.model.acoustic_decoder)
    training.step += 1
    return loss.item()


@torch.no_grad()
def held_out_loss(training: Training, loss_of: nn.Module, clips: list[torch.Tensor]) -> float:
    training.quantizer.eval()
    losses = []
    for clip in clips:
        latents = latents_of(training.model, clip[None])
        if training.phase > 0:
            latents = training.quantizer(latents)[0]
        losses.append(float(loss_of(sound_of(training.model, latents), clip[None])))
    training.quantizer.train(PHASES[training.phase] == "codebooks")
    return sum(losses) / len(losses)


def finished(training: Training) -> HiggsAudioV2TokenizerModel:
    """Return the codec for use, with the averaged decoder and the trained codebooks copied in."""
    model = training.model
    model.acoustic_decoder.load_state_dict(training.averaged.module.state_dict())
    with torch.no_grad():
        for layer, vectors in zip(model.quantizer.quantizers, training.quantizer.codebooks, strict=False):
            layer.codebook.embed.copy_(vectors)
            layer.codebook.embed_avg.copy_(vectors)
    return model


def read(manifest: Path) -> list[torch.Tensor]:
    """Return the clips of a manifest as float32 waveforms."""
    clips = []
    for line in manifest.read_text(encoding="utf-8").splitlines():
        audio = json.loads(line)["messages"][-1]["content"]["audio_url"]
        samples, rate = soundfile.read(manifest.parent / audio, dtype="float32")
        assert rate == RATE
        assert len(samples) % FRAME == 0
        clips.append(torch.from_numpy(samples))
    return clips


def stretches(clips: list[torch.Tensor], batch_size: int, frames: int) -> torch.Tensor:
    """Return random segments of random clips, (B, num_samples), each starting at a frame boundary."""
    batch: list[torch.Tensor] = []
    while len(batch) < batch_size:
        clip = clips[int(torch.randint(len(clips), ()))]
        spare = len(clip) // FRAME - frames
        if spare >= 0:
            start = FRAME * int(torch.randint(spare + 1, ()))
            batch.append(clip[start : start + FRAME * frames])
    return torch.stack(batch)


def keep(training: Training, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as part:
        torch.save(training.state(), part)


if __name__ == "__main__":
    main()
