"""Higgs Audio v3 by transformers' Qwen3Model and torch alone, to compare with: no code of this project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3Model

BOC, EOC = 1024, 1025


class PlainModel:
    """The trunk, and the table of codes (C, S, H) that is the head, too."""

    def __init__(
        self, folder: Path, rounded: bool = True, theta: float = 1_000_000, dtype: Any = torch.float32
    ) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        trunk = {k: v for k, v in config["text_config"].items() if k not in ("rope_theta", "rope_parameters", "dtype")}
        tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
        self.trunk = Qwen3Model(Qwen3Config(**trunk, rope_theta=theta, attn_implementation="eager"))
        weights = {k.removeprefix("body."): v for k, v in tensors.items() if k.startswith("body.")}
        weights["embed_tokens.weight"] = tensors["tied.embedding.text_embedding.weight"]
        self.trunk.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        self.num_codebooks = config["audio_encoder_config"]["num_codebooks"]
        table = tensors["tied.embedding.modality_embeddings.0.embedding.weight"].float()
        self.table = table.view(self.num_codebooks, -1, table.shape[-1])
        if rounded:
            rotary: Any = self.trunk.rotary_emb
            exact = rotary.forward
            rotary.forward = lambda *args: tuple(part.bfloat16().to(part.dtype) for part in exact(*args))
        self.trunk.requires_grad_(False)

    def embed_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (R, H) of rows (R, C)."""
        return sum(F.embedding(rows[:, k], self.table[k]) for k in range(self.num_codebooks))  # type: ignore[return-value]

    def hidden(self, ids: list[int], rows: torch.Tensor, columns: list[int]) -> torch.Tensor:
        """Return the hidden states (T, H) of a sequence whose `columns` have the rows (R, C) instead of ids."""
        embedded = self.trunk.embed_tokens(torch.tensor(ids)).clone()
        if columns:
            embedded[columns] = self.embed_rows(rows)
        return self.trunk(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., C, S)."""
        return torch.stack([F.linear(hidden, self.table[k]) for k in range(self.num_codebooks)], dim=-2)

    @torch.no_grad()
    def speak(self, ids: list[int], rows: torch.Tensor, columns: list[int], longest: int) -> torch.Tensor:
        """Return greedy rows (R, C) after a prompt, by whole passes without a cache.

        After the row in which codebook 0 says EOC, each row has one more codebook at EOC, as in the layout of clips.
        """
        spoken: list[torch.Tensor] = []
        end = longest
        while len(spoken) < min(longest, end + self.num_codebooks - 1):
            number = len(spoken)
            now = torch.stack([*rows, *spoken]) if len(rows) or spoken else rows
            places = [*columns, *range(len(ids), len(ids) + number)]
            logits = self.logits(self.hidden([*ids, *[0] * number], now, places)[-1])
            logits[:, BOC] = logits[1:, EOC] = -torch.inf
            row = logits.argmax(-1)
            row[number + 1 :] = BOC
            row[: max(0, number - end + 1)] = EOC
            spoken.append(row)
            if row[0] == EOC and end == longest:
                end = number
        return torch.stack(spoken)


def delayed(codes: torch.Tensor) -> torch.Tensor:
    """Return the rows (F + C - 1, C) of codes (C, F)."""
    count, frames = codes.shape
    rows = torch.full((frames + count - 1, count), EOC)
    for row in range(len(rows)):
        for k in range(count):
            if row < k:
                rows[row, k] = BOC
            elif row - k < frames:
                rows[row, k] = codes[k, row - k]
    return rows


def loss_sums(
    model: PlainModel, ids: list[int], codes: list[torch.Tensor], columns: list[int], fill: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums of cross entropies and numbers of targets, both (C,), of the last of a sample's clips (C, F).

    Args:
        fill: whether BOC and all EOCs are targets, too.
    """
    rows = torch.cat([delayed(clip) for clip in codes])
    target, frames = delayed(codes[-1]), codes[-1].shape[1]
    hidden = model.hidden(ids, rows, columns)
    logits = model.logits(hidden[[column - 1 for column in columns[-len(target) :]]])
    sums, counts = [], []
    for k in range(model.num_codebooks):
        learned = target[:, k].clone()
        if not fill:
            learned[(learned == BOC) | (learned == EOC)] = -100
            if k == 0:
                learned[frames : frames + 1] = EOC
        sums.append(F.cross_entropy(logits[:, k], learned, ignore_index=-100, reduction="sum"))
        counts.append((learned != -100).sum())
    return torch.stack(sums), torch.stack(counts)
