"""Everything that turns samples into token ids and codes for one base."""

from __future__ import annotations

from dataclasses import dataclass

from higgs_ds.data.code_cache import CodeCache
from higgs_ds.data.codec_info import CodecInfo
from higgs_ds.data.index_writer import CheckedClip
from higgs_ds.data.mel_features import MelFeatureStore
from higgs_ds.model.family import Family
from higgs_ds.model.prompt import BatchTokenizer
from higgs_ds.model.stream import AudioStream


@dataclass(frozen=True)
class Coder:
    """The family, tokenizer, codec and audio stream of one base, and the cache of that codec's codes."""

    family: Family
    tokenizer: BatchTokenizer
    stream: AudioStream
    pad_id: int
    codec: CodecInfo
    cache: CodeCache
    identity: str  # equal for two coders that give the same ids and codes
    hearing: MelFeatureStore | None = None  # for a model with a Whisper tower

    def has_outputs(self, clip: CheckedClip) -> bool:
        """Return whether a clip's codes and features seem to exist. Cheaper than reading them."""
        codes = self.cache.looks_complete(clip.key, clip.num_frames, self.stream.num_codebooks)
        features = self.hearing is None or not clip.num_outputs or self.hearing.path(clip.key).is_file()
        return codes and features
