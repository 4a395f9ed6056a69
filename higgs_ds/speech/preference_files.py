"""The folder of preference pairs: settings, scored renderings, clips with their codes, and the pairs.

prefer.json        what the renderings depend on; a command that goes on must have the same
renderings.jsonl   every rendering with its score, written as they are made
clips/             a WAV file of each rendering and of each reference in a prompt
codes/             a `CodeCache` with the exact codes of these clips: encoding the sound would give other ones
pairs.jsonl        the pairs
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import saving, write_json, write_text
from higgs_ds.data.audio import examine, write_audio
from higgs_ds.data.code_cache import CachedCodes, CodeCache
from higgs_ds.model.sample import ASSISTANT, AudioClip, Message
from higgs_ds.speech.preference_scores import Measures, Rendering
from higgs_ds.speech.prompts import Prompt

SETTINGS_FILE, RENDERINGS_FILE, PAIRS_FILE = "prefer.json", "renderings.jsonl", "pairs.jsonl"
CLIPS = "clips"
Place = tuple[int, int]  # the number of a text, and of its rendering


class PreferenceFolder:
    """Reads and writes the files of a folder. Several ranks may store clips; rank 0 writes the rest."""

    def __init__(self, folder: Path, codec_digest: str, sample_rate: int) -> None:
        self.folder, self.sample_rate = folder, sample_rate
        self.cache = CodeCache(folder, codec_digest)

    def store_clip(self, name: str, waveform: torch.Tensor, codes: torch.Tensor) -> str:
        """Write a clip and its exact codes (C, F), measured as preparation does. Return the key. Raises SaveError.

        The key depends on the content of the file, whose header therefore names the codes: other codes may give the
        same sound, such as digital silence.
        """
        path = self.folder / name
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_audio(path, waveform, self.sample_rate, f"codes {_digest(codes)}")
        clip = AudioClip(path)
        quality = examine(clip, float("inf"), self.sample_rate, may_be_silent=True).quality
        key = self.cache.key(clip)
        self.cache.store(key, CachedCodes(codes, quality))
        return key

    def start(self, identity: Mapping[str, Any], described: Mapping[str, Any]) -> None:
        """Record the settings. Raises SaveError."""
        with saving(self.folder):
            write_json(self.folder / SETTINGS_FILE, {"identity": dict(identity), **described})

    def read_renderings(self) -> dict[Place, Rendering]:
        """Return the renderings of an interrupted command whose files are complete.

        A last line that was not written to its end is removed.
        """
        path = self.folder / RENDERINGS_FILE
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
        if lines[-1]:
            with saving(path):
                write_text(path, "".join(f"{line}\n" for line in lines[:-1]))
        try:
            found = [_rendering_of(json.loads(line)) for line in lines[:-1]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: is damaged ({error}); remove it, and all texts are spoken again") from error
        return {(one.prompt, one.rendering): one for one in found if self._is_complete(one)}

    def _is_complete(self, rendering: Rendering) -> bool:
        if rendering.wav is None or rendering.key is None:
            return True
        return (self.folder / rendering.wav).is_file() and self.cache.path(rendering.key).is_file()

    def append(self, renderings: Iterable[Rendering]) -> None:
        """Add renderings to the list. Raises SaveError."""
        path = self.folder / RENDERINGS_FILE
        with saving(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{_line_of(one)}\n" for one in renderings))

    def finish(
        self,
        renderings: Sequence[Rendering],
        pairs: Sequence[tuple[Rendering, Rendering]],
        prompts: Sequence[Prompt],
        decode: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Write the list of renderings in order, the references of the pairs, and the pairs. Raises SaveError."""
        lines = [json.dumps(self._pair(*pair, prompts[pair[0].prompt], decode), ensure_ascii=False) for pair in pairs]
        with saving(self.folder):
            write_text(self.folder / RENDERINGS_FILE, "".join(f"{_line_of(one)}\n" for one in renderings))
            write_text(self.folder / PAIRS_FILE, "".join(f"{line}\n" for line in lines))

    def _pair(
        self, chosen: Rendering, rejected: Rendering, prompt: Prompt, decode: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, Any]:
        urls = iter([self._reference(codes, decode) for codes in prompt.given])
        messages = [_message(message, urls) for message in prompt.sample.messages[: prompt.turn]]
        pair: dict[str, Any] = {"prompt": messages}
        for name, rendering in (("chosen", chosen), ("rejected", rejected)):
            pair[name] = [{"role": ASSISTANT, "content": _audio(rendering.wav or "")}]
        facts = {"speaker": prompt.sample.speaker, "language": prompt.sample.language}
        pair |= {name: value for name, value in facts.items() if value is not None}
        scores = {"chosen": _scores(chosen), "rejected": _scores(rejected)}
        margin = round(chosen.score - rejected.score, 6)
        return pair | {"scores": scores, "margin": margin, "source": chosen.source}

    def _reference(self, codes: torch.Tensor, decode: Callable[[torch.Tensor], torch.Tensor]) -> str:
        """Write a reference clip as the codec decodes it, with the codes that the model has heard; return its name."""
        name = f"{CLIPS}/reference-{_digest(codes)}.wav"
        self.store_clip(name, decode(codes), codes)
        return name


def folder_problems(folder: Path, identity: Mapping[str, Any]) -> list[str]:
    """Return why a folder cannot be written to or gone on with: other settings, another command's files, a review."""
    where, settings = f"--output_dir {folder}", folder / SETTINGS_FILE
    if not settings.is_file():
        foreign = [name for name in (RENDERINGS_FILE, PAIRS_FILE, CLIPS) if (folder / name).exists()]
        return [f"{where}: has {foreign[0]}, but no {SETTINGS_FILE}; choose another folder"] if foreign else []
    reviewed = folder / f"{PAIRS_FILE}.orig"
    if reviewed.exists():
        return [
            f"{where}: {PAIRS_FILE} was changed by a review, which would be lost; choose another folder, or remove "
            f"{reviewed}"
        ]
    try:
        earlier = json.loads(settings.read_text(encoding="utf-8"))["identity"]
        differing = [name for name in identity if name in earlier and earlier[name] != identity[name]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return [f"{settings}: cannot be read: {error}; choose another folder"]
    shown = [
        name if isinstance(identity[name], str) and len(identity[name]) == 64 else f"{name} {earlier[name]}"
        for name in differing
    ]
    return [f"{where}: was begun with other settings: {', '.join(shown)}; choose another folder"] if shown else []


def _digest(codes: torch.Tensor) -> str:
    return hashlib.sha256(codes.to(torch.int16).contiguous().numpy().tobytes()).hexdigest()[:16]


def _message(message: Message, urls: Iterable[str]) -> dict[str, Any]:
    names = iter(urls)
    parts = [{"type": "text", "text": part} if isinstance(part, str) else _audio(next(names)) for part in message.parts]
    content: Any = parts
    if len(parts) == 1:
        content = parts[0].get("text", parts[0])
    recipient = {"recipient": message.recipient} if message.recipient else {}
    return {"role": message.role, "content": content} | recipient


def _audio(name: str) -> dict[str, str]:
    return {"type": "audio", "audio_url": name}


def _scores(rendering: Rendering) -> dict[str, Any]:
    measured = {name: value for name, value in asdict(rendering.measures).items() if value is not None}
    return {"score": rendering.score} | measured


def _line_of(rendering: Rendering) -> str:
    return json.dumps(asdict(rendering), ensure_ascii=False)


def _rendering_of(values: dict[str, Any]) -> Rendering:
    return Rendering(**(values | {"measures": Measures(**values["measures"])}))
