"""What a slicing has done, in its output folder: a command that was killed goes on from there.

slicing.json        the options and inputs; another command may not write to the folder
NAME_00001.flac     the clips
.slicing/           of each recording: its pauses, the clips that are written, the sound of a video
left_out.jsonl      what is in no clip, and why
metadata.jsonl      the list of clips; written last
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import restore_leftovers, saving, sha256_of, write_json, write_text
from higgs_ds.options.slicing import SliceOptions
from higgs_ds.slicing.voice_activity import Activity, Pause

METADATA_FILE, LEFT_OUT_FILE, SETTINGS_FILE = "metadata.jsonl", "left_out.jsonl", "slicing.json"
WORK_FOLDER = ".slicing"
ANY_NAME = re.compile(r".+")


def settings_of(options: SliceOptions, subtitles: Sequence[Path | None]) -> dict[str, Any]:
    """Return the options and the state of the inputs, as JSON values: what decides all that is written."""
    values = {name: value for name, value in dataclasses.asdict(options).items() if name != "output_dir"}
    files = [
        {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns, "subtitles": text and sha256_of(text)}
        for path, text in zip(options.recordings, subtitles, strict=True)
    ]
    return json.loads(json.dumps(values | {"files": files}, default=str))


def check_output(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Return a problem if a folder has files that are not of an earlier command with the same settings."""
    inside = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
    if inside <= {SETTINGS_FILE, LEFT_OUT_FILE}:  # nothing, or what a command without a clip has left
        return []
    changed = _changed(folder, settings)
    if not changed:
        return []
    return [
        f"--output_dir {folder}: has files that were not written with the same {', '.join(changed)}; choose another "
        f"folder, or give what {SETTINGS_FILE} has"
        if SETTINGS_FILE in inside
        else f"--output_dir {folder}: has files that are not of an earlier slicing; choose another folder"
    ]


def _changed(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Return the settings that are not those in a folder."""
    try:
        earlier = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return list(settings)
    return [name for name in settings if not isinstance(earlier, dict) or earlier.get(name) != settings[name]]


@dataclass(frozen=True)
class Written:
    """A clip that is written. One without a text is not: it has no file."""

    text: str
    is_quieter: bool  # than --loudness, as it would be clipped


class Progress:
    """The output folder of a slicing, whose lock this process holds."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.work = folder, folder / WORK_FOLDER
        with saving(folder):
            for inside in (folder, self.work):
                restore_leftovers(inside, ANY_NAME, ANY_NAME)
            if _changed(folder, settings):
                shutil.rmtree(self.work, ignore_errors=True)
                write_json(folder / SETTINGS_FILE, settings)

    @property
    def is_finished(self) -> bool:
        return (self.folder / METADATA_FILE).exists()

    def read_pauses(self, name: str) -> Activity | None:
        """Return the pauses of a recording, if they are known."""
        path = self.work / f"{name}.pauses.json"
        if not path.exists():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        return Activity(values["duration_s"], [Pause(*pause) for pause in values["pauses"]])

    def write_pauses(self, name: str, activity: Activity) -> None:
        pauses = [dataclasses.astuple(pause) for pause in activity.pauses]
        path = self.work / f"{name}.pauses.json"
        with saving(path):
            write_text(path, json.dumps({"duration_s": activity.duration_s, "pauses": pauses}))

    def read_written(self, name: str) -> list[Written]:
        """Return the clips of a recording that are written. A line cut by a kill is removed."""
        path = self.work / f"{name}.written.jsonl"
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with saving(path):
                write_text(path, whole.decode())
        return [Written(*json.loads(line)) for line in whole.splitlines()]

    def add_written(self, name: str, clip: Written) -> None:
        """Record that the next clip of a recording is written."""
        path = self.work / f"{name}.written.jsonl"
        with saving(path):
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.astuple(clip)) + "\n")

    def finish(self, metadata: Sequence[dict[str, Any]], left_out: Sequence[dict[str, Any]]) -> None:
        """Write the lists, the one of the clips last, and remove what only an unfinished slicing needs."""
        with saving(self.folder):
            write_text(self.folder / LEFT_OUT_FILE, _lines(left_out))
            if metadata:
                write_text(self.folder / METADATA_FILE, _lines(metadata))
                self.clean_up()

    def clean_up(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)


def _lines(values: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def names_of(recordings: Sequence[Path]) -> list[str]:
    """Return the names that the clips of each recording begin with. Raises InputError if two have the same."""
    names = [re.sub(r"[^\w.-]", "_", path.stem) for path in recordings]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise InputError(f"several recordings are named {', '.join(double)}, as their clips would be; rename them")
    return names
