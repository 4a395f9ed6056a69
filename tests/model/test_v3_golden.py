"""Higgs Audio v3 against numbers that the functions of vLLM-Omni have made: prompts, rows, logits, greedy rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from higgs_ds.model.loading import check_weights, load_base
from higgs_ds.model.sample import ASSISTANT, USER, AudioClip, Message, Sample
from higgs_ds.model.v3.family import HiggsAudioV3
from higgs_ds.model.v3.stream import BareStream

GOLDEN = PROJECT / "tests" / "golden" / "higgs_v3"
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))
STREAM = BareStream(8, 1024, 1025)
CLIP = AudioClip(Path("x.wav"))


class ByteTokenizer:
    """The tokenizer of the golden prompts: UTF-8 bytes, and special tokens by name."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [PROMPTS["specials"][text]] if text in PROMPTS["specials"] else list(text.encode())

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return PROMPTS["specials"][tokens]


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return {name: tensor.t() for name, tensor in load_file(GOLDEN / "inputs.safetensors").items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def rounded() -> Any:
    model = load_base(GOLDEN, torch.float32).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def exact(rounded: Any) -> Iterator[Any]:
    """The model with cosines and sines in float32, as the golden numbers were made."""
    kept = type(rounded.body.rotary_emb)
    rounded.body.rotary_emb.__class__ = Qwen3RotaryEmbedding
    yield rounded
    rounded.body.rotary_emb.__class__ = kept


def messages_of(number: int) -> list[Message]:
    case = PROMPTS["prompts"][number]
    words = [Message(USER, (case["reference_text"],))] if case["reference_text"] else []
    reference = [*words, Message(ASSISTANT, (CLIP,))] if case["reference_frames"] else []
    return [*reference, Message(USER, (case["text"],))]


def logits_of(model: Any, number: int, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return text logits (T, V) at all positions, and audio logits (R, C, S) of each row of the target."""
    ids = torch.tensor(PROMPTS["prompts"][number]["ids"])
    target = STREAM.delay(inputs[f"target_codes_{number}"])
    ids = torch.cat([ids, ids.new_full((len(target) - 1,), -100)])
    references = [STREAM.delay(inputs[name]) for name in (f"reference_codes_{number}",) if name in inputs]
    is_audio = ids == -100
    with torch.no_grad():
        rows = torch.cat([*references, target[:-1]])
        hidden = model(ids.clamp(min=0)[None], rows[None], is_audio[None], use_cache=False).last_hidden_state[0]
        return hidden @ model.text_embedding.weight.t(), model.audio_logits(hidden[-len(target) :])


@pytest.mark.parametrize("number", range(3))
def test_prompts_and_rows(number: int, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    case, family = PROMPTS["prompts"][number], HiggsAudioV3()
    target = STREAM.delay(inputs[f"target_codes_{number}"])
    assert target.equal(expected[f"target_delayed_{number}"])
    assert STREAM.revert(target).equal(inputs[f"target_codes_{number}"])
    assert STREAM.has_ended(target)
    if case["reference_frames"]:
        assert STREAM.delay(inputs[f"reference_codes_{number}"]).equal(expected[f"reference_delayed_{number}"])
    segments = family.render_generation(messages_of(number), PROMPTS["specials"])
    prompt = family.tokenize(segments, [case["reference_frames"]], ByteTokenizer(), STREAM)
    places = [column for column, token in enumerate(case["ids"]) if token == -100]
    assert prompt.audio_columns == places
    assert [token if i not in places else -100 for i, token in enumerate(prompt.input_ids)] == case["ids"]
    # In training, the rows of the target follow, and nothing else is learned.
    sample = Sample((*messages_of(number), Message(ASSISTANT, (CLIP,))), len(messages_of(number)), None, "test")
    frames = [
        *([case["reference_frames"]] if case["reference_frames"] else []),
        inputs[f"target_codes_{number}"].shape[1],
    ]
    trained = family.prompt_of(sample, frames, ByteTokenizer(), STREAM)
    assert trained.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert trained.audio_columns == [*places, *range(len(prompt.input_ids), len(prompt.input_ids) + len(target))]
    assert trained.target_clips == [False] * len(frames[1:]) + [True]
    assert set(trained.labels) == {-100}


@pytest.mark.parametrize("number", range(3))
def test_logits(exact: Any, number: int, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    text, audio = logits_of(exact, number, inputs)
    assert (text - expected[f"text_logits_{number}"]).abs().max() < 1e-4
    assert (audio - expected[f"audio_logits_{number}"]).abs().max() < 1e-4


@pytest.mark.parametrize("theta", [None, "absent", 10_000])
def test_base_of_the_rotary_embedding(
    theta: Any, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """null and no value mean 1,000,000; another value gives other logits."""
    folder = shutil.copytree(GOLDEN, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["rope_theta"] = theta
    if theta == "absent":
        del config["text_config"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    check_weights(folder)
    model = load_base(folder, torch.float32).eval()
    model.body.rotary_emb.__class__ = Qwen3RotaryEmbedding
    difference = (logits_of(model, 2, inputs)[1] - expected["audio_logits_2"]).abs().max()
    assert difference > 0.1 if theta == 10_000 else difference < 1e-4


def test_rounded_rotary_embedding(
    rounded: Any, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Cosines and sines are those of bf16 in every dtype; the logits, of up to 7, then differ by 0.01 to 0.03."""
    cos, sin = rounded.body.rotary_emb(torch.zeros(1, 1, 64), torch.arange(500)[None])
    assert cos.equal(cos.bfloat16().float())
    assert sin.equal(sin.bfloat16().float())
    for number in range(3):
        difference = (logits_of(rounded, number, inputs)[1] - expected[f"audio_logits_{number}"]).abs().max()
        assert 0.01 < difference < 0.03


@pytest.mark.parametrize("number", range(3))
def test_greedy_rows(
    exact: Any, number: int, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Row for row, with the end that the golden numbers were made to have."""
    ids = torch.tensor(PROMPTS["prompts"][number]["ids"])
    is_audio = ids == -100
    references = [STREAM.delay(inputs[name]) for name in (f"reference_codes_{number}",) if name in inputs]
    given = (references[0][None], is_audio[None]) if references else (None, None)
    head, steps = exact.audio_logits, iter(range(1000))

    def with_end(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden).clone()
        logits[..., 0, STREAM.eos_id] += 10_000 if next(steps) >= 12 + number else 0
        return logits

    exact.audio_logits = with_end
    try:
        rows = exact.generate(ids.clamp(min=0)[None], *given, max_new_tokens=100, do_sample=False)[0]
    finally:
        del exact.audio_logits
    rows = rows[sum(len(reference) for reference in references) :]
    assert rows.equal(expected[f"greedy_rows_{number}"])
    assert STREAM.has_ended(rows)
    assert STREAM.revert(rows).shape == (8, 12 + number)
