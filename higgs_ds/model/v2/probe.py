"""A fixed random input, for which the logits of two models are compared."""

from __future__ import annotations

from typing import Any

import torch

from higgs_ds.model.parts import parts_of

NUM_TEXT, NUM_FRAMES = 12, 16  # positions of the sequence that both models get
NUM_HEARD = 4  # of the text positions, for audio input if the model has a Whisper tower


def probe(model: Any, config: Any) -> torch.Tensor:
    """Return all logits of a random sequence."""
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
    return all_logits(model, torch.cat([text, frames])[None], codes, **heard)


@torch.no_grad()
def all_logits(model: Any, input_ids: torch.Tensor, audio_input_ids: torch.Tensor, **heard: Any) -> torch.Tensor:
    """Return the text and audio logits of one sequence, concatenated at every position (N, V + C x S).

    Args:
        heard: for a model with a tower, `audio_features` and `feature_lengths` of its forward.
    """
    outputs = model.model(input_ids=input_ids, audio_input_ids=audio_input_ids, use_cache=False, **heard)
    hidden = outputs.last_hidden_state[0]
    return torch.cat([model.text_lm_head(hidden), model.audio_lm_head(hidden)], dim=-1)
