"""A recording is converted to the conversation format that the base was pretrained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import PROJECT

from higgs_ds.data.templates import Recording, Reference, conversation, joined
from higgs_ds.model.sample import AudioClip, Message
from higgs_ds.model.v2.prompt import render

CASES = json.loads((PROJECT / "tests" / "golden" / "chatml_assembly.json").read_text())["cases"]
GOLDEN = {case["name"]: case for case in CASES}
T, R0, R1 = (AudioClip(Path(name)) for name in ("t.wav", "r0.wav", "r1.wav"))
TWO = "[SPEAKER0] Hello.\n[SPEAKER1] Hi."
SCENE = "Audio is recorded from a quiet room."
SPEAKERS = (
    "You are an AI assistant designed to convert text into speech.\nIf the user's message includes a [SPEAKER*] tag, "
    "do not read out the tag and generate speech for the following text, using the specified voice.\nIf no speaker tag "
    "is present, select a suitable voice on your own."
)


def golden_turns(recording: Recording, placement: str) -> tuple[str, list[str]]:
    """Return the text of a recording's conversation, and the text of its supervised spans."""
    messages, start_index = conversation(recording, placement)
    segments = list(render(messages, start_index))
    spans = "".join(segment.text if segment.is_target else "\0" for segment in segments)
    return "".join(segment.text for segment in segments), [span for span in spans.split("\0") if span]


def test_smart_voice_is_golden() -> None:
    case = GOLDEN["smart_voice"]
    assert golden_turns(Recording(T, "The sun rises in the east."), "context") == (
        case["rendered"],
        case["supervised_spans"],
    )


def test_clone_in_context_is_golden() -> None:
    case = GOLDEN["clone_in_context"]
    recording = Recording(T, "Target words.", references=(Reference(R0, "Reference words."),))
    assert golden_turns(recording, "context") == (case["rendered"], case["supervised_spans"])


def test_clone_in_system_without_a_scene_is_golden() -> None:
    case = GOLDEN["clone_in_system"]
    recording = Recording(T, "Target words.", scene=None, references=(Reference(R0),))
    assert golden_turns(recording, "system") == (case["rendered"], case["supervised_spans"])


def test_two_speakers_are_golden() -> None:
    case = GOLDEN["two_speakers"]
    references = (Reference(R0, "First reference."), Reference(R1, "[SPEAKER1] Second reference."))
    assert conversation(Recording(T, TWO, references=references), "context")[1] == case["sample"]["start_index"] == 5
    assert golden_turns(Recording(T, TWO, references=references), "context")[0] == case["rendered"]


def test_references_in_the_system_message() -> None:
    old = Reference(None, description="old")
    references = (Reference(R0, "One."), Reference(R1, None, "SPEAKER3", "feminine"), old)
    messages, start_index = conversation(Recording(T, TWO, references=references), "system")
    head = "Generate audio following instruction.\n\n<|scene_desc_start|>\n" + SCENE + "\n\nSPEAKER0: "
    parts = (head, R0, "\nSPEAKER3: ", R1, "\nSPEAKER2: old\n<|scene_desc_end|>")
    assert messages == (Message("system", parts), Message("user", (TWO,)), Message("assistant", (T,)))
    assert start_index == 1


@pytest.mark.parametrize(
    ("references", "lines"),
    [
        ((), ""),
        ((Reference(R0, "One."), Reference(R1, "Two.")), ""),
        ((Reference(R0, "One.", None, "feminine"), Reference(R1, "Two.", "SPEAKER1")), "\n\nSPEAKER0: feminine"),
        (
            (Reference(None, description="feminine"), Reference(None, description="masculine")),
            "\n\nSPEAKER0: feminine\nSPEAKER1: masculine",
        ),
    ],
)
def test_several_speakers_without_clips(references: tuple[Reference, ...], lines: str) -> None:
    messages, start_index = conversation(Recording(T, TWO, references=references), "none")
    system = f"{SPEAKERS}\n\n<|scene_desc_start|>\n{SCENE}{lines}\n<|scene_desc_end|>"
    assert messages == (Message("system", (system,)), Message("user", (TWO,)), Message("assistant", (T,)))
    assert start_index == 1


def test_one_speaker_described() -> None:
    recording = Recording(T, "Hi.", scene=None, references=(Reference(None, description="old"),))
    messages, _ = conversation(recording, "system")
    text = "Generate audio following instruction.\n\n<|scene_desc_start|>\nSPEAKER0: old\n<|scene_desc_end|>"
    assert messages[0] == Message("system", (text,))


def test_no_scene_and_no_voice() -> None:
    assert conversation(Recording(T, "Hi.", scene=None), "context")[0][0] == Message(
        "system", ("Generate audio following instruction.",)
    )


def test_reference_without_a_transcript() -> None:
    with pytest.raises(ValueError, match="clip of SPEAKER0 has no transcript, which --reference context needs"):
        conversation(Recording(T, "Hi.", references=(Reference(R0),)), "context")


def test_joined() -> None:
    assert joined(("a", "b", R0, R1, "c", "d")) == ("ab", R0, R1, "cd")
    assert joined(()) == ()
