"""Make the clips from which the built-in base learns a new voice: digits, by a voice that it was not trained on.

    python pretraining/corpus.py outputs/corpus
    python samples/make_digits.py outputs/corpus

Its output, in this folder, is committed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLIPS = {"digits": ("new_voice_train", 72), "digits_held_out": ("new_voice_held_out", 24)}


def balanced(entries: list[dict], count: int) -> list[dict]:
    """Choose clips in which all pairs of adjacent words are about equally frequent, as in recordings for synthesis."""
    counts: Counter[tuple[str, str]] = Counter()

    def gain(entry: dict) -> float:
        return sum(1 / (1 + counts[pair]) ** 2 for pair in set(pairs(entry)))

    chosen: list[dict] = []
    left = list(entries)
    while len(chosen) < count:
        best = max(left, key=gain)
        left.remove(best)
        chosen.append(best)
        counts.update(pairs(best))
    return chosen


def pairs(entry: dict) -> list[tuple[str, str]]:
    words = ["", *entry["messages"][1]["content"].split(), ""]
    return list(pairwise(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    options = parser.parse_args()
    for name, (part, count) in CLIPS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        lines = (options.corpus / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        entries = (
            balanced([json.loads(line) for line in lines], count)
            if name == "digits"
            else [json.loads(line) for line in lines[:count]]
        )
        for number, entry in enumerate(entries):
            audio = entry["messages"][-1]["content"]
            source = options.corpus / audio["audio_url"]
            audio["audio_url"] = f"{name}/{entry['speaker']}_{number:02d}.flac"
            shutil.copy(source, HERE / audio["audio_url"])
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
