"""What Higgs Audio v3 can speak of a sample: a reference and its words, the text, its clip; why not the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import speech_sample, write_manifest

from higgs_ds.bases.builtin import RANDOM_BASE
from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.common.errors import InputError
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data.preparation import Preparation
from higgs_ds.data.token_counter import TokenCounter
from higgs_ds.model.families import family_of
from higgs_ds.model.sample import ASSISTANT, SYSTEM, USER, AudioClip, Message, Sample
from higgs_ds.options.train import DataOptions

CLIP, OTHER = AudioClip(Path("a.wav")), AudioClip(Path("b.wav"))
SPEAKS = (Message(USER, ("Hello.",)), Message(ASSISTANT, (CLIP,)))
WITH_WORDS = (Message(USER, ("Before.",)), Message(ASSISTANT, (OTHER,)))
FAMILY = family_of("higgs_multimodal_qwen3")
TOKENS = {"<|tts|>", "<|text|>", "<|audio|>", "<|ref_audio|>", "<|ref_text|>", "<|emotion:happy|>"}


def sample_of(*messages: Message, start_index: int | None = None) -> Sample:
    return Sample(messages, len(messages) - 1 if start_index is None else start_index, None, "m.jsonl:1")


@pytest.mark.parametrize(
    ("messages", "expected", "left_out"),
    [
        (SPEAKS, SPEAKS, ()),
        ((*WITH_WORDS, *SPEAKS), (*WITH_WORDS, *SPEAKS), ()),
        ((Message(SYSTEM, ("A quiet room.",)), *SPEAKS), SPEAKS, ("system text",)),
        ((Message(ASSISTANT, (OTHER,)), *SPEAKS), (Message(ASSISTANT, (OTHER,)), *SPEAKS), ()),
        # A clip that is in no turn of its own is a reference without words.
        ((Message(SYSTEM, (OTHER,)), *SPEAKS), (Message(ASSISTANT, (OTHER,)), *SPEAKS), ()),
        ((Message(SYSTEM, ("Like ", OTHER)), *SPEAKS), (Message(ASSISTANT, (OTHER,)), *SPEAKS), ("system text",)),
        (
            (Message(USER, ("[SPEAKER0] Hello.",)), Message(ASSISTANT, (CLIP,))),
            SPEAKS,
            ("speaker tags",),
        ),
        (
            (Message(USER, ("<|emotion:happy|>Hello.",)), Message(ASSISTANT, (CLIP,))),
            (Message(USER, ("<|emotion:happy|>Hello.",)), Message(ASSISTANT, (CLIP,))),
            (),
        ),
    ],
)
def test_what_is_spoken(
    messages: tuple[Message, ...], expected: tuple[Message, ...], left_out: tuple[str, ...]
) -> None:
    spoken = FAMILY.as_spoken(sample_of(*messages), TOKENS)
    assert spoken.faults == ()
    assert spoken.sample.messages == expected
    assert spoken.sample.start_index == len(expected) - 1
    assert spoken.left_out == left_out


@pytest.mark.parametrize(
    ("messages", "start_index", "fault"),
    [
        ((*SPEAKS, *SPEAKS), 0, "2 turns are to be learned; this model learns the last turn"),
        ((*WITH_WORDS, *WITH_WORDS, *SPEAKS), None, "2 reference clips; the prompt of this model has a place for one"),
        ((Message(USER, ("Hi.",)), Message(ASSISTANT, ("Yes?",)), *SPEAKS), None, r"\[0\]: is neither the text"),
        ((SPEAKS[0], Message(ASSISTANT, ("Words. ", CLIP))), None, r"messages\[1\]: must be one audio clip"),
        ((Message(ASSISTANT, (CLIP,)),), None, "the turn before the clip must be a user's"),
        (
            (Message(USER, ("[SPEAKER0] Hi. [SPEAKER1] Yes?",)), Message(ASSISTANT, (CLIP,))), None,
            "2 speakers in one text; this model speaks with one voice per sample",
        ),
        (
            (Message(USER, ("Hi <|audio|>",)), Message(ASSISTANT, (CLIP,))), None,
            r"contains <\|audio\|>, which the prompt layout adds itself",
        ),
        (
            (Message(USER, ("<|emotion:hapy|>Hi",)), Message(ASSISTANT, (CLIP,))), None,
            r"contains <\|emotion:hapy\|>, which is not a token of this base",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_spoken(messages: tuple[Message, ...], start_index: int | None, fault: str) -> None:
    spoken = FAMILY.as_spoken(sample_of(*messages, start_index=start_index), TOKENS)
    with pytest.raises(InputError, match=fault):
        raise InputError(list(spoken.faults))


def test_without_a_token_for_the_words_of_a_reference() -> None:
    spoken = FAMILY.as_spoken(sample_of(*WITH_WORDS, *SPEAKS), TOKENS - {"<|ref_text|>"})
    assert spoken.sample.messages == (WITH_WORDS[1], *SPEAKS)
    assert spoken.left_out == ("words of references, for which this base's tokenizer has no token,",)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(f"{RANDOM_BASE}-v3", None, None, default_cache_dir())


def test_counted_tokens_are_those_of_the_prompt(bundle: Bundle, tmp_path: Path) -> None:
    """With and without a reference, and with a reference drawn from the other samples of a speaker."""
    entries = [speech_sample("Good morning.", "anna_00.flac"), speech_sample("Turn left here.", "ben_00.flac")]
    entries[1]["messages"][1:1] = speech_sample("Ahem.", "ben_01.flac")["messages"][1:]
    entries[1]["start_index"] = 3
    manifest = write_manifest(tmp_path / "m.jsonl", entries)
    coder = bundle.coder(tmp_path / "cache")
    with Preparation(DataOptions(), coder, tmp_path / "cache") as preparation:
        index = preparation.check(manifest).index
        assert index is not None
        counter = TokenCounter(coder)
        for row in range(2):
            sample, clips = index.sample(row)
            assert [message.role for message in sample.messages] == [USER, ASSISTANT] * (row + 1)
            texts = counter.count_texts([sample.messages])
            frames = [clip.num_frames for clip in clips]
            prompt = coder.family.prompt_of(sample, frames, coder.tokenizer, coder.stream)
            assert index.num_tokens[row] == counter.count(sample.messages, clips, texts) == len(prompt.input_ids)


def test_problems_have_file_and_line(bundle: Bundle, tmp_path: Path) -> None:
    entries = [speech_sample("Good <|morning|>", "anna_00.flac"), speech_sample("Fine.", "ben_00.flac")]
    manifest = write_manifest(tmp_path / "m.jsonl", entries)
    with Preparation(DataOptions(), bundle.coder(tmp_path / "cache"), tmp_path / "cache") as preparation:
        problems = preparation.problems([preparation.check(manifest)])
    assert problems == [
        f"{manifest}:1: messages: the text contains <|morning|>, which is not a token of this base; correct or remove "
        "it"
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["text_config"].update(num_hidden_layers=0), "text_config.num_hidden_layers is 0; it must be"),
        (lambda c: c["text_config"].update(model_type="llama"), "text_config.model_type is 'llama'; the trunk must be"),
        (lambda c: c.update(text_config=None), "text_config is None; it must be an object"),
        (lambda c: c["audio_encoder_config"].update(encoder_type="whisper"), "encoder_type is 'whisper'; this trainer"),
        (lambda c: c["audio_encoder_config"].update(out_dim=128), "out_dim is 128; it must be the trunk's hidden_size"),
        (lambda c: c["audio_encoder_config"].update(num_codebooks=9), "the codec has 8 codebooks, but the base"),
        (lambda c: c["text_config"].update(vocab_size=100), "in the tokenizer, but the model has only 100 text tokens"),
        (lambda c: c.update(quantization_config={}), "its weights are quantized; give the unquantized base"),
        (lambda c: c.update(model_type="higgs_audio_v9"), "model_type is 'higgs_audio_v9'; a Higgs Audio v2 model has"),
    ],
)  # fmt: skip
def test_other_or_damaged_bases_are_refused(bundle: Bundle, change: object, problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for path in bundle.folder.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((bundle.folder / "config.json").read_text(encoding="utf-8"))
    change(config)  # type: ignore[operator]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        open_bundle(str(folder), None, None, tmp_path / "cache")
    assert any(problem in line for line in caught.value.problems), caught.value.problems


def test_fill_is_refused_where_there_is_none() -> None:
    with pytest.raises(InputError, match="--train_fill: Higgs Audio v2 has no codes that its runtimes force"):
        family_of("higgs_audio_v2").stream({"num_codebooks": 8}, train_fill=True)
