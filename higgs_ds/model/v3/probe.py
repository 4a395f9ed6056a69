"""A fixed random input, for which the logits of two models are compared."""

from __future__ import annotations

from typing import Any

import torch

NUM_TEXT, NUM_ROWS = 12, 16


@torch.no_grad()
def probe(model: Any, config: Any) -> torch.Tensor:
    """Return the audio logits (N, C x S) of a random sequence of text, followed by rows of codes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, NUM_TEXT + NUM_ROWS), generator=generator)
    codes = torch.randint(config.codebook_size, (1, NUM_ROWS, config.num_codebooks), generator=generator)
    is_audio = torch.arange(ids.shape[1])[None] >= NUM_TEXT
    return model.audio_logits(model(ids, codes, is_audio, use_cache=False).last_hidden_state[0]).flatten(1)
