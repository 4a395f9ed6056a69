"""A base on disk, without its weights: configuration, tokenizer and codec, and checks that they fit together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer, HiggsAudioV2Config, PreTrainedTokenizerBase

from higgs_ds.bases.builtin import find_base, which_builtin
from higgs_ds.bases.conversion import native_codec, native_folder
from higgs_ds.common import distributed
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import sha256_of
from higgs_ds.common.hub import resolve_folder
from higgs_ds.common.tensor_files import weight_files, weight_shapes
from higgs_ds.data.code_cache import CodeCache
from higgs_ds.data.codec import CodecInfo, codec_digest, find_codec, read_codec_info
from higgs_ds.data.coder import Coder
from higgs_ds.data.delay_pattern import AudioStream
from higgs_ds.data.mel_features import POSITIONS_PER_S, MelFeatureStore
from higgs_ds.data.prompt import AUDIO_DELAY, AUDIO_OUT, AUDIO_OUT_BOS, CachedTokenizer, missing_tokens
from higgs_ds.model.layouts import MODEL_TYPES, read_json_config
from higgs_ds.model.loading import read_config
from higgs_ds.model.parts import NO_PARTS, Parts, parts_of, parts_to_add, with_parts
from higgs_ds.options.train import ModelOptions


@dataclass(frozen=True)
class Bundle:
    """Everything of a base except its weights. `name` is the name that is reported to the user.

    `config` includes the parts that are `added` to the base. If a Whisper tower is among them, `whisper_folder` is
    where its weights come from.
    """

    name: str
    folder: Path
    config: HiggsAudioV2Config
    tokenizer: PreTrainedTokenizerBase
    codec: CodecInfo
    layout: str
    added: Parts = NO_PARTS
    whisper_folder: Path | None = None

    @property
    def identity(self) -> str:
        """See `base_identity`."""
        return base_identity(self.folder)

    @property
    def pad_id(self) -> int:
        """The token id that pads the end of a row, where nothing is predicted."""
        return self.config.pad_token_id or 0

    @property
    def stream(self) -> AudioStream:
        return AudioStream(self.config.num_codebooks, self.config.audio_stream_bos_id, self.config.audio_stream_eos_id)

    def coder(self, cache_dir: Path) -> Coder:
        """Return the coder that turns samples into token ids and audio codes of this base."""
        cache = CodeCache(cache_dir, codec_digest(self.codec.folder))
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        mel_features = self._mel_features(cache_dir)
        parts = (vocabulary, self.stream, cache.codec_digest, *([mel_features.identity] if mel_features else []))
        identity = hashlib.sha256(repr(parts).encode()).hexdigest()
        return Coder(
            CachedTokenizer(self.tokenizer), self.stream, self.pad_id, self.codec, cache, identity, mel_features
        )

    def _mel_features(self, cache_dir: Path) -> MelFeatureStore | None:
        tower = parts_of(self.config).audio_tower
        if tower is None:
            return None
        stretch_s = tower["max_source_positions"] // POSITIONS_PER_S
        frames = stretch_s * self.codec.sample_rate // self.codec.hop_length
        return MelFeatureStore(tower["num_mel_bins"], stretch_s, frames, cache_dir / "features")


def base_identity(folder: Path) -> str:
    """SHA-256 over a base's configuration and the names and sizes of its weight files; independent of its location."""
    sizes = [(path.name, path.stat().st_size) for path in weight_files(folder)]
    return hashlib.sha256(repr((sha256_of(folder / "config.json"), sizes)).encode()).hexdigest()


def open_bundle(name: str | None, revision: str | None, codec_name: str | None, cache_dir: Path) -> Bundle:
    """Find a base, by default the built-in one, and its codec. Either is converted into the cache if it is not native.

    Raises:
        InputError: lists everything that does not fit together.
        SaveError: a converted base or codec cannot be written.
    """
    folder = find_base(name, "--base_ckpt", cache_dir, revision)
    # A built-in base is reported by its folder: programs that read an adapter do not know this project's names.
    reported_name = name if name and which_builtin(name) is None else str(folder)
    layout = MODEL_TYPES[read_json_config(folder, "--base_ckpt")["model_type"]]
    folder = native_folder(folder, "--base_ckpt", cache_dir)
    config = read_config(folder)
    weight_files(folder)
    codec_folder = native_codec(find_codec(folder, codec_name), "--codec_ckpt", cache_dir)
    codec = read_codec_info(codec_folder)
    weight_shapes(weight_files(codec_folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: its tokenizer does not load: {error}") from error
    problems = _tokenizer_problems(folder, config, tokenizer)
    if codec.config.num_quantizers != config.num_codebooks:
        problems.append(
            f"{codec_folder}: the codec has {codec.config.num_quantizers} codebooks, "
            f"but the base {folder} uses {config.num_codebooks}"
        )
    if codec.config.codebook_size != config.audio_stream_bos_id or config.codebook_size <= config.audio_stream_eos_id:
        problems.append(
            f"{folder}: codebook_size {config.codebook_size} with stream BOS {config.audio_stream_bos_id} and EOS "
            f"{config.audio_stream_eos_id} does not fit the codec's {codec.config.codebook_size} codes"
        )
    if problems:
        raise InputError(problems)
    return Bundle(reported_name, folder, config, tokenizer, codec, layout)


def open_for_training(options: ModelOptions, cache_dir: Path) -> Bundle:
    """Open a base together with the optional parts that are to be trained. Every rank must call this.

    Only one rank downloads and converts files.

    Raises:
        InputError, SaveError: on every rank, as for `open_bundle`.
    """

    def open_with_parts() -> Bundle:
        bundle = open_bundle(options.base_ckpt, options.base_revision, options.codec_ckpt, cache_dir)
        added, whisper_folder = parts_to_add(options, bundle.config, resolve_folder)
        if whisper_folder is not None:
            weight_shapes(weight_files(whisper_folder))
        return replace(bundle, config=with_parts(bundle.config, added), added=added, whisper_folder=whisper_folder)

    distributed.on_main(lambda: open_with_parts() and None)
    return distributed.run_on_all_ranks(open_with_parts)


def _tokenizer_problems(folder: Path, config: HiggsAudioV2Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    missing = missing_tokens(tokenizer.get_vocab())
    if missing:
        return [f"{folder}: its tokenizer has no {', '.join(missing)}"]
    expected = {
        AUDIO_OUT: config.audio_token_id,
        AUDIO_DELAY: config.audio_delay_token_id,
        AUDIO_OUT_BOS: config.audio_bos_token_id,
    }
    return [
        f"{folder}: {token} is {tokenizer.convert_tokens_to_ids(token)} in the tokenizer, {expected_id} in config.json"
        for token, expected_id in expected.items()
        if tokenizer.convert_tokens_to_ids(token) != expected_id
    ]
