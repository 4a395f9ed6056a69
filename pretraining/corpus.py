"""Synthesize what the built-in base and its codec learn from: strings of digits, spoken by four voices of espeak-ng.

    python pretraining/corpus.py outputs/corpus

Each word of a voice is one recording, said alone, trimmed and filled up to whole frames of the codec; a clip is words
one behind another. So every word begins with a frame, in a steady rhythm. Each voice keeps to one pitch, a multiple of
the codec's frame rate: of a voice whose periods do not fit into its frames, a codec of this size keeps no pitch.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

RATE, FRAME = 24000, 960  # Hz and samples, of the codec
WORDS = "zero one two three four five six seven eight nine".split()
WORDS_PER_MINUTE = 190
SYSTEM = (
    "Generate audio following instruction.\n\n"
    "<|scene_desc_start|>\nAudio is recorded from a quiet room.{voice}\n<|scene_desc_end|>"
)
AUDIBLE = 0.01  # of a word's peak: what is quieter at its ends is cut off
PEAK = 0.7


@dataclass(frozen=True)
class Voice:
    """A voice of espeak-ng on one pitch, and the words in the prompt that ask for it."""

    variant: str  # lines of a file of espeak-ng's voices/!v
    pitch_hz: int
    asked_by: str = ""


VOICES = {
    "emil": Voice("klatt 1", 100),
    "dora": Voice("klatt 5", 200, "\n\nSPEAKER0: feminine"),
    "finn": Voice("klatt 4", 150),
    "gina": Voice("formant 0 100 85 130\nformant 1 90 85 130 40\nformant 2 80 85 130 310", 125),
}


@dataclass(frozen=True)
class Part:
    """Clips of one manifest: equally many of each voice, each of a speed drawn from those given."""

    name: str
    voices: tuple[str, ...]
    clips: int
    longest: int = 7  # digits; longer strings are cut
    with_reference: float = 0.0  # share of the samples that show a clip of the voice, and its words, beforehand
    speeds: tuple[int, ...] = (WORDS_PER_MINUTE,)


# Those held out come first, and no string of theirs is said in any other part.
PARTS = [
    Part("codec_held_out", ("emil", "dora", "finn", "gina"), 100),
    Part("base_held_out", ("emil", "dora"), 200, longest=5),
    Part("new_voice_held_out", ("finn",), 100, longest=5),
    Part("codec_train", ("emil", "dora", "finn", "gina"), 1000, speeds=(170, 190, 210)),
    Part("base_train", ("emil", "dora"), 10000, longest=5, with_reference=0.2),
    Part("new_voice_train", ("finn",), 300, longest=5),
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the clips of each part, for a quick try")
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    recordings = Recordings(options.output_dir)
    taken: set[str] = set()
    for part in PARTS:
        clips = max(len(part.voices), int(part.clips * options.share))
        lines = list(
            tqdm(written(part, clips, recordings, rng, taken), part.name, clips, disable=not sys.stderr.isatty())
        )
        (options.output_dir / f"{part.name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{part.name}: {clips} clips", flush=True)


def written(part: Part, clips: int, recordings: Recordings, rng: random.Random, taken: set[str]) -> Iterator[str]:
    """Write the clips of a part; yields a line of its manifest each. Strings in `taken` are not said, and added to."""
    folder = recordings.output_dir / part.name
    folder.mkdir(parents=True, exist_ok=True)
    said: dict[str, tuple[str, str]] = {}  # by each voice, last
    for number in range(clips):
        name = part.voices[number % len(part.voices)]
        text = drawn(rng, part.longest)
        while text in taken:
            text = drawn(rng, part.longest)
        if part.name.endswith("held_out"):
            taken.add(text)
        speed = rng.choice(part.speeds)
        path = folder / f"{number:05d}_{name}.flac"
        samples = np.concatenate([recordings.of(name, word, speed) for word in text.split()])
        soundfile.write(path, samples, RATE, subtype="PCM_16")
        referred = part.with_reference > 0 and name in said and rng.random() < part.with_reference
        turns = [said[name]] if referred else []
        said[name] = text, f"{part.name}/{path.name}"
        yield json.dumps(entry([*turns, said[name]], name)) + "\n"


def drawn(rng: random.Random, longest: int) -> str:
    """Three to seven digits in words, but not more than `longest`."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(3, 7))]
    return " ".join(words[:longest])


def entry(turns: Sequence[tuple[str, str]], voice: str) -> dict[str, object]:
    """A sample in ChatML: the system turn that asks for the voice, words and clip of each turn; the last is learned."""
    messages: list[dict[str, object]] = [{"role": "system", "content": SYSTEM.format(voice=VOICES[voice].asked_by)}]
    for text, audio in turns:
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": {"type": "audio", "audio_url": audio}},
        ]
    return {"messages": messages, "start_index": len(messages) - 1, "speaker": voice}


class Recordings:
    """Words of each voice, spoken once at each speed."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._of: dict[tuple[str, str, int], np.ndarray] = {}

    def of(self, voice: str, word: str, words_per_minute: int) -> np.ndarray:
        """Samples of a word, float32, of whole frames."""
        key = voice, word, words_per_minute
        if key not in self._of:
            self._of[key] = framed(speak(word, VOICES[voice], words_per_minute))
        return self._of[key]


def framed(samples: np.ndarray) -> np.ndarray:
    """From the first to the last that can be heard, at one loudness, filled up with silence to whole frames."""
    audible = np.flatnonzero(np.abs(samples) > AUDIBLE * np.abs(samples).max())
    samples = samples[audible[0] : audible[-1] + 1]
    return np.pad(samples * (PEAK / np.abs(samples).max()), (0, -len(samples) % FRAME)).astype(np.float32)


def speak(text: str, voice: Voice, words_per_minute: int) -> np.ndarray:
    """What espeak-ng says, float32 samples at the codec's rate."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        _with_variant(home / "espeak-ng-data", voice)
        wav = home / "speech.wav"
        subprocess.run(
            ["espeak-ng", f"--path={home}", "-v", "en-us+this", "-s", str(words_per_minute), "-w", str(wav), text],
            check=True,
        )
        samples, rate = soundfile.read(wav, dtype="float32")
    return torchaudio.functional.resample(torch.from_numpy(samples), rate, RATE).numpy()


def _with_variant(data: Path, voice: Voice) -> None:
    """A data folder of espeak-ng that is the installed one, and has a variant `this`."""
    installed = Path(
        subprocess.run(["espeak-ng", "--version"], check=True, capture_output=True, text=True)
        .stdout.rsplit("Data at: ", 1)[1]
        .strip()
    )
    variants = data / "voices" / "!v"
    variants.mkdir(parents=True)
    for path in [*installed.iterdir(), *(installed / "voices").iterdir()]:
        place = data / path.relative_to(installed)
        if not place.exists():
            place.symlink_to(path)
    pitch = voice.pitch_hz + 9  # as measured, this line's numbers lie 9 above what is heard
    (variants / "this").write_text(
        f"language variant\nname this\n{voice.variant}\npitch {pitch} {pitch}\nroughness 0\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
