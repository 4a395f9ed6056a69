"""`speakers.json` beside an adapter or a model: what the prompts said of each speaker that it was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import write_json
from higgs_ds.common.run_files import SPEAKERS_FILE
from higgs_ds.options.fields import NO_SPEAKER_PROMPT, SPEAKER_REFERENCE

IN_CARD = 20  # speakers that a card names


@dataclass(frozen=True)
class TrainedSpeakers:
    """The --speaker_prompt of a run, and the text after `SPEAKER0: ` by speaker; None if only a clip told who spoke.

    `path`: the file that it was read from.
    """

    prompt: str = NO_SPEAKER_PROMPT
    voices: Mapping[str, str | None] = field(default_factory=dict)
    path: Path | None = field(default=None, compare=False)

    def write(self, folder: Path) -> None:
        """Write the record, if there are speakers."""
        if self.voices:
            write_json(folder / SPEAKERS_FILE, {"speaker_prompt": self.prompt, "speakers": dict(self.voices)})

    def in_card(self) -> str:
        """Return the part of a model card that names the speakers; empty without any."""
        if not self.voices:
            return ""
        lines = [
            f"- `{name}`" + (f": {voice}" if voice not in (None, name) else "") for name, voice in self.voices.items()
        ]
        more = [f"- and {len(lines) - IN_CARD:,} more, in {SPEAKERS_FILE}"] if len(lines) > IN_CARD else []
        if self.prompt == SPEAKER_REFERENCE:
            how = (
                "Trained with another clip of the speaker as the reference; give one as `--ref_audio` and `--ref_text`:"
            )
        else:
            how = "`launch/generate.py --speaker NAME` speaks with the prompt that a speaker was trained with:"
        return "\n".join(["## Speakers", "", how, "", *lines[:IN_CARD], *more, "", ""])


NO_SPEAKERS = TrainedSpeakers()


def read_speakers(folder: Path) -> TrainedSpeakers:
    """Read the record in a folder; without one, there are no speakers. Raises InputError if it cannot be used."""
    path = folder / SPEAKERS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        voices = {str(name): None if voice is None else str(voice) for name, voice in values["speakers"].items()}
        return TrainedSpeakers(str(values["speaker_prompt"]), voices, path)
    except FileNotFoundError:
        return NO_SPEAKERS
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); delete it, or copy it again") from error
