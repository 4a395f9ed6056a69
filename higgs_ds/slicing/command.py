"""launch/slice.py: long recordings to a folder of clips that trains."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import InputError
from higgs_ds.common.folder_lock import SLICING_LOCK, FolderLock
from higgs_ds.common.words import counted
from higgs_ds.data.audio import AudioError
from higgs_ds.options.slicing import SliceOptions
from higgs_ds.slicing.clips import line_of, write_clips
from higgs_ds.slicing.cuts import LeftOut, Limits, plan_cues, plan_speech
from higgs_ds.slicing.inputs import Source, open_sources
from higgs_ds.slicing.progress import LEFT_OUT_FILE, METADATA_FILE, Progress
from higgs_ds.slicing.recordings import duration_s, readable
from higgs_ds.slicing.voice_activity import find_pauses
from higgs_ds.speech.recognizers import Transcriber, open_transcriber

NOTHING_HEARD = "the recognizer hears no words"


@dataclass
class Sliced:
    """What has become of the recordings: lines of both lists, and sums for the report."""

    metadata: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    quieter: int = 0  # clips that would be clipped at --loudness


def main(options: SliceOptions) -> None:
    """Slice the recordings, or go on where an earlier command was ended.

    Raises:
        InputError: an input is invalid, or nothing can be kept.
        SaveError: a clip cannot be written.
    """
    with FolderLock(SLICING_LOCK) as lock:
        sources, settings = open_sources(options)
        lock.acquire(options.output_dir)
        progress = Progress(options.output_dir, settings)
        if progress.is_finished:
            progress.clean_up()
            say(f"{options.output_dir / METADATA_FILE} is complete: nothing to do")
            return
        transcribe = None
        if options.recognizer is not None:
            transcribe = open_transcriber(options.recognizer, options.vocabulary or (), options.language)
        sliced = Sliced()
        for source in sources:
            try:
                _slice(source, options, progress, transcribe, sliced)
            except AudioError as error:
                raise InputError(f"{source.path}: {error}") from error
        progress.finish(sliced.metadata, sliced.left_out)
        _report(options, sliced)


def _slice(
    source: Source, options: SliceOptions, progress: Progress, transcribe: Transcriber | None, sliced: Sliced
) -> None:
    sound = readable(source.path, progress.work / f"{source.name}.flac")
    activity = progress.read_pauses(source.name)
    if activity is None:
        total = min(duration_s(sound), 1e6)  # some headers do not give it
        with tqdm(total=round(total), desc=f"{source.name}: pauses", unit="s", disable=None) as bar:
            activity = find_pauses(sound, options.min_pause_s, bar.update)
        progress.write_pauses(source.name, activity)
    limits = Limits(
        options.min_clip_s, options.max_clip_s, options.split_pause_s, options.max_pause_s, options.max_shift_s,
        options.edge_silence_s,
    )  # fmt: skip
    plan = plan_speech(activity, limits) if source.cues is None else plan_cues(source.cues, activity, limits)
    written = write_clips(source, sound, plan.clips, options, progress, transcribe)
    sliced.quieter += sum(clip.is_quieter for clip in written)
    unheard = []
    for number, (clip, done) in enumerate(zip(plan.clips, written, strict=True), 1):
        if done.text:
            sliced.metadata.append(line_of(source, number, clip, done.text, options))
        else:
            unheard.append(LeftOut(clip.start_s, clip.end_s, NOTHING_HEARD, ""))
    sliced.left_out += [
        {"source": str(source.path), "start": part.start_s, "end": part.end_s, "reason": part.reason, "text": part.text}
        for part in sorted([*plan.left_out, *unheard], key=lambda part: (part.start_s, part.end_s))
    ]
    kept = [clip for clip, done in zip(plan.clips, written, strict=True) if done.text]
    say(
        f"{source.path}: {_time(activity.duration_s)}, of which {_time(activity.speech_s)} speech; "
        f"{counted(len(kept), 'clip')}, {_time(sum(clip.duration_s for clip in kept))} with their pauses"
    )


def _report(options: SliceOptions, sliced: Sliced) -> None:
    seconds: Counter[str] = Counter()
    counts = Counter(part["reason"] for part in sliced.left_out)
    for part in sliced.left_out:
        seconds[part["reason"]] += max(0.0, part["end"] - part["start"])
    for reason, count in counts.most_common():
        say(f"left out: {count} ({_time(seconds[reason])}): {reason}")
    if counts:
        say(f"list of what is left out: {options.output_dir / LEFT_OUT_FILE}")
    if sliced.quieter:
        warn(
            f"note: the level of {counted(sliced.quieter, 'clip')} stays below --loudness {options.loudness:g}, to "
            "avoid clipping"
        )
    if not sliced.metadata:
        raise InputError(f"--output_dir {options.output_dir}: there is no clip; {LEFT_OUT_FILE} lists why")
    say(f"clips: {len(sliced.metadata)}, listed in {options.output_dir / METADATA_FILE}")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
