"""Whether the prompts of training samples tell their speakers apart, and what they say of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from higgs_ds.data.joined_index import AnyIndex, join
from higgs_ds.data.preparation import CheckedManifest
from higgs_ds.data.reference_choice import References, reference_problems
from higgs_ds.data.speaker_prompts import voice_in
from higgs_ds.options.fields import NO_SPEAKER_PROMPT, SPEAKER_DESCRIPTION, SPEAKER_REFERENCE, SPEAKER_TAG
from higgs_ds.options.train import DataOptions

NAMED = 5  # speakers that are named
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, to mix bits
TRIED = 8  # samples of a speaker that are searched for a description: those of dialogues have none


@dataclass(frozen=True)
class EqualPrompts:
    """Speakers with the prompt of another one: their samples with such prompts, by name, of how many with a name."""

    samples: dict[str, int]
    num_named: int

    def describe(self) -> str:
        names = [f"{name} ({count:,})" for name, count in list(self.samples.items())[:NAMED]]
        more = [f"{len(self.samples) - NAMED:,} more"] if len(self.samples) > NAMED else []
        return (
            f"{len(self.samples):,} speakers have the same prompts, in {sum(self.samples.values()):,} of "
            f"{self.num_named:,} samples, so that the model cannot learn whom to speak as: "
            f"{', '.join(names + more)}. Tell them apart with --speaker_prompt tag, description or reference, or "
            "train on one speaker"
        )


def check_prompts(options: DataOptions, checked: Sequence[CheckedManifest]) -> list[str]:
    """Return why the training samples cannot have the references or name the speakers as the options ask; or nothing.

    Args:
        checked: all manifests, those of the training samples first.
    """
    of_train = checked[: len(options.train_manifests)]
    indexes = [manifest.index for manifest in of_train if manifest.index is not None]
    if len(indexes) < len(of_train):
        return []
    index, problems = join(indexes), []
    if options.speaker_prompt in (SPEAKER_TAG, SPEAKER_DESCRIPTION) and not index.labels("speaker")[1]:
        problems = [
            f"--speaker_prompt {options.speaker_prompt}: no training sample names its speaker; remove the option"
        ]
    return reference_problems(options, index) + problems


def find_equal_prompts(index: AnyIndex, rows: np.ndarray, references: References | None) -> EqualPrompts | None:
    """Find speakers who have the same prompt as another speaker in some of these rows; None if there are none.

    References tell speakers apart, also random ones, which are not in the index.
    """
    numbers, names = index.labels("speaker")
    is_named = numbers[rows] >= 0
    if len(np.unique(numbers[rows][is_named])) < 2:
        return None
    is_compared = is_named if references is None else is_named & (references.in_epoch(None).rows < 0)
    compared = rows[is_compared]
    speakers, prompts = numbers[compared], index.prompts()[compared]
    # Each pair of a prompt and a speaker once, by a hash of both: prompts are hashes of as many bits themselves.
    mixed = prompts.astype(np.uint64) * MULTIPLIER + speakers.astype(np.uint64)
    _, first, num_samples = np.unique(mixed, return_index=True, return_counts=True)
    prompt_of_pair = np.unique(prompts[first], return_inverse=True)[1]
    is_equal = np.bincount(prompt_of_pair, minlength=1)[prompt_of_pair] > 1
    counts = np.zeros(len(names), np.int64)
    np.add.at(counts, speakers[first][is_equal], num_samples[is_equal])
    found = {names[number]: int(counts[number]) for number in np.argsort(-counts, kind="stable") if counts[number]}
    return EqualPrompts(found, int(is_named.sum())) if found else None


def trained_voices(index: AnyIndex, rows: np.ndarray, options: DataOptions) -> dict[str, str | None]:
    """Return what the prompts say of each speaker of some rows, or None where only a reference does.

    Of several descriptions, it is the first. Empty without --speaker_prompt.
    """
    if options.speaker_prompt == NO_SPEAKER_PROMPT:
        return {}
    numbers, names = index.labels("speaker")
    by_speaker = rows[np.argsort(numbers[rows], kind="stable")]
    bounds = np.searchsorted(numbers[by_speaker], np.arange(len(names) + 1))
    voices: dict[str, str | None] = {}
    for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
        if options.speaker_prompt == SPEAKER_REFERENCE and start < stop:
            voices[name] = None
            continue
        for row in by_speaker[start : min(stop, start + TRIED)].tolist():
            voices[name] = voices.get(name) or voice_in(index.sample(row, without_reference=True)[0])
    return dict(sorted(voices.items()))
