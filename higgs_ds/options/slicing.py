"""The options of launch/slice.py, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from higgs_ds.options.fields import REQUIRED, option

CLIP_FORMATS = FLAC, WAV = ("flac", "wav")
POCKETSPHINX = "pocketsphinx"


@dataclass(frozen=True)
class SliceOptions:
    """Slicing"""

    recordings: tuple[Path, ...] = option(
        REQUIRED,
        "long recordings: any format that soundfile reads; with FFmpeg on PATH also videos and others",
        metavar="RECORDING",
        positional=True,
    )
    output_dir: Path = option(REQUIRED, "new folder for the clips and metadata.jsonl", metavar="DIR")
    subtitles: tuple[Path, ...] | None = option(
        None,
        "subtitles of each recording, in the same order, or one folder with files of the recordings' names: SRT, "
        "VTT, JSON of Whisper or WhisperX, labels of Audacity (.txt), TextGrid (default: cut by voice activity)",
        metavar="PATH",
    )
    tiers: tuple[str, ...] | None = option(
        None,
        "tiers of a TextGrid to read; their names are the speakers (default: all, without those of words and phones "
        "if there are others)",
        metavar="NAME",
    )
    recognizer: str | None = option(
        None,
        "without subtitles: transcribe the clips with this speech recognizer of transformers, a folder or a hub id; "
        "or pocketsphinx, limited to --vocabulary",
        metavar="RECOGNIZER",
    )
    vocabulary: tuple[str, ...] | None = option(
        None, "the words that pocketsphinx may recognize (English)", metavar="WORD"
    )
    language: str | None = option(
        None, "language of the recordings, such as en: given to the recognizer and written to metadata.jsonl"
    )
    speaker: str | None = option(None, "the only speaker of the recordings; replaces those that subtitles name")
    min_clip_s: float = option(2.0, "shortest clip, in seconds; shorter subtitles are joined")
    max_clip_s: float = option(20.0, "longest clip, in seconds")
    min_pause_s: float = option(0.2, "shortest pause to cut in, in seconds")
    split_pause_s: float = option(0.7, "pause that separates clips if they are then long enough, in seconds")
    max_pause_s: float = option(2.0, "longest pause within a clip, in seconds")
    edge_silence_s: float = option(0.2, "silence that is kept at both ends of a clip, at most, in seconds")
    max_shift_s: float = option(0.5, "how far a cut may be from the time in the subtitles, in seconds")
    loudness: float | None = option(
        None, "integrated loudness of each clip, in LUFS (ITU-R BS.1770), such as -23 (default: unchanged)"
    )
    clip_format: str = option(FLAC, "format of the clips, with 16 bits and the recording's sample rate", CLIP_FORMATS)


def check_slice_options(options: SliceOptions) -> list[str]:
    """Return the problems of the options' values and of their combinations; empty if there are none."""
    problems = []

    def expect(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            problems.append(f"--{name} {getattr(options, name)}: must be {allowed}")

    for name in ("split_pause_s", "max_pause_s", "edge_silence_s", "max_shift_s"):
        expect(name, 0 <= getattr(options, name) < math.inf, "0 or more, in seconds")
    expect("min_pause_s", 0.1 <= options.min_pause_s < math.inf, "0.1 or more, in seconds: words have shorter pauses")
    expect("min_clip_s", 0.5 <= options.min_clip_s < math.inf, "0.5 or more, in seconds")
    expect("max_clip_s", options.min_clip_s < options.max_clip_s < math.inf, "above --min_clip_s")
    expect("loudness", options.loudness is None or -70 < options.loudness <= 0, "above -70, up to 0, in LUFS")
    if options.subtitles is None and options.recognizer is None:
        problems.append("--subtitles or --recognizer must be given: one of them is where the clips' texts come from")
    if options.subtitles is not None and options.recognizer is not None:
        problems.append(f"--recognizer {options.recognizer}: with --subtitles, the texts are theirs; give one of both")
    if options.recognizer == POCKETSPHINX and not options.vocabulary:
        problems.append("--recognizer pocketsphinx: needs --vocabulary, the words that it may recognize")
    if options.vocabulary and options.recognizer != POCKETSPHINX:
        problems.append("--vocabulary: only applies to --recognizer pocketsphinx")
    return problems
