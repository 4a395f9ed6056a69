"""Recordings and their subtitles, checked before anything is decoded."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError, collect_problems
from higgs_ds.common.files import check_folders
from higgs_ds.options.slicing import SliceOptions, check_slice_options
from higgs_ds.slicing.cues import Cue
from higgs_ds.slicing.progress import check_output, names_of, settings_of
from higgs_ds.slicing.recordings import check_recording
from higgs_ds.slicing.subtitles import SUFFIXES, check_subtitles, read_subtitles
from higgs_ds.speech.recognizers import check_recognizer


@dataclass(frozen=True)
class Source:
    """A recording, the name of its clips, and its subtitles, if there are any."""

    path: Path
    name: str
    cues: list[Cue] | None


def open_sources(options: SliceOptions) -> tuple[list[Source], dict[str, Any]]:
    """Return the recordings with their subtitles, and all that decides the result; raise all problems at once."""
    problems = check_slice_options(options) + check_folders(output_dir=options.output_dir)
    for package, needed_by in (("silero_vad", "launch/slice.py"), ("pyloudnorm", "--loudness")):
        needed = package == "silero_vad" or options.loudness is not None
        if needed and importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            problems.append(f"{needed_by}: the package {name} is not installed; pip install {name}")
    collect_problems(problems, lambda: check_recognizer(options.recognizer))
    problems += [problem for path in options.recordings for problem in check_recording(path)]
    names = collect_problems(problems, lambda: names_of(options.recordings)) or []
    files = collect_problems(problems, lambda: _subtitle_files(options)) or [None] * len(options.recordings)
    cues = [_read(path, options, problems) for path in files]
    if problems:
        raise InputError(problems)
    settings = settings_of(options, files)
    problems = check_output(options.output_dir, settings)
    if problems:
        raise InputError(problems)
    given = [_of_speaker(of_one, options.speaker) for of_one in cues]
    return [Source(*source) for source in zip(options.recordings, names, given, strict=True)], settings


def _read(path: Path | None, options: SliceOptions, problems: list[str]) -> list[Cue] | None:
    if path is None:
        return None
    found = check_subtitles(path)
    problems += found
    return None if found else collect_problems(problems, lambda: read_subtitles(path, options.tiers))


def _of_speaker(cues: list[Cue] | None, speaker: str | None) -> list[Cue] | None:
    if cues is None or speaker is None:
        return cues
    return [dataclasses.replace(cue, speaker=speaker) for cue in cues]


def _subtitle_files(options: SliceOptions) -> list[Path | None]:
    """Return the subtitle file of each recording. Raises InputError if one has none, or several."""
    given = options.subtitles
    if given is None:
        return [None] * len(options.recordings)
    if len(given) == 1 and given[0].is_dir():
        found: list[Path | None] = []
        problems = []
        for recording in options.recordings:
            fits = [
                path for path in sorted(given[0].iterdir())
                if path.stem == recording.stem and path.suffix.lower() in SUFFIXES and path != recording
            ]  # fmt: skip
            if len(fits) != 1:
                several = f"{', '.join(path.name for path in fits)}; give the files one by one" if fits else "none"
                problems.append(f"--subtitles {given[0]}: for {recording.name}, it has {several}")
            found += fits[:1]
        if problems:
            raise InputError(problems)
        return found
    if len(given) != len(options.recordings):
        raise InputError(
            f"--subtitles: {len(given)} for {len(options.recordings)} recordings; give one for each, in the same "
            "order, or a folder with files of their names"
        )
    return list(given)
