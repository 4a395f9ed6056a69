"""The voices of a prompt: reference clips, or speakers that a model was trained with; and a text's tags for them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from higgs_ds.adapters.speakers import TrainedSpeakers
from higgs_ds.common.errors import InputError
from higgs_ds.data.audio import AudioError, examine
from higgs_ds.data.references import SPEAKER_TAG
from higgs_ds.data.templates import CONTEXT, Recording, Reference, conversation
from higgs_ds.model.sample import AudioClip, Message
from higgs_ds.options.commands import GenerateOptions
from higgs_ds.options.fields import SPEAKER_DESCRIPTION, SPEAKER_REFERENCE
from higgs_ds.options.train import DataOptions

MAX_REFERENCE_S = 60.0  # longer references are refused before they are decoded
SHOWN = 10  # speakers that a message names


def voices_of(options: GenerateOptions, trained: TrainedSpeakers) -> tuple[Reference, ...]:
    """Return the voices that the options ask for. Raises InputError for speakers that the model does not know."""
    if options.speaker is None:
        pairs = zip(options.ref_audio or (), options.ref_text or (), strict=True)
        return tuple(Reference(AudioClip(path), text) for path, text in pairs)
    problems = [problem for name in options.speaker if (problem := _unknown(name, trained))]
    if problems:
        raise InputError(problems)
    return tuple(Reference(None, description=trained.voices[name]) for name in options.speaker)


def _unknown(name: str, trained: TrainedSpeakers) -> str:
    """Return why the model cannot be asked for a speaker."""
    where = f"--speaker {name}"
    if not trained.voices:
        return (
            f"{where}: the model has no record of its speakers, which --speaker_prompt makes in training; leave the "
            "option out, or clone a voice with --ref_audio and --ref_text"
        )
    if trained.prompt == SPEAKER_REFERENCE:
        return (
            f"{where}: the model was trained with reference clips of its speakers (--speaker_prompt "
            f"{SPEAKER_REFERENCE}); give one as --ref_audio, and its words as --ref_text"
        )
    if trained.voices.get(name):
        return ""
    if name in trained.voices:
        return f"{where}: only reference clips told who spoke; give one as --ref_audio, and its words as --ref_text"
    near = difflib.get_close_matches(name, trained.voices, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"{where}: is not a speaker of the model; {meant}it knows {name_some(trained.voices)}"


def name_some(names: Collection[str]) -> str:
    """Return the first of these names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(list(names)[:SHOWN]) + more


def with_trained_prompts(data: DataOptions, trained: TrainedSpeakers) -> DataOptions:
    """Return the options with which samples have the prompts that a model was trained with."""
    if not trained.voices:
        return data
    described = trained.path if trained.prompt == SPEAKER_DESCRIPTION else None
    return replace(data, speaker_prompt=trained.prompt, speaker_descriptions=described)


def tag_problems(texts: Mapping[Path, str], num_voices: int) -> list[str]:
    """Return why the speaker tags in texts do not fit the voices; empty if they do. Without voices, any tags do."""
    problems = []
    for text in filter(None, texts.values()):
        where = f"the text {text[:40]!r}{'...' * (len(text) > 40)}"
        numbers = {int(re.sub(r"\D", "", tag)) for tag in SPEAKER_TAG.findall(text)}
        if not SPEAKER_TAG.sub("", text).strip():
            problems.append(f"{where}: has no words")
        elif num_voices > 1 and not SPEAKER_TAG.match(text):
            problems.append(
                f"{where}: must begin with a tag that says which of the {num_voices} voices speaks: [SPEAKER0]"
            )
        elif num_voices and any(number >= num_voices for number in numbers):
            problems.append(
                f"{where}: has the tag [SPEAKER{max(numbers)}], but there is no voice for it: {num_voices} given, the "
                "first of which is [SPEAKER0]"
            )
    return problems


def prompt_of(text: str, voices: tuple[Reference, ...], scene: str) -> list[Message]:
    """Return the messages for a text to speak, as a recording of these voices has them in training."""
    recording = Recording(AudioClip(Path()), text, scene=scene or None, references=voices)
    messages, _ = conversation(recording, CONTEXT)
    return list(messages[:-1])


def clip_problems(
    options: GenerateOptions, outputs: Mapping[Path, str], sample_rate: int, hop_length: int
) -> list[str]:
    """Return why reference clips cannot be used, or would be overwritten."""
    problems = []
    for path in options.ref_audio or ():
        try:
            facts = examine(AudioClip(path), MAX_REFERENCE_S, sample_rate)
            if facts.num_samples(sample_rate) < hop_length:
                problems.append(f"--ref_audio {path}: is shorter than one frame of the codec")
            if any(output.exists() and output.samefile(path) for output in outputs):
                problems.append(f"--output {options.output}: is --ref_audio {path}, which it would overwrite")
        except (AudioError, OSError) as error:
            problems.append(f"--ref_audio {path}: {error}")
    return problems
