"""Synthesize the corpus of the built-in base and its codec: strings of digits, spoken by four voices of espeak-ng.

    python pretraining/corpus.py outputs/corpus

Each word of a voice is one recording: spoken alone, trimmed, and padded to whole frames of the codec. A clip is a
sequence of words, so that every word starts at a frame boundary, in a steady rhythm. Each voice keeps one pitch, a
multiple of the codec's frame rate: a codec of this size loses the pitch of a voice whose periods do not fit into its
frames.
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

RATE, FRAME = 24000, 960  # of the codec, in Hz and in samples
WORDS = "zero one two three four five six seven eight nine".split()
WORDS_PER_MINUTE = 190
SYSTEM = (
    "Generate audio following instruction.\n\n"
    "<|scene_desc_start|>\nAudio is recorded from a quiet room.{voice}\n<|scene_desc_end|>"
)
AUDIBLE = 0.01  # share of a word's peak; quieter samples at its ends are trimmed
PEAK = 0.7


@dataclass(frozen=True)
class Voice:
    """An espeak-ng voice at one pitch, and the prompt text that selects it."""

    variant: str  # lines of a file in espeak-ng's voices/!v
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
    """Clips of one manifest: equally many per voice, each at a speed drawn from `speeds`."""

    name: str
    voices: tuple[str, ...]
    clips: int
    longest: int = 7  # digits; longer strings are cut
    with_reference: float = 0.0  # share of the samples with a reference clip of the voice and its text
    speeds: tuple[int, ...] = (WORDS_PER_MINUTE,)


# Held-out parts come first; none of their strings occurs in another part.
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
    parser.add_argument("--share", type=float, default=1.0, help="share of each part's clips; less for a quick try")
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    recordings = Recordings(options.output_dir)
    held_out: set[str] = set()
    for part in PARTS:
        clips = max(len(part.voices), int(part.clips * options.share))
        lines = list(
            tqdm(written(part, clips, recordings, rng, held_out), part.name, clips, disable=not sys.stderr.isatty())
        )
        (options.output_dir / f"{part.name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{part.name}: {clips} clips", flush=True)


def written(part: Part, clips: int, recordings: Recordings, rng: random.Random, held_out: set[str]) -> Iterator[str]:
    """Write a part's clips; yield a manifest line each. Skip strings in `held_out`; held-out parts add theirs."""
    folder = recordings.output_dir / part.name
    folder.mkdir(parents=True, exist_ok=True)
    last: dict[str, tuple[str, str]] = {}  # text and clip of each voice
    for number in range(clips):
        name = part.voices[number % len(part.voices)]
        text = drawn(rng, part.longest)
        while text in held_out:
            text = drawn(rng, part.longest)
        if part.name.endswith("held_out"):
            held_out.add(text)
        speed = rng.choice(part.speeds)
        path = folder / f"{number:05d}_{name}.flac"
        samples = np.concatenate([recordings.of(name, word, speed) for word in text.split()])
        soundfile.write(path, samples, RATE, subtype="PCM_16")
        referred = part.with_reference > 0 and name in last and rng.random() < part.with_reference
        turns = [last[name]] if referred else []
        last[name] = text, f"{part.name}/{path.name}"
        yield json.dumps(entry([*turns, last[name]], name)) + "\n"


def drawn(rng: random.Random, longest: int) -> str:
    """Return three to seven digits in words, at most `longest`."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(3, 7))]
    return " ".join(words[:longest])


def entry(turns: Sequence[tuple[str, str]], voice: str) -> dict[str, object]:
    """Return a ChatML sample: a system turn that selects the voice, then texts and clips; the last is learned."""
    messages: list[dict[str, object]] = [{"role": "system", "content": SYSTEM.format(voice=VOICES[voice].asked_by)}]
    for text, audio in turns:
        messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": {"type": "audio", "audio_url": audio}},
        ]
    return {"messages": messages, "start_index": len(messages) - 1, "speaker": voice}


class Recordings:
    """The words of each voice, spoken once per speed."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._of: dict[tuple[str, str, int], np.ndarray] = {}

    def of(self, voice: str, word: str, words_per_minute: int) -> np.ndarray:
        """Return the samples of a word, float32, whole frames."""
        key = voice, word, words_per_minute
        if key not in self._of:
            self._of[key] = framed(speak(word, VOICES[voice], words_per_minute))
        return self._of[key]


def framed(samples: np.ndarray) -> np.ndarray:
    """Return the first to the last audible sample, scaled to one peak and padded with silence to whole frames."""
    audible = np.flatnonzero(np.abs(samples) > AUDIBLE * np.abs(samples).max())
    samples = samples[audible[0] : audible[-1] + 1]
    return np.pad(samples * (PEAK / np.abs(samples).max()), (0, -len(samples) % FRAME)).astype(np.float32)


def speak(text: str, voice: Voice, words_per_minute: int) -> np.ndarray:
    """Return the text as spoken by espeak-ng, float32 samples at the codec's rate."""
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
    """Make a data folder for espeak-ng: links to the installed one, and a variant `this`."""
    installed = Path(
        subprocess.run(["espeak-ng", "--version"], check=True, capture_output=True, text=True)
        .stdout.rsplit("Data at: ", 1)[1]
        .strip()
    )
    variants = data / "voices" / "!v"
    variants.mkdir(parents=True)
    for path in [*installed.iterdir(), *(installed / "voices").iterdir()]:
        link = data / path.relative_to(installed)
        if not link.exists():
            link.symlink_to(path)
    pitch = voice.pitch_hz + 9  # as measured, the numbers in this line are 9 above the resulting pitch
    (variants / "this").write_text(
        f"language variant\nname this\n{voice.variant}\npitch {pitch} {pitch}\nroughness 0\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
