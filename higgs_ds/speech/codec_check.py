"""Compare a few recordings with themselves through the codec: what it does not code, no training can teach.

Torch and the codec are imported only if a comparison is not in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from higgs_ds.bases.builtin import RANDOM_BASE, which_builtin
from higgs_ds.common import distributed
from higgs_ds.common.console import warn
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import release_freed_memory, saving, write_json
from higgs_ds.common.hub import RELEASED_BASE
from higgs_ds.data.audio import AudioError, read_audio
from higgs_ds.data.coder import Coder
from higgs_ds.data.formats.reader import pending_entries
from higgs_ds.data.index import Index
from higgs_ds.data.preparation import CheckedManifest, Preparation
from higgs_ds.model.sample import AudioClip, Sample
from higgs_ds.options.train import ModelOptions

if TYPE_CHECKING:
    import torch

# Measured with `spectral_similarity`: the built-in codec gives 0.97 to 0.99 for its own voices, and -0.07 to 0.34 for
# human voices and other synthetic ones; a codec of random weights about 0. Telephone speech (GSM 6.10) has 0.93 to
# 0.95, speech of 40 mel bands without phases 0.85 to 0.93, the whisper of a noise vocoder with 16 bands 0.50 to 0.83.
UNLIKE = 0.5
SHORTEST_S, LONGEST_S = 0.5, 6.0  # of a clip that is compared; of a longer one, its middle
SEED, ROWS_PER_CLIP = 42, 20  # rows of which one with a clip to compare is searched
TITLE = "clips and what the codec makes of them"
VERSION = 1  # of the results in the cache


@dataclass(frozen=True)
class Comparison:
    """The clips of one manifest that were compared: where they are from, and how similar each has stayed.

    words_wrong: word error rates of the recordings and of what the codec makes of them, where that was measured.
    """

    manifest: Path
    sources: list[str]
    similarities: list[float]
    words_wrong: list[float] | None = None

    @property
    def unlike(self) -> list[str]:
        """The clips that come back unlike themselves, each with its similarity."""
        pairs = zip(self.sources, self.similarities, strict=True)
        return [f"{source} {similarity:.2f}" for source, similarity in pairs if similarity < UNLIKE]

    def describe(self) -> str:
        values = self.similarities
        if not values:
            return f"no clip of {SHORTEST_S:g} s or more to compare"
        unlike = f", {len(self.unlike)} below {UNLIKE:g}: unlike" if self.unlike else ""
        return (
            f"{len(values)} compared, similarity {min(values):.2f} to {max(values):.2f}, median "
            f"{median(values):.2f}{unlike}"
        )

    def warning(self, base: str, is_builtin: bool) -> str:
        words = ""
        if self.words_wrong is not None:
            before, after = (round(100 * rate) for rate in self.words_wrong)
            words = f" Of their words, pocketsphinx gets {before} % wrong as recorded, {after} % through the codec."
        advice = (
            f"this codec knows only the voices of the built-in base; give --base_ckpt {RELEASED_BASE}"
            if is_builtin
            else "listen to these clips, which may be noise or music, and check that the codec is the base's own "
            "(--codec_ckpt)"
        )
        return (
            f"warning: {self.manifest}: {len(self.unlike)} of {len(self.sources)} clips come back unlike themselves "
            f"from the codec of {base} (similarity below {UNLIKE:g}; 1 is the same, 0 unrelated): "
            f"{', '.join(self.unlike)}.{words} Speech that the codec cannot code cannot be learned: {advice}"
        )


def check_codec(
    preparation: Preparation, checked: Sequence[CheckedManifest], model: ModelOptions, num_clips: int, keep: bool = True
) -> str:
    """Compare clips of training manifests with themselves through the codec, and warn where they come back unlike.

    Only rank 0 needs to call this.

    Args:
        num_clips: of all manifests together, but at least one of each; 0 compares none.
        keep: whether results are kept in the cache, where those of earlier runs are found.

    Returns:
        Lines for the data's summary.
    """
    built_in = which_builtin(model.base_ckpt)
    is_builtin = built_in is not None and model.codec_ckpt is None
    if num_clips == 0:
        return f"{TITLE}: no clip was compared (--flag_codec_clips 0)\n"
    if is_builtin and built_in == RANDOM_BASE:
        return f"{TITLE}: no clip was compared, because the codec's weights are random\n"
    lines = [f"{TITLE}:"]
    for manifest in checked:
        found = _compare_cached(preparation, manifest, -(-num_clips // len(checked)), keep)
        lines.append(f"  {manifest.path}: {found.describe()}")
        if found.unlike:
            warn(found.warning(str(model.codec_ckpt or built_in or model.base_ckpt), is_builtin))
    return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True)
class _Chosen:
    """A clip that is to be spoken."""

    number: int  # of its sample in the manifest
    source: str
    turn: int  # of the sample's messages
    text: str  # of the turn before, which the clip speaks
    key: str  # of its codes


def _compare_cached(preparation: Preparation, checked: CheckedManifest, count: int, keep: bool) -> Comparison:
    assert checked.index is not None
    assert preparation.coder is not None
    chosen = _choose(checked.index, preparation.coder, count)
    content = json.dumps([VERSION, LONGEST_S, *((one.key, one.text) for one in chosen)])
    kept = preparation.cache_dir / "codec_checks" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"
    values: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(kept.read_text(encoding="utf-8"))
    if values is None:
        values = _compare(preparation, checked.path, chosen) if chosen else {"similarities": []}
        if keep:
            with saving(kept):
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept, values)
    return Comparison(checked.path, [one.source for one in chosen], **values)


def _choose(index: Index, coder: Coder, count: int) -> list[_Chosen]:
    """Choose clips that are to be spoken from rows of an index, the same in each run."""
    codec, chosen = coder.codec, []
    rows = np.random.default_rng(SEED).permutation(len(index))[: count * ROWS_PER_CLIP]
    for row in rows.tolist():
        sample, clips = index.sample(row)
        turns = [turn for turn, message in enumerate(sample.messages) if sample.is_target(turn) and message.clips]
        if not turns:
            continue
        clip = clips[sum(len(message.clips) for message in sample.messages[: turns[0]])]
        if clip.num_frames * codec.hop_length >= SHORTEST_S * codec.sample_rate:
            text = " ".join(part for part in sample.messages[turns[0] - 1].parts if isinstance(part, str))
            chosen.append(_Chosen(index.number(row), sample.source, turns[0], text, clip.key))
        if len(chosen) == count:
            break
    return chosen


def _compare(preparation: Preparation, path: Path, chosen: Sequence[_Chosen]) -> dict[str, Any]:
    """Encode and decode the chosen clips; return the fields of `Comparison` that are measured."""
    from higgs_ds.data.codec import Codec
    from higgs_ds.speech.measures import spectral_similarity

    assert preparation.coder is not None
    samples = dict(_samples_at(preparation, path, {one.number for one in chosen}))
    release_freed_memory()  # that of a large folder's listing
    codec = Codec(preparation.coder.codec.folder, distributed.device())
    similarities, spoken = [], []
    for one in chosen:
        recording = _read(samples[one.number].messages[one.turn].clips[0], codec.sample_rate)
        middle = _middle(recording, round(LONGEST_S * codec.sample_rate))
        decoded = codec.decode(codec.encode(middle))
        similarities.append(spectral_similarity(decoded, middle, codec.sample_rate))
        if len(middle) == len(recording):
            spoken.append((one.text, middle, decoded))
    is_unlike = min(similarities) < UNLIKE
    return {"similarities": similarities, "words_wrong": _words_wrong(spoken, codec.sample_rate) if is_unlike else None}


def _read(clip: AudioClip, sample_rate: int) -> torch.Tensor:
    try:
        return read_audio(clip, sample_rate)
    except AudioError as error:
        raise InputError(f"{clip.path}: has changed since it was checked: {error}") from error


def _middle(waveform: torch.Tensor, length: int) -> torch.Tensor:
    start = max(0, len(waveform) - length) // 2
    return waveform[start : start + length]


def _words_wrong(spoken: Sequence[tuple[str, torch.Tensor, torch.Tensor]], sample_rate: int) -> list[float] | None:
    """Return the word error rates of recordings and of what the codec makes of them; None if they cannot be measured.

    That is so without pocketsphinx, and for texts with words that are not in its English dictionary.

    Args:
        spoken: texts, recordings and decoded recordings.
    """
    from higgs_ds.speech.measures import word_errors, words_of
    from higgs_ds.speech.recognizers import POCKETSPHINX, open_recognizer

    texts = [words_of(text) for text, _, _ in spoken]
    vocabulary = sorted({word for words in texts for word in words})
    if not vocabulary or importlib.util.find_spec(POCKETSPHINX) is None:
        return None
    try:
        recognize = open_recognizer(POCKETSPHINX, vocabulary)
    except InputError:  # unknown words
        return None
    errors = [
        [word_errors(words, recognize(sound, sample_rate)) for sound in sounds]
        for words, (_, *sounds) in zip(texts, spoken, strict=True)
    ]
    return [sum(of_kind) / sum(map(len, texts)) for of_kind in zip(*errors, strict=True)]


def _samples_at(preparation: Preparation, path: Path, numbers: set[int]) -> Iterator[tuple[int, Sample]]:
    """Read the samples with these numbers from a manifest whose good samples they are."""
    remaining = len(numbers)
    for number, pending in enumerate(pending_entries(path, preparation.options)):
        if number in numbers:
            sample = preparation.checker.entry(pending).sample
            if sample is None:
                raise InputError(f"{path}: has changed since it was checked")
            yield number, sample
            remaining -= 1
        if not remaining:
            return
    raise InputError(f"{path}: has changed since it was checked")
