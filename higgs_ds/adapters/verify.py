"""Compare a merged model with its base and adapter, layer by layer from the files: neither model is ever in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import HiggsAudioV2Config

from higgs_ds.adapters.load import Adapter, BaseWeights
from higgs_ds.common.files import release_freed_memory
from higgs_ds.common.tensor_files import read_rows, read_tensor, weight_locations, weight_shapes
from higgs_ds.model.loading import read_config
from higgs_ds.model.parts import parts_of, with_parts
from higgs_ds.model.streaming import all_logits, streaming_model

NUM_TEXT, NUM_FRAMES = 12, 16  # positions of the sequence that both models get
NUM_HEARD = 4  # of the text positions, for audio input if the model has a Whisper tower
ROWS_AT_ONCE = 2**22  # elements of a weight that are in memory at once


@dataclass
class Agreement:
    """How far the logits of two models differ. `relative`: RMS of the difference divided by RMS of the logits."""

    max_difference: float
    largest_logit: float
    relative: float
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return (
            f"merged and adapted logits differ by {self.max_difference:.2g} at most, {self.relative:.2%} on average, "
            f"with logits of up to {self.largest_logit:.3g}{note}"
        )


def compare_merged(base_folder: Path, merged_folder: Path, adapter: Adapter, base: BaseWeights) -> Agreement:
    """Compare both models' text and audio logits, in float32, for a random sequence of text and frames."""
    config = with_parts(read_config(base_folder), adapter.full_parts)
    expected = _probe_logits(config, AdaptedWeightFiles(base_folder, adapter, base))
    found = _probe_logits(read_config(merged_folder), Files(merged_folder))
    difference = found - expected
    return Agreement(
        max_difference=float(difference.abs().max()),
        largest_logit=float(expected.abs().max()),
        relative=float(difference.square().mean().sqrt() / expected.square().mean().sqrt()),
    )


class Files:
    """The weights in a model's files, as `streaming_model` reads them."""

    def __init__(self, folder: Path) -> None:
        self.places = weight_locations(folder)
        self.shapes = weight_shapes(sorted(set(self.places.values())))

    def tensor(self, name: str) -> torch.Tensor:
        return read_tensor(self.places[name], name).float()

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.slice(name, i, i + 1)[0] for i in ids.flatten().tolist()]).view(*ids.shape, -1)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` (exclusive) of a weight, in float32."""
        return read_rows(self.places[name], name, start, stop).float()

    def has(self, name: str) -> bool:
        return name in self.places

    def linear(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        name = f"{layer}.weight"
        out_features, in_features = self.shapes[name]
        step = max(1, ROWS_AT_ONCE // in_features)
        y = x.new_empty(*x.shape[:-1], out_features)
        for start in range(0, out_features, step):
            stop = min(start + step, out_features)
            y[..., start:stop] = F.linear(x, self.slice(name, start, stop))
            release_freed_memory()
        return self.biased(layer, y)

    def biased(self, layer: str, y: torch.Tensor) -> torch.Tensor:
        """Return y plus the layer's own bias, if it has one."""
        release_freed_memory()
        return y + self.tensor(f"{layer}.bias") if self.has(f"{layer}.bias") else y


class AdaptedWeightFiles(Files):
    """The same with an adapter, which is applied without being merged."""

    def __init__(self, folder: Path, adapter: Adapter, base: BaseWeights) -> None:
        super().__init__(folder)
        self.adapter, self.base = adapter, base
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.full_weights.items()}

    def tensor(self, name: str) -> torch.Tensor:
        trained = self.adapter.full_weights.get(name)
        return super().tensor(name) if trained is None else trained.float()

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        trained = self.adapter.full_weights.get(name)
        return super().slice(name, start, stop) if trained is None else trained[start:stop].float()

    def has(self, name: str) -> bool:
        return super().has(name) or name in self.adapter.full_weights

    def linear(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        name = f"{layer}.weight"
        if name not in self.adapter.factors and not self.base.is_quantized(name):
            return super().linear(layer, x)
        weight = self.base.as_trained(name, read_tensor(self.places[name], name))
        adapted = name in self.adapter.factors
        return self.biased(layer, self.adapter.forward(name, weight, x) if adapted else F.linear(x, weight))


def _probe_logits(config: HiggsAudioV2Config, source: Files) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(config.vocab_size, (NUM_TEXT,), generator=generator)
    text[(text == config.audio_token_id) | (text == config.audio_delay_token_id)] = 0
    heard = {}
    tower = parts_of(config).audio_tower
    if tower is not None:
        text[text == config.audio_in_token_id] = 0
        text[:NUM_HEARD] = config.audio_in_token_id
        mel = torch.randn(1, tower["num_mel_bins"], 4 * NUM_HEARD, generator=generator)
        heard = {"audio_features": mel, "feature_lengths": torch.tensor([4 * NUM_HEARD])}
    frames = torch.full((NUM_FRAMES,), config.audio_token_id)
    codes = torch.randint(config.codebook_size, (1, NUM_FRAMES, config.num_codebooks), generator=generator)
    return all_logits(streaming_model(config, source), torch.cat([text, frames])[None], codes, **heard)
