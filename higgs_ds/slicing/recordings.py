"""Recordings in any format: what soundfile does not read, such as the sound of videos, FFmpeg converts to FLAC."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import replaced_file, saving
from higgs_ds.data.audio import mono_blocks
from higgs_ds.slicing.cuts import Clip
from higgs_ds.slicing.voice_activity import RATE

FFMPEG = "ffmpeg"


def check_recording(path: Path) -> list[str]:
    """Return the problems of a recording that are known without decoding it; empty if there are none."""
    if not path.is_file():
        return [f"{path}: {'is not a file' if path.exists() else 'no such recording'}"]
    if not _is_read_by_soundfile(path) and shutil.which(FFMPEG) is None:
        return [
            f"{path}: soundfile cannot read it as audio, and FFmpeg, which reads videos and many other formats, is not "
            "on PATH; install FFmpeg, or convert the recording to WAV, FLAC or MP3"
        ]
    return []


def _is_read_by_soundfile(path: Path) -> bool:
    try:
        with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False):
            return True
    except (soundfile.LibsndfileError, OSError):
        return False


def readable(path: Path, converted: Path) -> Path:
    """Return the recording, or, if soundfile cannot read it, its sound as FLAC, which is written to `converted`.

    Raises:
        InputError: FFmpeg finds no sound in it.
        SaveError: the FLAC file cannot be written.
    """
    if _is_read_by_soundfile(path):
        return path
    if not converted.exists():
        with saving(converted), replaced_file(converted) as temporary:
            command = [FFMPEG, "-nostdin", "-v", "error", "-y", "-i", str(path.absolute()), "-map", "0:a:0", "-ac", "1"]
            done = subprocess.run([*command, "-f", "flac", str(temporary)], capture_output=True, check=False)
            if done.returncode:
                lines = done.stderr.decode(errors="replace").strip().splitlines()
                raise InputError(f"{path}: FFmpeg cannot read its sound: {lines[-1] if lines else done.returncode}")
    return converted


def duration_s(path: Path) -> float:
    """Return the length of a recording as its header gives it, in seconds."""
    with path.open("rb") as file, soundfile.SoundFile(file.fileno(), closefd=False) as sound:
        return sound.frames / sound.samplerate


def read_clips(path: Path, clips: Sequence[Clip]) -> Iterator[tuple[Clip, torch.Tensor, int]]:
    """Yield each clip with its samples, mono float32 (num_samples,), and their rate.

    The recording is read once, from its beginning: not every format can be entered exactly at a sample.

    Args:
        clips: in order of time, without overlaps.

    Raises:
        AudioError: the recording cannot be read.
    """
    waiting = iter(clips)
    clip = next(waiting, None)
    with mono_blocks(path, RATE) as (rate, blocks):
        position, parts = 0, []
        for block in blocks:
            while clip is not None:
                first, last = round(clip.start_s * rate), round(clip.end_s * rate)
                parts.append(block[max(0, first - position) : max(0, last - position)])
                if last > position + len(block):
                    break
                yield clip, torch.from_numpy(np.concatenate(parts)), rate
                clip, parts = next(waiting, None), []
            if clip is None:
                return
            position += len(block)
        if clip is not None:  # rounded beyond the last sample
            yield clip, torch.from_numpy(np.concatenate(parts)), rate
