"""The options that tell speakers apart in the prompts: their checks, and the file of descriptions."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from higgs_ds.common.errors import InputError
from higgs_ds.options.fields import RANDOM_REFERENCE, SPEAKER_DESCRIPTION, SPEAKER_REFERENCE
from higgs_ds.options.train import DataOptions

OPTION = "--speaker_descriptions"


def check_speaker_options(options: DataOptions) -> list[str]:
    """Return the problems of --speaker_prompt and --speaker_descriptions; empty if there are none."""
    problems = []
    if options.speaker_prompt == SPEAKER_REFERENCE and options.reference not in ("context", RANDOM_REFERENCE):
        problems.append(
            f"--speaker_prompt {SPEAKER_REFERENCE}: places clips in turns before the recording, which --reference "
            f"{options.reference} contradicts; remove one of them"
        )
    if options.speaker_descriptions is not None:
        if options.speaker_prompt != SPEAKER_DESCRIPTION:
            problems.append(f"{OPTION}: needs --speaker_prompt {SPEAKER_DESCRIPTION}")
        try:
            read_descriptions(options.speaker_descriptions)
        except InputError as error:
            problems += error.problems
    return problems


def read_descriptions(path: Path) -> Mapping[str, str]:
    """Return the description of each speaker's voice, on one line. Raises InputError with every problem of the file."""
    if path.exists() and not path.is_file():
        raise InputError(f"{OPTION} {path}: is not a file")
    try:
        return _parsed(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"{OPTION} {path}: {error.strerror}") from error


@functools.lru_cache(maxsize=2)  # every manifest is read with the same file
def _parsed(path: Path, content: bytes) -> Mapping[str, str]:
    where = f"{OPTION} {path}"
    try:
        text = content.decode("utf-8-sig")
        values: Any = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    if isinstance(values, dict) and isinstance(values.get("speakers"), dict):  # the record beside an adapter or a model
        values = {name: voice for name, voice in values["speakers"].items() if voice is not None}
    if not isinstance(values, dict) or not values:
        raise InputError(
            f"{where}: must map the names of speakers to descriptions, for instance anna: a low, calm voice"
        )
    faults = {name: _fault(description) for name, description in values.items()}
    problems = [f"{where}: {name}: {fault}" for name, fault in faults.items() if fault]
    if problems:
        raise InputError(problems)
    return {str(name).strip(): " ".join(description.split()) for name, description in values.items()}


def _fault(description: Any) -> str:
    if not isinstance(description, str) or not description.strip():
        return f"must be a text that describes the voice, but is {description!r}"
    if "<|" in description:
        return "contains <|, which begins a token of the prompt layout; remove it"
    return ""
