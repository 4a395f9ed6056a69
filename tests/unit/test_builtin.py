"""The built-in base is the same on every build, and loads and works as any base does, by transformers alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, HiggsAudioV2ForConditionalGeneration

from higgs_ds.builtin import builtin_base
from higgs_ds.data.audio import read_audio
from higgs_ds.data.prompt import render_generation, tokenize
from higgs_ds.data.sample import AudioClip, Message
from higgs_ds.files import sha256_of

VOICE = PROJECT / "samples" / "voices" / "ben_00.flac"
CLIP = AudioClip(VOICE)


# SHA-256 over names and bytes of all tensors: the same on every machine.
WEIGHTS = {
    "tiny-random-base": "217adec6754b57ca00c72041a824ed8ae5d1e9a5f4a65f899da3376807aba215",
    "tiny-random-codec": "11e435773791ac31a02b99060ae509e347aa8de0e69d5fd595db1884f4a86314",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_same_on_every_machine(base: Path, name: str) -> None:
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(base.parent / name / "model.safetensors").items()):
        digest.update(key.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS[name]


def test_built_twice_alike(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = builtin_base(tmp_path)
    assert torch.get_rng_state().equal(before)  # building leaves the user's random numbers alone
    names = sorted(str(path.relative_to(again.parent)) for path in again.parent.rglob("*") if path.is_file())
    assert "tiny-random-base/model.safetensors" in names
    assert "tiny-random-codec/model.safetensors" in names
    for name in names:
        if not name.endswith("processor_config.json"):  # names the codec's folder
            assert sha256_of(again.parent / name) == sha256_of(base.parent / name), name


def test_loads_by_itself_and_generates(base: Path) -> None:
    processor = AutoProcessor.from_pretrained(base)
    model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        base, use_text_head=True, output_loading_info=True
    )
    assert not any(info.values())
    conversation = [
        {"role": "system", "content": "Generate audio following instruction."},
        {"role": "scene", "content": "Audio is recorded from a quiet room."},
        {"role": "user", "content": "Hello there."},
    ]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    rows = model.generate(**inputs, max_new_tokens=12)
    assert rows.shape == (1, 12, 8)
    assert (rows[0, 0] == 1024).all()


CONVERSATIONS = {
    "smart voice": [("system", ("Be brief.",)), ("user", ("Hello.",))],
    "cloning": [("system", ("Speak.",)), ("user", ("Words.",)), ("assistant", (CLIP,)), ("user", ("Hi.",))],
    "reference in the system turn": [("system", ("SPEAKER0: ", CLIP, "\nNow.")), ("user", ("[SPEAKER0] Hi.",))],
    "two assistant turns": [("user", ("Hi.",)), ("assistant", (CLIP,)), ("assistant", (CLIP,)), ("user", ("Again.",))],
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template_is_the_training_layout(base: Path, name: str) -> None:
    """The template and processor, which inference uses, give the ids and codes that training uses."""
    from higgs_ds.bundle import open_bundle
    from higgs_ds.data.codec import Codec
    from higgs_ds.data.delay_pattern import apply_delay_pattern

    bundle = open_bundle(str(base), None, None, base)
    waveform = read_audio(AudioClip(VOICE), bundle.codec.sample_rate)
    messages = [Message(role, parts) for role, parts in CONVERSATIONS[name]]
    codec = Codec(bundle.codec.folder, torch.device("cpu"))
    codes = [codec.encode(waveform[None])[0] for m in messages for _ in m.clips]
    prompt = tokenize(render_generation(messages), [c.shape[1] for c in codes], bundle.tokenizer, bundle.stream)

    processor = AutoProcessor.from_pretrained(base)
    chat = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "audio", "audio": waveform.numpy()}
                for part in message.parts
            ],
        }
        for message in messages
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, audio=[waveform.numpy()] * len(codes) or None, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt.input_ids
    if codes:
        assert inputs["audio_input_ids"][0].equal(torch.cat([apply_delay_pattern(c, bundle.stream) for c in codes]))


def test_template_of_the_scene_role(base: Path) -> None:
    processor = AutoProcessor.from_pretrained(base)
    separate = [{"role": "system", "content": "Generate audio."}, {"role": "scene", "content": "A quiet room."}]
    joined = "Generate audio.\n\n<|scene_desc_start|>\nA quiet room.\n<|scene_desc_end|>"
    rendered = processor.apply_chat_template(separate, tokenize=False)
    assert rendered == processor.apply_chat_template([{"role": "system", "content": joined}], tokenize=False)


def test_tokenizer_keeps_any_text(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text in ["Hello, world!", "太阳从东方升起。 مرحبا é", "  two  spaces\n\nand lines\t", "🙂"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
