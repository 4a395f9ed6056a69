"""The measures that need a model of their own: the voice, the sound and the words of a clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from higgs_ds.common.errors import InputError, collect_problems
from higgs_ds.options.fields import DNSMOS, SIMILARITY
from higgs_ds.speech.dnsmos import check_dnsmos, rate
from higgs_ds.speech.recognizers import Recognizer, check_recognizer, open_recognizer
from higgs_ds.speech.sound_checks import why_not_measurable
from higgs_ds.speech.speaker_similarity import Encoder, open_speaker_encoder, similarity


@dataclass(frozen=True)
class Heard:
    """What was measured in a clip. NaN and None: not asked for, or not measurable, for which `reason` says why.

    `voice`: the speaker embedding, float32 (D,), of length 1.
    """

    reason: str | None = None
    words: list[str] | None = None
    voice: torch.Tensor | None = None
    mos: float = math.nan
    mos_voice: float = math.nan
    mos_background: float = math.nan
    mos_p808: float = math.nan


@dataclass(frozen=True)
class Scorer:
    """The models that clips are measured with."""

    recognize: Recognizer | None = None
    encode: Encoder | None = None
    rates: bool = False

    def words_in(self, text: str, language: str | None) -> list[str] | None:
        """Return the words to say, as they are compared with those that are heard; None without a recognizer."""
        return self.recognize.words_in(text, language) if self.recognize else None

    def hear(self, waveform: torch.Tensor, sample_rate: int, language: str | None = None) -> Heard:
        """Measure a mono waveform (num_samples,); in silence there are no words, no voice and no rating.

        Args:
            language: of the words, if it is known.
        """
        reason = why_not_measurable(waveform, sample_rate) if len(waveform) else "no frame"
        if reason is not None:
            return Heard(reason, [] if self.recognize else None)
        words = self.recognize(waveform, sample_rate, language) if self.recognize else None
        voice = self.encode(waveform, sample_rate) if self.encode else None
        if not self.rates:
            return Heard(None, words, voice)
        mos = rate(waveform, sample_rate)
        return Heard(None, words, voice, mos.overall, mos.voice, mos.background, mos.p808)


@dataclass(frozen=True)
class Scoring:
    """Which measures are asked for, before any model is loaded."""

    measures: Sequence[str] = ()
    recognizer: str | None = None
    speaker_model: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def check(self) -> Encoder | None:
        """Return the model of the similarity, if it is asked for. Raises InputError if that or a package is missing."""
        problems: list[str] = []
        encoder = None
        collect_problems(problems, lambda: check_recognizer(self.recognizer))
        if SIMILARITY in self.measures:
            encoder = collect_problems(problems, lambda: open_speaker_encoder(self.speaker_model, self.device))
        if DNSMOS in self.measures:
            collect_problems(problems, check_dnsmos)
        if problems:
            raise InputError(problems)
        return encoder

    def open(self, vocabulary: Sequence[str], encoder: Encoder | None) -> Scorer:
        """Load the recognizer. The vocabulary is what pocketsphinx recognizes. Raises InputError.

        Args:
            encoder: what `check` has returned.
        """
        recognize = open_recognizer(self.recognizer, vocabulary, self.device) if self.recognizer else None
        return Scorer(recognize, encoder, DNSMOS in self.measures)


def voice_similarities(
    spoken: Sequence[torch.Tensor | None], references: Sequence[torch.Tensor | None], speakers: Sequence[str | None]
) -> tuple[list[float], list[float]]:
    """Return the similarity of each item's voice to its reference's, and to those of the speaker's other references.

    The second is the mean over these references. NaN where there is no voice, or no other reference.
    """
    to_own, to_others = [], []
    for number, voice in enumerate(spoken):
        found = {
            other: similarity(voice, reference)
            for other, reference in enumerate(references)
            if voice is not None
            and reference is not None
            and (other == number or (speakers[other] == speakers[number] and speakers[number] is not None))
        }
        to_own.append(found.pop(number, math.nan))
        to_others.append(sum(found.values()) / len(found) if found else math.nan)
    return to_own, to_others
