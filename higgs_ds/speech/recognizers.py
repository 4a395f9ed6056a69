"""Speech recognition: pocketsphinx with a closed vocabulary, or any of transformers' speech recognizers."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from higgs_ds.common.errors import InputError
from higgs_ds.speech.measures import words_of
from higgs_ds.speech.sound_checks import RATE, at_16_khz

POCKETSPHINX = "pocketsphinx"
# With pocketsphinx's default weights (6.5 and 0.65), words are inserted where a voice fades out.
LANGUAGE_WEIGHT, WORD_INSERTION_PENALTY = 10.0, 0.1
# pocketsphinx cannot handle the digital silence of synthetic voices: without noise it misses soft consonants.
PEAK, NOISE, MARGIN_S = 0.5, 0.001, 0.25
Transcriber = Callable[[torch.Tensor, int], str]  # a waveform (num_samples,) and its rate -> text


@dataclass(frozen=True)
class Recognizer:
    """A recognizer, and how texts become the words that are compared: those that were heard, and those to say.

    The texts of transformers' recognizers are normalized as those of Whisper (Radford et al. 2022, appendix C): English
    ones by rules that also write numbers in digits, others by lower case and the removal of symbols.
    """

    transcribe: Transcriber
    normalize: Callable[[str], str] | None = None
    normalize_english: Callable[[str], str] | None = None
    is_english: bool = False  # whether the model knows English only

    def __call__(self, waveform: torch.Tensor, sample_rate: int, language: str | None = None) -> list[str]:
        """Return the words of a waveform (num_samples,) in a language: a code or an English name, None if unknown."""
        return self.words_in(self.transcribe(waveform, sample_rate), language)

    def words_in(self, text: str, language: str | None = None) -> list[str]:
        """Return the words of a text."""
        if self.normalize is None or self.normalize_english is None:
            return words_of(text)
        is_english = self.is_english or bool(re.match(r"en(?![a-z])|english", (language or "").lower()))
        return (self.normalize_english if is_english else self.normalize)(text).split()


def check_recognizer(name: str | None) -> None:
    """Raise InputError if the recognizer's package is not installed, or transformers knows no model of this name."""
    if name is None:
        return
    if name == POCKETSPHINX:
        if importlib.util.find_spec(POCKETSPHINX) is None:
            raise InputError(f"--recognizer {name}: the package is not installed; pip install {name}")
        return
    from transformers import AutoConfig

    with _explained(name):
        AutoConfig.from_pretrained(name, trust_remote_code=False)


def open_recognizer(name: str, vocabulary: Sequence[str], device: torch.device | None = None) -> Recognizer:
    """Open pocketsphinx, which recognizes only words of the vocabulary, or a transformers model by folder or hub id.

    Args:
        device: of a transformers model; by default, a GPU if there is one.

    Raises:
        InputError: the model does not exist, or pocketsphinx does not know a word.
    """
    if name == POCKETSPHINX:
        return Recognizer(_open_pocketsphinx(vocabulary))
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    recognize = _load_pipeline(name, device)
    spelling = getattr(recognize.tokenizer, "english_spelling_normalizer", None) or {}
    generation = getattr(recognize.model, "generation_config", None)
    is_english = getattr(generation, "is_multilingual", None) is False
    normalizers = BasicTextNormalizer(), EnglishTextNormalizer(spelling)
    return Recognizer(_transcriber_of(recognize), *normalizers, is_english)


def open_transcriber(name: str, vocabulary: Sequence[str], language: str | None = None) -> Transcriber:
    """Open a recognizer as `open_recognizer` does, for texts with the case and punctuation that it writes.

    Args:
        language: for models of several languages (Whisper), which would otherwise detect it in each clip.
    """
    return _open_pocketsphinx(vocabulary) if name == POCKETSPHINX else _open_pipeline(name, language)


def _open_pocketsphinx(vocabulary: Sequence[str]) -> Transcriber:
    from pocketsphinx import Config, Decoder

    decoder = Decoder(
        Config(lm=None, samprate=RATE, cmn="batch", lw=LANGUAGE_WEIGHT, wip=WORD_INSERTION_PENALTY, loglevel="FATAL")
    )
    unknown = [word for word in vocabulary if decoder.lookup_word(word) is None]
    if unknown:
        raise InputError(
            f"--recognizer {POCKETSPHINX}: its English dictionary does not have {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}; give a transformers model"
        )
    decoder.add_jsgf_string("words", f"#JSGF V1.0;\ngrammar words;\npublic <words> = ( {' | '.join(vocabulary)} )+;\n")
    decoder.activate_search("words")

    def transcribe(waveform: torch.Tensor, sample_rate: int) -> str:
        samples = np.pad(at_16_khz(waveform, sample_rate).numpy(), int(MARGIN_S * RATE))
        samples *= PEAK / max(1e-6, float(np.abs(samples).max()))
        samples += np.random.default_rng(0).normal(0, NOISE, len(samples))
        decoder.reinit_feat()  # otherwise the result depends on earlier utterances
        decoder.start_utt()
        decoder.process_raw((samples * 32767).astype("<i2").tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return found.hypstr if found else ""

    return transcribe


def _load_pipeline(name: str, device: torch.device | None = None) -> Any:
    from transformers import pipeline

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _explained(name):
        return pipeline("automatic-speech-recognition", model=name, device=device, trust_remote_code=False)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Within the block, say of transformers' errors which option they are about."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(
            f"--recognizer {name}: is not a speech recognizer that transformers can load: {error}"
        ) from error


def _open_pipeline(name: str, language: str | None) -> Transcriber:
    recognize = _load_pipeline(name)
    # Models of one language refuse the argument, and those that do not generate have no such settings.
    known = getattr(getattr(recognize.model, "generation_config", None), "lang_to_id", None)
    if language and known and f"<|{language}|>" not in known:
        codes = ", ".join(sorted(token.strip("<|>") for token in known))
        raise InputError(f"--language {language}: is not a language of the recognizer {name}; it has {codes}")
    return _transcriber_of(recognize, {"generate_kwargs": {"language": language}} if language and known else {})


def _transcriber_of(recognize: Any, given: Mapping[str, Any] = MappingProxyType({})) -> Transcriber:
    """Return a transcriber of a pipeline, which gets some more arguments."""

    def transcribe(waveform: torch.Tensor, sample_rate: int) -> str:
        samples = at_16_khz(waveform, sample_rate).numpy()
        return recognize({"raw": samples, "sampling_rate": RATE}, **given)["text"].strip()

    return transcribe
