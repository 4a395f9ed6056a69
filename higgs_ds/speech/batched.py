"""Generate several clips at once: prompts of any length, or several sampled renderings of one prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from higgs_ds.bases.bundle import Bundle
from higgs_ds.model.parts import parts_of
from higgs_ds.model.sample import Message
from higgs_ds.speech.generate import Speech, generation_prompt, generation_settings, speak, watched_range

DEFAULT_TOP_K = 50  # of transformers, for a model whose own settings do not say


@dataclass(frozen=True)
class BatchPrompt:
    """A clip to generate: the arguments of `speak`, and the seed of the random numbers that this clip alone gets."""

    messages: list[Message]
    references: list[torch.Tensor]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How codes are chosen. A temperature of 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def sampling_of(model: Any, temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
    """Return how to sample, with the model's own settings where none are given, as its `generate` uses them."""
    own = model.generation_config
    return Sampling(temperature, top_k or own.top_k or DEFAULT_TOP_K, top_p or own.top_p or 1.0)


def seed_of(*parts: int) -> int:
    """Return a seed that differs for different parts, such as the seed of a run, a prompt and a rendering."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def speak_batch(
    model: Any, bundle: Bundle, prompts: Sequence[BatchPrompt], settings: Sampling, synced: bool = False
) -> list[Speech]:
    """Generate the assistant's audio turn after each prompt. Each clip ends on its own, as `speak` would end it.

    Prompts, and the codes of their references, are padded on the left, which the classes of both families support. A
    model with audio self-attention generates one sequence at a time, and does so here.

    Greedy codes are those of `speak`, up to rounding (see below). Sampled codes are drawn by inverting the distribution
    of each codebook, after temperature, top_k and top_p, at a uniform number in [0, 1): the first code at which the
    summed probabilities exceed it. The numbers of a clip are a table (rows, C) of a generator of its own, on the CPU.
    What a clip becomes therefore depends on its prompt and seed, not on the other clips of its batch, or on the rank.

    Rounding: a batch of another size, or with other padding, may add numbers in another order, which changes the last
    bits of logits, and so a code that was almost as probable as another. In float32 this is rare; in bf16 it happens.
    The same batch on the same machine gives the same codes.

    Repetition-aware sampling (`ras_win_len`), which the released v2 model's own settings may ask for, is off: it draws
    from torch's global generator, and changes the distribution that the model is trained on.

    Args:
        model: a model loaded by transformers or PEFT.
        synced: go on until every rank has ended, because all compute with each other's weights.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if len(prompts) > 1 and parts_of(base.config).audio_self_attention:
        return [speech for prompt in prompts for speech in speak_batch(model, bundle, [prompt], settings, synced)]
    limit = max(prompt.max_new_tokens for prompt in prompts)
    arguments: dict[str, Any] = generation_settings(0) | {"max_new_tokens": limit}
    arguments |= {"synced_gpus": True} if synced else {}
    if getattr(base.generation_config, "ras_win_len", None) is not None:
        arguments["ras_win_len"] = None
    if settings.temperature > 0:
        arguments["logits_processor"] = LogitsProcessorList([_SeededSampling(settings, _draws_of(prompts, bundle))])
    elif len(prompts) == 1:
        only = prompts[0]
        return [speak(model, bundle, only.messages, only.references, arguments)]
    inputs, num_rows = _padded_inputs(bundle, prompts)
    device = next(model.parameters()).device
    with watched_range(model) as in_range:
        rows = model.generate(**{name: tensor.to(device) for name, tensor in inputs.items()}, **arguments)
    new_rows, stream = rows[:, num_rows:].cpu(), bundle.stream
    own_rows = [new_rows[i, : prompt.max_new_tokens] for i, prompt in enumerate(prompts)]
    return [Speech(stream.revert(own), stream.has_ended(own), bool(in_range[0])) for own in own_rows]


def _padded_inputs(bundle: Bundle, prompts: Sequence[BatchPrompt]) -> tuple[dict[str, torch.Tensor], int]:
    """Return the arguments of `generate`, padded on the left, and the number of rows of references, with padding."""
    stream = bundle.stream
    tokenized = [generation_prompt(bundle, prompt.messages, prompt.references) for prompt in prompts]
    inputs = {
        "input_ids": _left_padded([torch.tensor(prompt.input_ids) for prompt in tokenized], bundle.pad_id),
        "attention_mask": _left_padded([torch.ones(len(p.input_ids), dtype=torch.long) for p in tokenized], 0),
    }
    if not any(prompt.references for prompt in prompts):
        return inputs, 0
    no_rows = torch.zeros(0, stream.num_codebooks, dtype=torch.long)
    rows = [torch.cat([no_rows, *map(stream.delay, prompt.references)]) for prompt in prompts]
    inputs["audio_input_ids"] = _left_padded(rows, stream.eos_id)
    inputs["audio_input_ids_mask"] = _left_padded([bundle.family.audio_mask(prompt)[0] for prompt in tokenized], False)
    return inputs, inputs["audio_input_ids"].shape[1]


def _left_padded(sequences: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """Stack tensors (T, ...) of different lengths T as (B, T, ...)."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), True, value, padding_side="left")


def _draws_of(prompts: Sequence[BatchPrompt], bundle: Bundle) -> torch.Tensor:
    """Return a uniform number for each code of each clip, float32 (B, R, C); of rows past a clip's limit, 0."""
    num_codebooks = bundle.stream.num_codebooks
    tables = [
        torch.rand(prompt.max_new_tokens, num_codebooks, generator=torch.Generator().manual_seed(prompt.seed))
        for prompt in prompts
    ]
    return torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)


class _SeededSampling(TemperatureLogitsWarper):
    """Leaves in each distribution only the code that is drawn, so that the most probable one is that code.

    It is a temperature because transformers' class of v2 accepts only processors of four kinds, which do not depend on
    the ids of text. It is called once for each row of codes.
    """

    def __init__(self, settings: Sampling, draws: torch.Tensor) -> None:
        super().__init__(settings.temperature)
        self.draws = draws
        self.num_rows = 0
        self.warpers: list[Any] = [TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        if settings.top_p is not None and settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (B x C, S) that are 0 for the code that is drawn, and -inf for all others."""
        scores = super().__call__(input_ids, scores)
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        self.draws = self.draws.to(scores.device)
        summed = scores.softmax(-1).double().cumsum(-1)
        limits = self.draws[:, self.num_rows].reshape(-1, 1) * summed[:, -1:]
        chosen = (summed <= limits).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        self.num_rows += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)
