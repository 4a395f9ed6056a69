"""launch/generate.py: dialogues of several references, speakers of a model's record, long texts and lines of a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from conftest import SYSTEM, VOICES
from transformers import AutoProcessor

from higgs_ds.adapters.speakers import TrainedSpeakers, read_speakers
from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.cli import generate as generate_command
from higgs_ds.common.errors import EXIT_BAD_INPUT, InputError
from higgs_ds.data.audio import read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.model.loading import load_for_generation
from higgs_ds.model.sample import AudioClip, Message
from higgs_ds.model.v2.prompt import render_generation
from higgs_ds.options.commands import GenerateOptions
from higgs_ds.speech.generate import conversation, generation_settings, speak
from higgs_ds.speech.generate import main as generate

ANNA, BEN = VOICES / "anna_00.flac", VOICES / "ben_00.flac"
CPU = torch.device("cpu")
NUM_ROWS = 14  # --max_new_tokens: six frames
SCENE = "<|scene_desc_start|>\n{}\n<|scene_desc_end|>"


@pytest.fixture(scope="module")
def bundle(base: Path, cache_dir: Path) -> Bundle:
    return open_bundle(str(base), None, None, cache_dir)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return load_for_generation(base, None, CPU).eval()


def spoken(folder: Path, base: Path, **options: Any) -> torch.Tensor:
    """Return the waveform that the command writes."""
    values = {"output": folder / "out.wav", "temperature": 0.0, "max_new_tokens": NUM_ROWS} | options
    generate(GenerateOptions(base_model_path=str(base), **values))
    return torch.from_numpy(soundfile.read(values["output"], dtype="float32")[0])


def expected(
    model: Any, bundle: Bundle, turns: list[tuple[str, Any]], references: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and waveform that the model speaks after turns; a clip is a path."""
    messages = [
        Message(role, (AudioClip(content) if isinstance(content, Path) else content,)) for role, content in turns
    ]
    settings = generation_settings(0.0) | {"max_new_tokens": NUM_ROWS}
    codes = speak(model, bundle, messages, references, settings).codes.clamp(max=bundle.stream.bos_id - 1)
    return codes, Codec(bundle.codec.folder, CPU).decode(codes)


def assert_same_sound(one: torch.Tensor, other: torch.Tensor) -> None:
    assert len(one) == len(other) > 0
    torch.testing.assert_close(one, other.clamp(-1, 1), rtol=0, atol=1e-4)  # 16 bits


def encoded(bundle: Bundle, path: Path) -> torch.Tensor:
    codec = Codec(bundle.codec.folder, CPU)
    return codec.encode(read_audio(AudioClip(path), codec.sample_rate))


def test_dialogue_with_two_references(base: Path, model: Any, bundle: Bundle, tmp_path: Path) -> None:
    """The prompt is that of transformers' processor, and the speech follows it."""
    text, said = "[SPEAKER0] Hello. [SPEAKER1] Hi.", ("Good morning.", "Turn left here.")
    references = [encoded(bundle, path) for path in (ANNA, BEN)]
    turns: list[tuple[str, Any]] = [("system", SYSTEM)]
    for number, (path, words) in enumerate(zip((ANNA, BEN), said, strict=True)):
        turns += [("user", f"[SPEAKER{number}] {words}"), ("assistant", path)]
    turns.append(("user", text))
    options = GenerateOptions(text=text, ref_audio=(ANNA, BEN), ref_text=said, scene="")
    parts = [
        {"type": "audio", "path": str(content)} if isinstance(content, Path) else {"type": "text", "text": content}
        for _, content in turns
    ]
    chat = [{"role": role, "content": [part]} for (role, _), part in zip(turns, parts, strict=True)]
    theirs = AutoProcessor.from_pretrained(base).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert "".join(segment.text for segment in render_generation(conversation(options))) == theirs
    found = spoken(tmp_path, base, text=text, ref_audio=(ANNA, BEN), ref_text=said, scene="")
    assert_same_sound(found, expected(model, bundle, turns, references)[1])


def test_speakers_of_the_record(base: Path, model: Any, bundle: Bundle, tmp_path: Path) -> None:
    """One speaker has the prompt of training; of two in a dialogue, each has a line."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    TrainedSpeakers("description", {"anna": "a low voice", "ben": "old", "carl": None}).write(copy)
    assert read_speakers(copy).voices["anna"] == "a low voice"
    one = f"{SYSTEM}\n\n{SCENE.format('Rain.' + chr(10) * 2 + 'SPEAKER0: a low voice')}"
    found = spoken(tmp_path, copy, text="Hello.", speaker=("anna",), scene="Rain.")
    assert_same_sound(found, expected(model, bundle, [("system", one), ("user", "Hello.")], [])[1])
    text = "[SPEAKER1] Hello. [SPEAKER0] Hi."
    prompt = conversation(GenerateOptions(text=text))[0].parts[0]
    assert isinstance(prompt, str)
    two = prompt.replace("\n<|scene_desc_end|>", "\n\nSPEAKER0: old\nSPEAKER1: a low voice\n<|scene_desc_end|>")
    found = spoken(tmp_path, copy, text=text, speaker=("ben", "anna"))
    assert_same_sound(found, expected(model, bundle, [("system", two), ("user", text)], [])[1])


@pytest.mark.parametrize(
    ("record", "options", "problems"),
    [
        (None, {"speaker": ("anna",)}, ["has no record of its speakers"]),
        (("tag", {"anna": "anna"}), {"speaker": ("ana", "ben")}, ["did you mean anna?", "ben: is not "]),
        (("reference", {"anna": None}), {"speaker": ("anna",)}, ["give one as --ref_audio"]),
        (("tag", {"anna": None}), {"speaker": ("anna",)}, ["only reference clips told"]),
        ("{", {}, ["speakers.json: cannot be read"]),
        (None, {"ref_audio": (ANNA, BEN), "ref_text": ("A.", "B.")}, ["must begin with a tag"]),
        (None, {"ref_audio": (ANNA,), "ref_text": ("A.",), "text": "[SPEAKER1] Hi."}, ["there is no voice for it: 1 "]),
        (None, {"text": "[SPEAKER0]"}, ["has no words"]),
        (None, {"ref_audio": (ANNA, Path("none.wav")), "ref_text": ("A.", "<|eot_id|>"), "top_k": 1},
         ["--top_k", "--ref_text: contains", "none.wav: no such file", "must begin with a tag"]),
    ],
)  # fmt: skip
def test_refused_before_weights_are_loaded(
    base: Path, tmp_path: Path, record: Any, options: dict[str, Any], problems: list[str]
) -> None:
    """The weights of this base cannot even be read."""
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    for path in copy.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[: 1 << 16])
    if isinstance(record, str):
        (copy / "speakers.json").write_text(record)
    elif record is not None:
        TrainedSpeakers(*record).write(copy)
    values = {"text": "Hi.", "output": tmp_path / "out.wav"} | options
    with pytest.raises(InputError) as error:
        generate(GenerateOptions(base_model_path=str(copy), **values))
    assert len(error.value.problems) == len(problems)
    for problem in problems:
        assert error.match(problem)


def test_long_text_follows_its_last_chunks(base: Path, model: Any, bundle: Bundle, tmp_path: Path) -> None:
    """Each chunk is spoken after the reference and the two chunks before it, and a tag is repeated."""
    chunks = [
        "[SPEAKER0] One, two, three.",
        "[SPEAKER0] Four, five, six.",
        "[SPEAKER0] Seven, eight, nine.",
        "[SPEAKER0] Ten, eleven.",
    ]
    text = "[SPEAKER0] " + " ".join(chunk.removeprefix("[SPEAKER0] ") for chunk in chunks)
    system = ("system", f"{SYSTEM}\n\n{SCENE.format('Audio is recorded from a quiet room.')}")
    before: list[tuple[str, Any]] = [("user", "Good morning."), ("assistant", ANNA)]
    reference, said = encoded(bundle, ANNA), []
    for number, chunk in enumerate(chunks):
        earlier = range(max(0, number - 2), number)
        context = [turn for i in earlier for turn in (("user", chunks[i]), ("assistant", ANNA))]
        given = [reference, *(said[i] for i in earlier)]
        said.append(expected(model, bundle, [system, *before, *context, ("user", chunk)], given)[0])
    found = spoken(tmp_path, base, text=text, ref_audio=(ANNA,), ref_text=("Good morning.",), chunk_chars=27)
    assert_same_sound(found, Codec(bundle.codec.folder, CPU).decode(torch.cat(said, dim=1)))
    alone = spoken(tmp_path, base, text=text, ref_audio=(ANNA,), ref_text=("Good morning.",))
    assert len(alone) < len(found)


def test_lines_of_a_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is spoken as it would be alone, also when it is sampled."""
    (tmp_path / "lines.txt").write_text("Hello.\n\nGood morning.\n")
    common = f"--base_model_path {base} --temperature 1 --max_new_tokens {NUM_ROWS} --output {tmp_path}/"
    assert generate_command(f"--text_file {tmp_path}/lines.txt --each_line {common}all.wav".split()) == 0
    *written, warning = [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()]
    assert written == [f"WAV: {tmp_path}/all-{number}.wav" for number in (1, 3)]
    assert warning.startswith("warning: stop rate 0 is bad")
    assert generate_command([*f"{common}one.wav --text".split(), "Good morning."]) == 0
    assert (tmp_path / "all-3.wav").read_bytes() == (tmp_path / "one.wav").read_bytes()
    assert generate_command(f"--text_file {tmp_path}/lines.txt {common}whole.wav".split()) == 0
    assert (tmp_path / "whole.wav").is_file()
    assert generate_command(f"--each_line --text Hi {common}a.wav".split()) == EXIT_BAD_INPUT
