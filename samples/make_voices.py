"""Make the sample voices: three synthetic speakers by espeak-ng, 24 clips of 1 to 4 s, and their ChatML manifest.

Run it as `python samples/make_voices.py` where espeak-ng is installed; its output, in this folder, is committed.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

HERE = Path(__file__).resolve().parent
SYSTEM = (
    "Generate audio following instruction.\n\n"
    "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|>"
)
# Speaker: espeak voice, pitch 0 to 99, words per minute, sample rate in Hz of its files.
SPEAKERS = {
    "anna": ("en-gb+f3", 62, 150, 24000),
    "ben": ("en-us+m3", 35, 165, 22050),
    "carla": ("de+f2", 50, 155, 44100),
}
STEREO = "carla_03"
TEXTS = {
    "anna": [
        "Good morning.",
        "The kettle is on, would you like some tea?",
        "I left my umbrella on the train again.",
        "Seven small boats came back before the storm.",
        "Can you hear the birds outside?",
        "We walked along the river until it was dark.",
        "That was the best soup I have had all year.",
        "Please close the window, it is getting cold.",
    ],
    "ben": [
        "Turn left here.",
        "The next bus leaves in twelve minutes.",
        "She planted two apple trees behind the house.",
        "Nobody remembered where the spare key was.",
        "I will call you back after lunch.",
        "A quiet street is worth a longer walk home.",
        "The library opens at nine and closes at six.",
        "He counted the stairs twice and got it wrong.",
    ],
    "carla": [
        "Guten Abend.",
        "Der Zug nach Hamburg hat zehn Minuten Verspätung.",
        "Im Garten blühen die ersten Rosen.",
        "Kannst du mir bitte das Salz geben?",
        "Gestern haben wir lange am See gesessen.",
        "Das Museum ist montags geschlossen.",
        "Er hat drei Brote und ein Glas Honig gekauft.",
        "Morgen wird es wieder wärmer.",
    ],
}
CLONED_FROM = {6: 1, 7: 3}  # these clips of each speaker follow a reference clip of the same voice


def speak(text: str, voice: str, pitch: int, words_per_minute: int) -> tuple[np.ndarray, int]:
    """Return the mono float32 samples that espeak-ng generates, and their rate."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(words_per_minute), "-w", file.name, text]
        subprocess.run(command, check=True)
        return soundfile.read(file.name, dtype="float32")


def main() -> None:
    entries = []
    for speaker, (voice, pitch, speed, rate) in SPEAKERS.items():
        for i, text in enumerate(TEXTS[speaker]):
            samples, source_rate = speak(text, voice, pitch, speed)
            samples = torchaudio.functional.resample(torch.from_numpy(samples), source_rate, rate).numpy()
            name = f"{speaker}_{i:02d}"
            if name == STEREO:
                samples = np.stack([samples, 0.5 * samples], axis=1)
            soundfile.write(HERE / "voices" / f"{name}.flac", np.clip(0.7 * samples, -1, 1), rate, subtype="PCM_16")
            entries.append(entry(speaker, i))
    lines = [json.dumps(item, ensure_ascii=False) for item in entries]
    (HERE / "voices.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def entry(speaker: str, i: int) -> dict[str, object]:
    """Return one line of the manifest: a text and its speech, after a reference pair if the voice is to be cloned."""
    messages: list[dict[str, object]] = [{"role": "system", "content": SYSTEM}]
    for j in [CLONED_FROM[i], i] if i in CLONED_FROM else [i]:
        audio = {"type": "audio", "audio_url": f"voices/{speaker}_{j:02d}.flac"}
        messages += [{"role": "user", "content": TEXTS[speaker][j]}, {"role": "assistant", "content": audio}]
    return {"messages": messages, "start_index": len(messages) - 1, "speaker": speaker}


if __name__ == "__main__":
    main()
