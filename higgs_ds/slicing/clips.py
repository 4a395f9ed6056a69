"""Write the clips of a recording, each with its text, at a stated loudness if one is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from higgs_ds.common.files import saving
from higgs_ds.data.audio import write_audio
from higgs_ds.options.slicing import SliceOptions
from higgs_ds.slicing.cuts import Clip
from higgs_ds.slicing.inputs import Source
from higgs_ds.slicing.progress import Progress, Written
from higgs_ds.slicing.recordings import read_clips
from higgs_ds.speech.recognizers import Transcriber

HIGHEST_PEAK = 10 ** (-0.1 / 20)  # -0.1 dBFS: a clip is made louder up to there


def write_clips(
    source: Source,
    sound: Path,
    clips: Sequence[Clip],
    options: SliceOptions,
    progress: Progress,
    transcribe: Transcriber | None,
) -> list[Written]:
    """Write the clips that are not written yet, and return all.

    Args:
        sound: the recording, as soundfile reads it.
        transcribe: gives the texts, unless the clips have them.

    Raises:
        AudioError: the recording cannot be read.
        SaveError: a clip cannot be written.
    """
    written = progress.read_written(source.name)
    with tqdm(total=len(clips), initial=len(written), desc=f"{source.name}: clips", unit="clip", disable=None) as bar:
        for clip, waveform, rate in read_clips(sound, clips[len(written) :]):
            text = transcribe(waveform, rate) if transcribe else clip.text
            is_quieter = False
            if options.loudness is not None:
                waveform, is_quieter = set_loudness(waveform, rate, options.loudness)
            if text:
                path = options.output_dir / _file_name(source, len(written) + 1, options)
                with saving(path):
                    write_audio(path, waveform, rate)
            written.append(Written(text, is_quieter))
            progress.add_written(source.name, written[-1])
            bar.update()
    return written


def set_loudness(waveform: torch.Tensor, sample_rate: int, loudness: float) -> tuple[torch.Tensor, bool]:
    """Scale a clip (num_samples,) of at least 0.4 s to an integrated loudness in LUFS, by ITU-R BS.1770.

    Returns:
        the clip, and whether it stays quieter, because its peaks would be clipped.
    """
    import pyloudnorm

    measured = float(pyloudnorm.Meter(sample_rate).integrated_loudness(waveform.double().numpy()))
    gain = 10 ** ((loudness - measured) / 20)
    highest = HIGHEST_PEAK / max(float(waveform.abs().max()), 1e-9)
    return waveform * min(gain, highest), gain > highest


def line_of(source: Source, number: int, clip: Clip, text: str, options: SliceOptions) -> dict[str, Any]:
    """Return the line of a clip in metadata.jsonl. Speaker and language are only in it if they are known."""
    speaker, language = options.speaker or clip.speaker, options.language
    return {
        "file_name": _file_name(source, number, options),
        "text": text,
        **({"speaker": speaker} if speaker else {}),
        **({"language": language} if language else {}),
        "source": str(source.path),
        "start": clip.start_s,
        "end": clip.end_s,
    }


def _file_name(source: Source, number: int, options: SliceOptions) -> str:
    return f"{source.name}_{number:05d}.{options.clip_format}"
