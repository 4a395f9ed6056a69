"""The options of what is flagged in samples before training. Flagged samples are listed, and trained all the same."""

from __future__ import annotations

from dataclasses import dataclass

from higgs_ds.options.fields import option


@dataclass(frozen=True)
class FlagOptions:
    """Flagged samples (listed, never left out; a threshold of inf or 0 turns a check off)"""

    flag_end_silence_s: float = option(1.0, "flag more seconds of silence than this at the start or end of a clip")
    flag_pause_s: float = option(2.0, "flag a pause within a clip that is longer than this many seconds")
    flag_rate_ratio: float = option(
        2.5,
        "flag samples whose characters per second are this many times more or fewer than the median of their language "
        "and speaker",
    )
    flag_level_dbfs: float = option(-40.0, "flag clips whose speech is quieter than this, in dBFS (-inf: none)")
    flag_level_difference_db: float = option(
        12.0, "flag samples whose level differs by more than this many dB from the median of their speaker"
    )
    flag_clipping: float = option(0.001, "flag clips with more than this fraction of their samples at full scale")
    flag_dc_offset: float = option(0.01, "flag clips whose mean is farther from 0 than this fraction of full scale")
    flag_bandwidth: float = option(
        0.6,
        "flag clips whose content ends below this fraction of the bandwidth that their sample rate, or that of the "
        "codec, allows (0: none)",
    )
    flag_similarity: float = option(
        0.9,
        "flag texts of one speaker that are the same up to this fraction of their length but for one place, with "
        "different audio",
    )
    flag_script_share: float = option(
        0.5, "flag texts with less than this fraction of their letters in the script of their language (0: none)"
    )
    flag_codec_clips: int = option(
        5,
        "compare this many clips with themselves through the codec, and warn where they come back unlike (0: none)",
    )
    flag_min_clips: int = option(10, "number of samples below which a language or speaker has no median of its own")


def check_flag_options(options: FlagOptions) -> list[str]:
    """Return the problems of these options; empty if there are none."""
    problems = []

    def expect(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            problems.append(f"--{name} {getattr(options, name)}: must be {allowed}")

    for name in ("flag_end_silence_s", "flag_pause_s", "flag_level_difference_db", "flag_clipping", "flag_dc_offset"):
        expect(name, getattr(options, name) >= 0, "0 or more; inf flags none")
    expect("flag_rate_ratio", options.flag_rate_ratio > 1, "above 1; inf flags none")
    expect("flag_level_dbfs", options.flag_level_dbfs <= 0, "0 or less; -inf flags none")
    for name in ("flag_bandwidth", "flag_script_share"):
        expect(name, 0 <= getattr(options, name) <= 1, "from 0 to 1; 0 flags none")
    expect("flag_similarity", options.flag_similarity > 0.5, "above 0.5; 1 flags equal texts only, inf none")
    expect("flag_codec_clips", options.flag_codec_clips >= 0, "0 or more; 0 compares none")
    expect("flag_min_clips", options.flag_min_clips >= 1, "1 or more")
    return problems
