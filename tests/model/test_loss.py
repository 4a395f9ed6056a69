"""Compare the loss with a naive one: full logits of the native forward, torch's cross entropy, one mean per part."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoTokenizer, HiggsAudioV2ForConditionalGeneration

from higgs_ds.data.collate import EncodedSample, collate
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.loading import load_base
from higgs_ds.model.lora import add_lora
from higgs_ds.model.loss import LossWeights, mean_losses, target_weights
from higgs_ds.model.sample import AudioClip, Message, Sample
from higgs_ds.model.v2.family import HiggsAudioV2
from higgs_ds.model.v2.loss_model import DualLossModel
from higgs_ds.model.v2.stream import FramedStream
from higgs_ds.options.train import LoraOptions

CLIP = AudioClip(Path("x.wav"))


@pytest.fixture(scope="module")
def model(base: Path) -> DualLossModel:
    return DualLossModel(adapted_model(base))


@pytest.fixture(scope="module")
def native(base: Path) -> HiggsAudioV2ForConditionalGeneration:
    """The same model with transformers' own layers and heads."""
    return adapted_model(base).get_base_model()


def adapted_model(base: Path) -> PeftModel:
    torch.manual_seed(0)
    adapted = add_lora(load_base(base, torch.float32), LoraOptions(lora_dropout=0.0), "base", torch.float32)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return adapted


def samples(tokenizer: object, stream: FramedStream) -> list[EncodedSample]:
    """Samples of different lengths: speech, cloning with a reference clip, a text answer, speech to text."""
    draw = torch.Generator().manual_seed(1)
    conversations = [
        ([Message("user", ("Hi.",)), Message("assistant", (CLIP,))], 0),
        (
            [
                Message("system", ("Speak like this: ", CLIP)),
                Message("user", ("Reference.",)),
                Message("assistant", (CLIP,)),
                Message("user", ("And now this.",)),
                Message("assistant", ("Words first. ", CLIP)),
            ],
            4,
        ),
        ([Message("user", ("Question?",)), Message("assistant", ("Answer.",))], 0),
        ([Message("user", (CLIP,)), Message("assistant", ("Transcript.",))], 0),
    ]
    encoded = []
    for messages, start_index in conversations:
        sample = Sample(tuple(messages), start_index, None, "test")
        codes = [torch.randint(0, 1024, (8, 4 + 3 * i), generator=draw) for i in range(1, 1 + len(sample.clips))]
        prompt = HiggsAudioV2().prompt_of(sample, [c.shape[1] for c in codes], tokenizer, stream)  # type: ignore[arg-type]
        encoded.append(EncodedSample(prompt, codes))
    return encoded


def naive_means(
    higgs: HiggsAudioV2ForConditionalGeneration, encoded: list[EncodedSample], stream: FramedStream
) -> torch.Tensor:
    """Return mean cross entropies (1 + C,) over all samples, each in its own batch, from logits at every position."""
    logits: list[tuple[torch.Tensor, torch.Tensor]] = []
    for sample in encoded:
        ids, labels = torch.tensor([sample.prompt.input_ids]), torch.tensor(sample.prompt.labels)
        audio_labels = torch.full((ids.shape[1], 8), IGNORE_INDEX)
        row_labels = [
            stream.labels(codes) if is_target else torch.full((stream.num_rows(codes.shape[1]), 8), IGNORE_INDEX)
            for codes, is_target in zip(sample.codes, sample.prompt.target_clips, strict=True)
        ]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if sample.codes:
            audio_labels[sample.prompt.audio_columns] = torch.cat(row_labels)
            rows = torch.cat([stream.delay(codes) for codes in sample.codes])[None]
            inputs |= {"audio_input_ids": rows, "audio_input_ids_mask": torch.ones(rows.shape[:2], dtype=torch.bool)}
        hidden = higgs.model(**inputs).last_hidden_state
        text_logits = higgs.text_lm_head(hidden)[0, :-1]
        audio_logits = higgs(**inputs).logits.view(ids.shape[1], 8, -1)[:-1]
        parts = [(text_logits, labels[1:])] + [(audio_logits[:, k], audio_labels[1:, k]) for k in range(8)]
        logits = (
            [(torch.cat([a, b]), torch.cat([c, d])) for (a, c), (b, d) in zip(logits or parts, parts, strict=True)]
            if logits
            else parts
        )
    return torch.stack([F.cross_entropy(part_logits, part_labels) for part_logits, part_labels in logits])


@pytest.mark.parametrize("weights", [(1.0, 1.0, None), (0.3, 2.0, (8, 4, 2, 1, 1, 1, 1, 0))])
@pytest.mark.parametrize("micro_batches", [[[0, 1, 2, 3]], [[1, 2], [0, 3]], [[2], [3], [], [1, 0]]], ids=str)
def test_equals_naive_cross_entropy(
    model: DualLossModel,
    native: HiggsAudioV2ForConditionalGeneration,
    base: Path,
    micro_batches: list[list[int]],
    weights: tuple[float, float, tuple[float, ...] | None],
) -> None:
    config = model.higgs.config
    stream = FramedStream(config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id)
    encoded = samples(AutoTokenizer.from_pretrained(base), stream)
    batches = [collate([encoded[i] for i in indices], stream, config.pad_token_id) for indices in micro_batches]
    loss_weights = LossWeights.of(weights[0], weights[1], 8, weights[2])
    counts = torch.stack([batch.target_counts() for batch in batches]).sum(dim=0)
    per_target = target_weights(counts, loss_weights)
    results = [model(**batch.tensors(torch.device("cpu")), target_weights=per_target) for batch in batches]
    losses = mean_losses(torch.stack([sums for _, sums, _ in results]).sum(dim=0), counts, loss_weights)

    with torch.no_grad():
        expected = naive_means(native, encoded, stream)
    share = torch.tensor(weights[2] or [1.0] * 8)
    audio = (expected[1:] * share / share.sum()).sum()
    total = weights[0] * expected[0] + weights[1] * audio
    assert losses.text == pytest.approx(float(expected[0]), abs=1e-5)
    assert losses.codebooks == pytest.approx(expected[1:].tolist(), abs=1e-5)
    assert losses.audio == pytest.approx(float(audio), abs=1e-5)
    assert losses.total == pytest.approx(float(total), abs=1e-5)
    assert sum(loss.sum().item() for loss, *_ in results) == pytest.approx(float(total), abs=1e-5)


def test_mean_of_means_is_another_loss(native: HiggsAudioV2ForConditionalGeneration, base: Path) -> None:
    """The naive way, the mean of one mean per micro-batch, differs. `model.loss` exists to avoid it."""
    config = native.config
    stream = FramedStream(config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id)
    encoded = samples(AutoTokenizer.from_pretrained(base), stream)
    with torch.no_grad():
        whole = naive_means(native, encoded, stream)
        halves = (naive_means(native, encoded[:1], stream) + naive_means(native, encoded[1:2], stream)) / 2
    assert (whole[1:] - halves[1:]).abs().max() > 1e-3


def test_padding_and_order_change_nothing(model: DualLossModel, base: Path) -> None:
    config = model.higgs.config
    stream = FramedStream(config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id)
    encoded = samples(AutoTokenizer.from_pretrained(base), stream)
    shuffled = random.Random(0).sample(encoded, len(encoded))
    ones = torch.ones(9)
    sums = []
    for order in (encoded, shuffled):
        batch = collate(order, stream, config.pad_token_id)
        sums.append(model(**batch.tensors(torch.device("cpu")), target_weights=ones)[1])
    alone = [collate([sample], stream, config.pad_token_id) for sample in encoded]
    sums.append(sum(model(**batch.tensors(torch.device("cpu")), target_weights=ones)[1] for batch in alone))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[0], sums[2], rtol=1e-5, atol=1e-4)
