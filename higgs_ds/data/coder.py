"""What a base turns samples into ids and codes with."""

from __future__ import annotations

from dataclasses import dataclass

from higgs_ds.data.audio_codes import CodeCache
from higgs_ds.data.codec import CodecInfo
from higgs_ds.data.delay_pattern import AudioStream
from higgs_ds.data.prompt import Tokenizer


@dataclass(frozen=True)
class Coder:
    """The tokenizer, codec and stream of one base, and the cache of that codec's codes."""

    tokenizer: Tokenizer
    stream: AudioStream
    pad_id: int
    codec: CodecInfo
    cache: CodeCache
    identity: str  # the same for two coders that give the same ids and codes
