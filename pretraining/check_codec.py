"""Measure what the codec loses: recognized words and the pitch of each voice, before and after the codec.

python pretraining/check_codec.py outputs/corpus outputs/codec/speaking-codec
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from codec import read
from corpus import RATE, WORDS

from higgs_ds.common.console import quiet_libraries
from higgs_ds.data.codec import Codec
from higgs_ds.speech.measures import median_pitch_hz, word_errors, words_of
from higgs_ds.speech.recognizers import POCKETSPHINX, open_recognizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("codec", type=Path)
    options = parser.parse_args(argv)
    quiet_libraries()
    manifest = options.corpus / "codec_held_out.jsonl"
    samples = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for title, rate, pitches in checked(read(manifest), samples, options.codec):
        pitch_text = ", ".join(f"{voice} {hz:.0f} Hz" for voice, hz in pitches.items())
        print(f"{title:<22} word error rate {rate:.3f}; {pitch_text}")


def checked(clips: list[torch.Tensor], samples: list[dict], folder: Path) -> list[tuple[str, float, dict[str, float]]]:
    """Return word error rate and median pitches in Hz: of the originals, of all codes, of the first codebook alone."""
    codec = Codec(folder, torch.device("cpu"))
    recognize = open_recognizer(POCKETSPHINX, WORDS)
    texts = [words_of(sample["messages"][1]["content"]) for sample in samples]
    codes = [codec.encode(clip) for clip in clips]
    results = []
    for title, sounds in (
        ("originals", clips),
        ("through the codec", [codec.decode(clip_codes) for clip_codes in codes]),
        ("first codebook alone", [codec.decode(clip_codes[:1]) for clip_codes in codes]),
    ):
        errors = sum(word_errors(text, recognize(sound, RATE)) for text, sound in zip(texts, sounds, strict=True))
        pitches: dict[str, list[float]] = {}
        for sample, sound in zip(samples, sounds, strict=True):
            pitches.setdefault(sample["speaker"], []).append(median_pitch_hz(sound, RATE))
        medians = {voice: float(torch.tensor(values).median()) for voice, values in pitches.items()}
        results.append((title, errors / sum(map(len, texts)), medians))
    return results


if __name__ == "__main__":
    main()
