"""Delay pattern, ChatML assembly and logits compared with the original runtime's own output (tests/golden)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, write_manifest
from safetensors.torch import load_file
from transformers import AutoTokenizer, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_ds.data.collate import EncodedSample, collate
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.prompt import Prompt
from higgs_ds.model.sample import Sample
from higgs_ds.model.v2.family import HiggsAudioV2
from higgs_ds.model.v2.prompt import AUDIO_DELAY, AUDIO_IN, AUDIO_OUT, render
from higgs_ds.model.v2.stream import FramedStream
from higgs_ds.options.train import DataOptions

GOLDEN = PROJECT / "tests" / "golden"
DELAY = json.loads((GOLDEN / "delay_pattern.json").read_text())
CHATML = json.loads((GOLDEN / "chatml_assembly.json").read_text())["cases"]
STREAM = FramedStream(num_codebooks=8, bos_id=1024, eos_id=1025)


@pytest.mark.parametrize("case", DELAY["cases"], ids=lambda case: f"{case['num_frames']} frames")
def test_delay_pattern(case: dict[str, Any]) -> None:
    codes = torch.tensor(case["codes"])
    rows = STREAM.delay(codes)
    assert rows.tolist() == case["audio_input_ids"]
    assert STREAM.labels(codes).tolist() == case["audio_labels"]
    assert STREAM.revert(rows).equal(codes)


def test_reference_and_target_segments() -> None:
    case = DELAY["two_segments_first_is_reference"]
    codes = [torch.tensor(segment) for segment in case["codes"]]
    num_rows = sum(STREAM.num_rows(segment.shape[1]) for segment in codes)
    # Every position except the first is an audio token, so the batch contains all rows, shifted by one position.
    prompt = Prompt([0] * (1 + num_rows), [IGNORE_INDEX] * (1 + num_rows), list(range(1, 1 + num_rows)), [False, True])
    batch = collate([EncodedSample(prompt, codes)], STREAM, pad_id=0)
    assert batch.codes.tolist() == case["audio_input_ids"]
    labels = torch.full((num_rows, 8), IGNORE_INDEX)
    # Row r is at position r + 1 and is predicted at position r.
    labels[batch.positions[batch.audio_places]] = batch.audio_targets
    assert labels.tolist() == case["audio_labels"]


@pytest.fixture(scope="module")
def chatml_samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    path = write_manifest(tmp_path_factory.mktemp("chatml") / "cases.jsonl", [case["sample"] for case in CHATML])
    samples = [entry.sample for entry in read_entries(path, DataOptions(allow_text_targets=True)) if entry.sample]
    return dict(zip([case["name"] for case in CHATML], samples, strict=True))


@pytest.mark.parametrize("case", CHATML, ids=lambda case: case["name"])
def test_chatml_assembly(case: dict[str, Any], chatml_samples: dict[str, Sample]) -> None:
    sample = chatml_samples[case["name"]]
    segments = list(render(sample.messages, sample.start_index))
    assert "".join(segment.text for segment in segments) == case["rendered"]
    spans = itertools.groupby(segments, key=lambda segment: segment.is_target)
    assert ["".join(s.text for s in group) for is_target, group in spans if is_target] == case["supervised_spans"]
    assert [clip.path.name for clip in sample.clips] == case["audio_urls_in_order"]
    assert sample.speaker == case["speaker"]


@pytest.mark.parametrize("case", CHATML, ids=lambda case: case["name"])
def test_token_ids_and_labels(case: dict[str, Any], chatml_samples: dict[str, Sample], base: Path) -> None:
    """Token ids equal those of the whole text tokenized at once."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    sample = chatml_samples[case["name"]]
    num_frames = [3 + i for i in range(len(sample.clips))]
    prompt = HiggsAudioV2().prompt_of(sample, num_frames, tokenizer, STREAM)

    def expanded(text: str) -> str:
        lengths = iter(num_frames)
        for marker in (AUDIO_IN, AUDIO_OUT):
            assert text.count(marker) <= len(num_frames)
        pieces = text.replace(AUDIO_IN, AUDIO_OUT).split(AUDIO_OUT)
        audio = [AUDIO_OUT * (next(lengths) + 2) + AUDIO_DELAY * 7 for _ in pieces[1:]]
        return "".join(a + b for a, b in itertools.zip_longest(pieces, audio, fillvalue=""))

    expected = tokenizer(expanded(case["rendered"]), add_special_tokens=False)["input_ids"]
    assert prompt.input_ids == expected
    placeholders = tokenizer.convert_tokens_to_ids([AUDIO_OUT, AUDIO_DELAY])
    assert prompt.audio_columns == [i for i, token in enumerate(expected) if token in placeholders]
    labelled = [token for token in prompt.labels if token != IGNORE_INDEX]
    spans = "".join(case["supervised_spans"]).replace(AUDIO_OUT, "")
    assert labelled == tokenizer(spans, add_special_tokens=False)["input_ids"]
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(prompt.labels, prompt.input_ids, strict=True))


def test_logits_with_a_reference_clip() -> None:
    """A reference clip gives the same logits with the native placeholder as with `<|AUDIO|>` in the original.

    This allows references in a system or user message without a change to the model.
    """
    folder = GOLDEN / "released_flags"
    text, original = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    text = text["text_config"]
    config = HiggsAudioV2Config(
        **{name: text[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
           "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")},
        codebook_size=66, audio_token_id=316, audio_delay_token_id=314, pad_token_id=301,
    )  # fmt: skip
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).eval()
    renamed = {}
    for name, tensor in original.items():
        if name.startswith(("embed_tokens", "layers", "norm")):
            name = f"model.{name}"
        name = name.replace("audio_codebook_embeddings", "model.embed_audio_tokens.embed_audio_tokens")
        renamed[name.replace("audio_decoder_proj.", "")] = tensor
    model.load_state_dict(renamed)

    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    stream = FramedStream(8, bos_id=64, eos_id=65)
    rows = [stream.delay(inputs[name]) for name in ("reference_codes", "target_codes")]
    original_audio_in, native_audio = 315, 316
    ids = expected["expanded_input_ids"].clone()
    ids[ids == original_audio_in] = native_audio
    with torch.no_grad():
        hidden = model.model(
            input_ids=ids,
            audio_input_ids=torch.cat(rows)[None],
            audio_input_ids_mask=torch.ones(1, sum(map(len, rows)), dtype=torch.bool),
        ).last_hidden_state
        audio_logits = model.audio_lm_head(hidden)[expected["audio_out_mask"]].view(-1, 8, 66)
        assert (model.text_lm_head(hidden) - expected["text_logits"]).abs().max() < 1e-5
        assert (audio_logits - expected["audio_logits"]).abs().max() < 1e-5
