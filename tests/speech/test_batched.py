"""Several clips at once: greedy codes are those of one at a time, and random numbers are those of each clip alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.model.loading import load_for_generation
from higgs_ds.model.parts import Parts
from higgs_ds.model.sample import AudioClip, Message
from higgs_ds.speech.batched import BatchPrompt, Sampling, sampling_of, seed_of, speak_batch
from higgs_ds.speech.generate import GenerationModel, generation_settings, load_generation_model, speak

pytestmark = pytest.mark.slow

# Text, numbers of frames of the references, limit; v3 has a place for one reference.
PROMPTS = [
    ("one two three", (), 60),
    ("seven", (), 40),
    ("four four nine one two six", (9,), 50),
    ("zero", (9, 5), 33),
    ("nine eight", (), 12),
]
BASES = ["tiny-random-base", "tiny-random-base-v3", "speaking-base", "speaking-base-v3"]
UNCHANGED = Sampling(1.0)


@pytest.fixture(scope="module", params=BASES)
def opened(request: pytest.FixtureRequest, cache_dir: Path) -> tuple[Any, Bundle]:
    """A model in float32: in bf16, padding changes codes of random weights."""
    bundle = open_bundle(request.param, None, None, cache_dir)
    model = load_generation_model(GenerationModel(bundle, None, None), torch.device("cpu"))
    return model.float(), bundle


def prompts_for(bundle: Bundle, limit: int | None = None) -> list[BatchPrompt]:
    found = []
    for number, (text, lengths, own_limit) in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(number)
        references = [torch.randint(1024, (8, frames), generator=generator) for frames in lengths]
        references = references[: bundle.family.max_references]
        messages = [Message("system", ("Generate audio following instruction.",))]
        for _ in references:
            messages += [Message("user", ("Said before.",)), Message("assistant", (AudioClip(Path("r.wav")),))]
        messages.append(Message("user", (text,)))
        found.append(BatchPrompt(messages, references, limit or own_limit, seed_of(1, number)))
    return found


def test_greedy_codes_are_those_of_one_at_a_time(opened: tuple[Any, Bundle]) -> None:
    model, bundle = opened
    prompts = prompts_for(bundle)
    alone = [
        speak(model, bundle, p.messages, p.references, generation_settings(0) | {"max_new_tokens": p.max_new_tokens})
        for p in prompts
    ]
    for group in ([0, 1, 2, 3, 4], [0, 1, 4], [3, 2], [1, 1], [4]):
        spoken = speak_batch(model, bundle, [prompts[i] for i in group], Sampling())
        for i, speech in zip(group, spoken, strict=True):
            assert speech.codes.equal(alone[i].codes), i
            assert (speech.stopped, speech.in_range) == (alone[i].stopped, True)
    if "speaking" in bundle.name:
        assert [speech.stopped for speech in alone][:2] == [True, True]
        assert not alone[4].stopped


def test_random_numbers_are_those_of_the_clip(opened: tuple[Any, Bundle]) -> None:
    """Alone, in the middle of others, and in another order: the same codes; with another seed, others."""
    model, bundle = opened
    prompts = prompts_for(bundle, 20)
    settings = sampling_of(model, 1.5, None, 0.98)
    together = speak_batch(model, bundle, prompts, settings)
    torch.manual_seed(5)  # torch's own generator has no part in it
    reverse = speak_batch(model, bundle, prompts[::-1], settings)[::-1]
    for prompt, one, other in zip(prompts, together, reverse, strict=True):
        (alone,) = speak_batch(model, bundle, [prompt], settings)
        assert alone.codes.equal(one.codes)
        assert alone.codes.equal(other.codes)
    again = [BatchPrompt(p.messages, p.references, p.max_new_tokens, p.seed + 1) for p in prompts]
    others = speak_batch(model, bundle, again, settings)
    assert not all(one.codes.equal(other.codes) for one, other in zip(together, others, strict=True))


def test_repetition_aware_sampling_is_off(cache_dir: Path) -> None:
    """It would draw from torch's own generator, whatever the seeds of the clips."""
    bundle = open_bundle("tiny-random-base", None, None, cache_dir)
    model = load_generation_model(GenerationModel(bundle, None, None), torch.device("cpu")).float()
    prompts = prompts_for(bundle, 20)
    without = speak_batch(model, bundle, prompts, UNCHANGED)
    model.generation_config.ras_win_len, model.generation_config.ras_win_max_num_repeat = 7, 1
    assert all(
        a.codes.equal(b.codes) for a, b in zip(without, speak_batch(model, bundle, prompts, UNCHANGED), strict=True)
    )


def test_codes_follow_the_distribution(cache_dir: Path) -> None:
    """Of 400 renderings, the first code is drawn as often as its probability says, and never outside of top_k."""
    bundle = open_bundle("tiny-random-base-v3", None, None, cache_dir)
    model = load_generation_model(GenerationModel(bundle, None, None), torch.device("cpu")).float()
    prompt = prompts_for(bundle)[1]
    logits: list[torch.Tensor] = []
    head = model.audio_logits
    model.audio_logits = lambda hidden: (logits.append(head(hidden)), logits[-1])[1]
    renderings = [BatchPrompt(prompt.messages, [], 8, seed_of(0, 0, k)) for k in range(400)]
    spoken = speak_batch(model, bundle, renderings, Sampling(0.7, top_k=3))
    best = logits[0][0, 0, : bundle.stream.bos_id].div(0.7).topk(3)
    codes = torch.tensor([int(speech.codes[0, 0]) for speech in spoken if speech.codes.shape[1]])
    assert len(codes) == 400
    shares = torch.stack([(codes == code).float().mean() for code in best.indices])
    assert float(shares.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(shares, best.values.softmax(-1), rtol=0, atol=0.08)  # three standard errors


def test_out_of_range(cache_dir: Path) -> None:
    """In fp16, logits that are not finite are noticed."""
    bundle = open_bundle("speaking-base", None, None, cache_dir)
    model = load_generation_model(GenerationModel(bundle, None, None), torch.device("cpu")).half()
    prompts = prompts_for(bundle, 3)[:2]
    assert all(speech.in_range for speech in speak_batch(model, bundle, prompts, Sampling()))
    model.audio_lm_head.weight.data[0, 0] = torch.inf
    assert not any(speech.in_range for speech in speak_batch(model, bundle, prompts, Sampling()))


def test_audio_self_attention(cache_dir: Path) -> None:
    """A part that an adapter has added, which is not in the base's configuration, generates one clip at a time."""
    bundle = open_bundle("tiny-random-base", None, None, cache_dir)
    added = Parts(audio_self_attention=True)
    model = load_for_generation(bundle.folder, None, torch.device("cpu"), added)
    model.add_parts(added, None)
    prompts = prompts_for(bundle, 10)[:3]
    together = speak_batch(model.eval(), bundle, prompts, UNCHANGED)
    for prompt, speech in zip(prompts, together, strict=True):
        assert speak_batch(model, bundle, [prompt], UNCHANGED)[0].codes.equal(speech.codes)
