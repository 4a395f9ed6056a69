"""Read audio files as the codec needs them: mono float32 at its sample rate. Write audio files.

Clips are checked without torch, whose import takes seconds.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from higgs_ds.common.files import replaced_file
from higgs_ds.data.quality import ClipMeter, ClipQuality
from higgs_ds.model.sample import AudioClip

if TYPE_CHECKING:
    import torch

# torchaudio's defaults, written out because they are part of the keys of the code cache.
RESAMPLING: dict[str, Any] = {"lowpass_filter_width": 6, "rolloff": 0.99, "resampling_method": "sinc_interp_hann"}
SILENCE_PEAK = 1e-3  # -60 dBFS: a quieter clip is inaudible
SILENCE_DB = 40.0  # below the loudest 10 ms of a clip: pauses, unless they are noisy; weak consonants are louder
WRITTEN_AS = (".wav", ".flac")
BLOCK_NUMBERS = 2**20  # numbers decoded at a time, 4 MiB: all that checking a clip holds in memory
MAX_FILTER_TABLE = 2**26  # numbers of torchaudio's filters for resampling: half a gigabyte in float64
OGG_BLOCK = 2**16  # samples
UNKNOWN_LENGTH = 2**62  # libsndfile's number of frames for a file whose header does not give it
MAX_STRETCH_S = 1e6  # longer than any file: keeps the number of samples finite
TOLERANCE_S = 0.1  # by which a clip may extend past the end of its file: durations in manifests are rounded


class AudioError(ValueError):
    """An audio file that cannot be used. The text gives the reason, without the file's name."""


class ClipTooLongError(AudioError):
    """A clip that lasts longer than a limit."""

    def __init__(self, seconds: float, max_s: float) -> None:
        super().__init__(f"lasts {seconds:.1f} s; the limit is {max_s:g} s")
        self.seconds, self.max_s = seconds, max_s


@dataclass(frozen=True)
class AudioFacts:
    """Properties of a clip that are known once it is decoded."""

    source_samples: int  # without what is trimmed
    source_rate: int
    quality: ClipQuality
    start: int = 0  # sample at which it begins, after what is trimmed

    def num_samples(self, sample_rate: int) -> int:
        """Return the number of samples after torchaudio's resampling."""
        return -(-self.source_samples * sample_rate // self.source_rate)


def examine(
    clip: AudioClip,
    max_s: float,
    sample_rate: int,
    silence_db: float = SILENCE_DB,
    rest_s: float | None = None,
    may_be_silent: bool = False,
) -> AudioFacts:
    """Check that a clip can be trained on and measure it, without resampling it and with one block of it in memory.

    Args:
        sample_rate: to which the clip is going to be resampled, in Hz.
        silence_db: below its loudest 10 ms, at which 10 ms of the clip are silent.
        rest_s: seconds of silence that are left at each end; None trims nothing.
        may_be_silent: whether a silent clip is accepted, as one that is not to be learned.

    Raises:
        AudioError, ClipTooLongError: as in `read_audio`; or the clip is silent.
    """
    with _opened(clip, max_s) as (source_rate, blocks):
        _check_rate(source_rate, sample_rate)
        meter = ClipMeter(source_rate)
        for block in blocks:
            meter.add(block)
    if meter.peak < SILENCE_PEAK and not may_be_silent:
        level = f"its peak is {20 * math.log10(meter.peak):.0f} dBFS" if meter.peak else "every sample of it is zero"
        raise AudioError(f"is silent: {level}")
    quality, start, stop = meter.finish(silence_db)
    rest = math.inf if rest_s is None else round(rest_s * source_rate)
    start, stop = int(max(0, start - rest)), int(min(meter.num_samples, stop + rest))
    return AudioFacts(stop - start, source_rate, quality, start)


def read_audio(clip: AudioClip, sample_rate: int, max_s: float = math.inf) -> torch.Tensor:
    """Decode a clip (wav, flac, mp3, ogg), mix it down to mono and resample it.

    Returns:
        float32 tensor of shape (num_samples,) at `sample_rate` Hz.

    Raises:
        AudioError: the file is missing, cannot be decoded, ends before the clip does, or has a sample rate that cannot
            be resampled; or the clip contains no samples, or NaN or infinite ones.
        ClipTooLongError: the clip lasts longer than `max_s` seconds.
    """
    import torch
    import torchaudio

    with _opened(clip, max_s) as (source_rate, blocks):
        _check_rate(source_rate, sample_rate)
        waveform = np.concatenate(list(blocks))
    mono = torch.from_numpy(waveform).mean(dim=1)
    return torchaudio.functional.resample(mono, source_rate, sample_rate, **RESAMPLING)


@contextlib.contextmanager
def mono_blocks(path: Path, sample_rate: int) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Open a recording of any length: its sample rate, and its samples in blocks, mixed down to mono, float32 (n,).

    Args:
        sample_rate: to which the blocks are going to be resampled, in Hz.

    Raises:
        AudioError: as in `read_audio`; within the block, also while the samples are read.
    """
    with _opened(AudioClip(path), math.inf) as (source_rate, blocks):
        _check_rate(source_rate, sample_rate)
        yield source_rate, (block.mean(axis=1) for block in blocks)


def _check_rate(source_rate: int, sample_rate: int) -> None:
    """Refuse a rate for which torchaudio's table of filters, a row for each output phase, would fill the memory."""
    common = math.gcd(source_rate, sample_rate)
    if (source_rate // common) * (sample_rate // common) > MAX_FILTER_TABLE:
        raise AudioError(
            f"has a sample rate of {source_rate} Hz, which has too small a common divisor with {sample_rate} Hz to be "
            "resampled; convert the file to a usual rate such as 44100 or 48000 Hz"
        )


@contextlib.contextmanager
def _opened(clip: AudioClip, max_s: float) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """Open a clip: its sample rate, and its samples in blocks, float32 (n, channels), of BLOCK_NUMBERS at most.

    A clip longer than `max_s` is refused from the file's header, before anything is decoded. If the header does not
    give the length, the clip is read up to the limit and no further.
    """
    _check_file(clip)
    has_length = True
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(_sound_file(clip, stack))
            rate, has_length = file.samplerate, file.frames < UNKNOWN_LENGTH
            start = round(min(clip.offset_s, file.frames / rate if has_length else MAX_STRETCH_S) * rate)
            count = math.inf if clip.duration_s is None else round(min(clip.duration_s, MAX_STRETCH_S) * rate)
            if has_length:
                _check_length(min(count, file.frames - start), rate, max_s)
            if start:
                _move_to(file, start)
            yield rate, _checked_blocks(file, clip, start, count, max_s)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
        if not has_length:  # soundfile finds the end of a FLAC stream of unknown length only by failing
            reason = "its header does not give its length; rewrite it, for instance with ffmpeg -i OLD NEW"
        raise AudioError(f"cannot be read as audio: {reason}") from error


def _check_file(clip: AudioClip) -> None:
    if clip.data is None and not clip.path.is_file():
        raise AudioError("no such file" if not clip.path.exists() else "is not a file")


def _sound_file(clip: AudioClip, stack: contextlib.ExitStack) -> soundfile.SoundFile:
    # By file descriptor: given a name that ends in .raw, libsndfile expects samples without a header.
    source = stack.enter_context(clip.path.open("rb")).fileno() if clip.data is None else io.BytesIO(clip.data)
    return soundfile.SoundFile(source, closefd=False)


def _move_to(file: soundfile.SoundFile, start: int) -> None:
    """Move to sample `start`; in formats that cannot seek, such as GSM 6.10, by reading up to there."""
    if file.seekable():
        file.seek(start)
        return
    left = start
    while left and (num_read := len(file.read(min(left, BLOCK_NUMBERS // file.channels), dtype="float32"))):
        left -= num_read


def _checked_blocks(
    file: soundfile.SoundFile, clip: AudioClip, start: int, count: float, max_s: float
) -> Iterator[np.ndarray]:
    rate, num_samples = file.samplerate, 0
    while num_samples < count:
        size = max(1, BLOCK_NUMBERS // file.channels)
        block = file.read(int(min(size, count - num_samples)), dtype="float32", always_2d=True)
        if not len(block):
            break
        num_samples += len(block)
        _check_length(num_samples, rate, max_s)
        if not np.isfinite(block).all():
            raise AudioError("contains NaN or infinite samples")
        yield block
    if num_samples == 0:
        raise AudioError(f"contains no samples after {clip.offset_s:g} s" if clip.offset_s else "contains no samples")
    if clip.duration_s is not None and num_samples < count - TOLERANCE_S * rate:
        raise _ends_early(clip, (start + num_samples) / rate)


def _ends_early(clip: AudioClip, end_s: float) -> AudioError:
    part = f"offset {clip.offset_s:g} s, duration {clip.duration_s:g} s"
    return AudioError(f"ends at {end_s:.2f} s, before the end of the clip ({part})")


def _check_length(num_samples: float, rate: int, max_s: float) -> None:
    if num_samples > max_s * rate:
        raise ClipTooLongError(num_samples / rate, max_s)


def seconds_of_clip(clip: AudioClip) -> float | None:
    """Return how long a clip lasts, from the header of its file; None if that does not say.

    Raises:
        AudioError: the file is missing, is not audio, or ends before the clip does.
    """
    _check_file(clip)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_sound_file(clip, stack))
        except (soundfile.LibsndfileError, OSError) as error:
            reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
            raise AudioError(f"cannot be read as audio: {reason}") from error
        if file.frames >= UNKNOWN_LENGTH:
            return clip.duration_s
        end_s = file.frames / file.samplerate
    if clip.duration_s is None:
        return max(0.0, end_s - clip.offset_s)
    if clip.offset_s + clip.duration_s > end_s + TOLERANCE_S:
        raise _ends_early(clip, end_s)
    return min(end_s - clip.offset_s, clip.duration_s)


def as_wav(clip: AudioClip, max_s: float) -> bytes:
    """Return a clip as a WAV file of 16 bits, with the sample rate and channels of its file.

    Raises:
        AudioError, ClipTooLongError: as in `read_audio`.
    """
    with _opened(clip, max_s) as (rate, blocks):
        waveform = np.concatenate(list(blocks))
    content = io.BytesIO()
    soundfile.write(content, waveform, rate, "PCM_16", format="WAV")
    return content.getvalue()


def as_ogg(path: Path) -> bytes:
    """Return an audio file as Ogg Vorbis, a tenth of its size as WAV."""
    waveform, sample_rate = soundfile.read(path, dtype="float32")
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", sample_rate, 1, format="OGG", subtype="VORBIS") as file:
        # Block by block: libsndfile 1.2.2 ends the process if it is given more than about a minute at once.
        for start in range(0, len(waveform), OGG_BLOCK):
            file.write(waveform[start : start + OGG_BLOCK])
    return content.getvalue()


def as_ogg_url(path: Path) -> str:
    """Return an audio file as Ogg Vorbis in a data URL, which a page plays without other files."""
    return f"data:audio/ogg;base64,{base64.b64encode(as_ogg(path)).decode()}"


def write_audio(path: Path, waveform: torch.Tensor, sample_rate: int, comment: str | None = None) -> None:
    """Write a mono waveform (num_samples,) as 16-bit PCM, to WAV or FLAC depending on the file suffix.

    Args:
        comment: text in the file's header.
    """
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", sample_rate, 1, "PCM_16", format=path.suffix[1:]) as file:
        if comment is not None:
            file.comment = comment
        file.write(waveform.clamp(-1, 1).numpy())
    with replaced_file(path) as temporary:
        temporary.write_bytes(content.getvalue())
