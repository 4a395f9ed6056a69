"""Speech recognition: pocketsphinx with a closed vocabulary, or any of transformers' speech recognizers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

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
Recognizer = Callable[[torch.Tensor, int], list[str]]  # ... -> words


def check_recognizer(name: str | None) -> None:
    """Raise InputError if the recognizer's package is not installed."""
    if name == POCKETSPHINX and importlib.util.find_spec(POCKETSPHINX) is None:
        raise InputError(f"--recognizer {name}: the package is not installed; pip install {name}")


def open_recognizer(name: str, vocabulary: Sequence[str]) -> Recognizer:
    """Open pocketsphinx, which recognizes only words of the vocabulary, or a transformers model by folder or hub id.

    Raises:
        InputError: the model does not exist, or pocketsphinx does not know a word.
    """
    transcribe = open_transcriber(name, vocabulary)
    return lambda waveform, sample_rate: words_of(transcribe(waveform, sample_rate))


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


def _open_pipeline(name: str, language: str | None) -> Transcriber:
    from transformers import pipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        recognize = pipeline("automatic-speech-recognition", model=name, device=device, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--recognizer {name}: is not a speech recognizer that transformers can load: {error}"
        ) from error

    # Models of one language refuse the argument, and those that do not generate have no such settings.
    known = getattr(getattr(recognize.model, "generation_config", None), "lang_to_id", None)
    if language and known and f"<|{language}|>" not in known:
        codes = ", ".join(sorted(token.strip("<|>") for token in known))
        raise InputError(f"--language {language}: is not a language of the recognizer {name}; it has {codes}")
    given = {"generate_kwargs": {"language": language}} if language and known else {}

    def transcribe(waveform: torch.Tensor, sample_rate: int) -> str:
        samples = at_16_khz(waveform, sample_rate).numpy()
        return recognize({"raw": samples, "sampling_rate": RATE}, **given)["text"].strip()

    return transcribe
