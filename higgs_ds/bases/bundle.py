"""A base on disk, without its weights: configuration, tokenizer and codec, and checks that they fit together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as TextEncoder

from higgs_ds.bases.builtin import find_base, which_builtin
from higgs_ds.bases.conversion import bundled_codec, native_codec, native_folder
from higgs_ds.bases.tokenizer import read_tokenizer
from higgs_ds.common import distributed
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import sha256_of
from higgs_ds.common.hub import resolve_config_folder, resolve_folder, resolve_without_weights
from higgs_ds.common.tensor_files import sampled_digest, weight_files, weight_shapes
from higgs_ds.data.code_cache import CodeCache
from higgs_ds.data.codec_info import (
    CODEC_SUBFOLDER,
    ORIGINAL_CODEC,
    PROCESSOR_CONFIG,
    CodecInfo,
    codec_digest,
    find_codec,
    is_original_codec,
    read_codec_info,
    read_codec_json,
)
from higgs_ds.data.coder import Coder
from higgs_ds.data.mel_features import POSITIONS_PER_S, MelFeatureStore
from higgs_ds.model.families import MODEL_TYPES, family_of, read_json_config, read_native_config
from higgs_ds.model.family import Family
from higgs_ds.model.parts import NO_PARTS, Parts, parts_in
from higgs_ds.model.prompt import CachedTokenizer
from higgs_ds.model.stream import AudioStream
from higgs_ds.options.fields import ORIGINAL
from higgs_ds.options.train import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Bundle:
    """Everything of a base except its weights. `name` is the name that is reported to the user.

    `values` are those of the base's config.json, in the native layout. If a Whisper tower is among the parts that are
    `added` to the base, `whisper_folder` is where its weights come from.
    """

    name: str
    folder: Path
    values: dict[str, Any]
    text_encoder: TextEncoder
    codec: CodecInfo
    layout: str
    added: Parts = NO_PARTS
    whisper_folder: Path | None = None
    train_fill: bool = False  # see `Family.stream`

    @property
    def family(self) -> Family:
        """The family of models that the base belongs to."""
        return family_of(self.values["model_type"])

    @cached_property
    def config(self) -> Any:
        """The configuration, with the added parts. Raises InputError if transformers refuses it."""
        from huggingface_hub.errors import StrictDataclassError

        from higgs_ds.model.config import config_of, with_parts

        try:
            return with_parts(config_of(self.values), self.added)
        except StrictDataclassError as error:
            raise InputError(f"{self.folder / 'config.json'}: {' '.join(str(error).split())}") from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as transformers loads it, to be saved with a model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The tokens of the base with their ids."""
        return self.text_encoder.get_vocab()

    @property
    def identity(self) -> str:
        """See `base_identity`."""
        return base_identity(self.folder)

    @cached_property
    def weights_digest(self) -> str:
        """See `sampled_digest`. Unlike `identity`, it also tells a base from the models that are merged from it."""
        return sampled_digest(weight_files(self.folder))

    @property
    def pad_id(self) -> int:
        """The token id that pads the end of a row, where nothing is predicted."""
        return self.family.pad_id(self.values)

    @property
    def stream(self) -> AudioStream:
        return self.family.stream(self.values, self.train_fill)

    def coder(self, cache_dir: Path) -> Coder:
        """Return the coder that turns samples into token ids and audio codes of this base."""
        cache = CodeCache(cache_dir, codec_digest(self.codec.folder))
        vocabulary = json.dumps(sorted(self.vocabulary.items()))
        mel_features = self._mel_features(cache_dir)
        parts = (
            self.family.title,
            vocabulary,
            self.stream,
            cache.codec_digest,
            *([mel_features.identity] if mel_features else []),
        )
        identity = hashlib.sha256(repr(parts).encode()).hexdigest()
        tokenizer = CachedTokenizer(self.text_encoder)
        return Coder(self.family, tokenizer, self.stream, self.pad_id, self.codec, cache, identity, mel_features)

    def _mel_features(self, cache_dir: Path) -> MelFeatureStore | None:
        tower = self.added.audio_tower or parts_in(self.values).audio_tower
        if tower is None:
            return None
        stretch_s = tower["max_source_positions"] // POSITIONS_PER_S
        frames = stretch_s * self.codec.sample_rate // self.codec.hop_length
        return MelFeatureStore(tower["num_mel_bins"], stretch_s, frames, cache_dir / "features")


def base_identity(folder: Path) -> str:
    """SHA-256 over a base's configuration and the names and sizes of its weight files; independent of its location."""
    sizes = [(path.name, path.stat().st_size) for path in weight_files(folder)]
    return hashlib.sha256(repr((sha256_of(folder / "config.json"), sizes)).encode()).hexdigest()


def open_bundle(
    name: str | None, revision: str | None, codec_name: str | None, cache_dir: Path, weights: bool = True
) -> Bundle:
    """Find a base, by default the built-in one, and its codec. Either is converted into the cache if it is not native.

    Without `weights`, no weights are downloaded, converted or checked, except those of a codec in the original layout,
    whose configuration is not enough. Such a bundle counts tokens, but cannot be trained.

    Raises:
        InputError: lists everything that does not fit together.
        SaveError: a converted base or codec cannot be written.
    """
    folder = find_base(name, "--base_ckpt", cache_dir, revision, resolve_folder if weights else resolve_without_weights)
    # A built-in base is reported by its folder: programs that read an adapter do not know this project's names.
    reported_name = name if name and which_builtin(name) is None else str(folder)
    layout = MODEL_TYPES[read_json_config(folder, "--base_ckpt")["model_type"]]
    folder = native_folder(folder, "--base_ckpt", cache_dir) if weights else folder
    values = read_native_config(folder, "--base_ckpt")
    family = family_of(values["model_type"])
    values = family.with_defaults(values)
    if weights:
        weight_files(folder)
        codec_folder = _codec_folder(folder, family, codec_name, cache_dir)
        weight_shapes(weight_files(codec_folder))
    else:
        codec_folder = _codec_without_weights(folder, family, codec_name, layout, cache_dir)
    codec = read_codec_info(codec_folder)
    tokenizer = read_tokenizer(folder)
    problems = family.base_problems(folder, values, tokenizer)
    problems += [] if problems else _codec_problems(folder, family, values, codec)
    if problems:
        raise InputError(problems)
    return Bundle(reported_name, folder, values, tokenizer, codec, layout)


def _codec_folder(folder: Path, family: Family, name: str | None, cache_dir: Path) -> Path:
    """Return the codec that is named or that the base has, in transformers' layout."""
    if name is None and family.codec_prefix is not None and not (folder / CODEC_SUBFOLDER).is_dir():
        bundled = bundled_codec(folder, family.codec_prefix, "--base_ckpt", cache_dir)
        if bundled is not None:
            return bundled
        name = ORIGINAL_CODEC
    return native_codec(find_codec(folder, name), "--codec_ckpt", cache_dir)


def _codec_without_weights(folder: Path, family: Family, name: str | None, layout: str, cache_dir: Path) -> Path:
    if family.codec_prefix is not None and any(folder.glob("*.safetensors")):
        return _codec_folder(folder, family, name, cache_dir)
    has_codec = any((folder / part).exists() for part in (CODEC_SUBFOLDER, PROCESSOR_CONFIG))
    if (layout == ORIGINAL or family.codec_prefix is not None) and not has_codec:
        name = name or ORIGINAL_CODEC  # as a conversion to the native layout would note
    codec = find_codec(folder, name, resolve_without_weights)
    if not is_original_codec(read_codec_json(codec)):
        return codec
    return native_codec(find_codec(folder, name), "--codec_ckpt", cache_dir)


def open_for_training(options: ModelOptions, cache_dir: Path, weights: bool = True) -> Bundle:
    """Open a base together with the optional parts that are to be trained. Every rank must call this.

    Only one rank downloads and converts files. For `weights`, see `open_bundle`.

    Raises:
        InputError, SaveError: on every rank, as for `open_bundle`.
    """

    def open_with_parts() -> Bundle:
        bundle = open_bundle(options.base_ckpt, options.base_revision, options.codec_ckpt, cache_dir, weights)
        bundle = replace(bundle, train_fill=options.train_fill)
        assert bundle.stream  # raises InputError if the family has no fill
        if not options.audio_self_attention and not options.whisper_conditioning:
            return bundle
        from higgs_ds.model.config import parts_to_add

        resolve = resolve_folder if weights else resolve_config_folder
        added, whisper_folder = parts_to_add(options, parts_in(bundle.values), resolve)
        if whisper_folder is not None and weights:
            weight_shapes(weight_files(whisper_folder))
        return replace(bundle, added=added, whisper_folder=whisper_folder)

    distributed.on_main(lambda: open_with_parts() and None)
    return distributed.run_on_all_ranks(open_with_parts)


def _codec_problems(folder: Path, family: Family, values: dict[str, Any], codec: CodecInfo) -> list[str]:
    stream, size = family.stream(values), family.codebook_size(values)
    bos, eos = stream.bos_id, stream.eos_id
    problems = []
    if codec.num_codebooks != stream.num_codebooks:
        problems.append(
            f"{codec.folder}: the codec has {codec.num_codebooks} codebooks, but the base {folder} uses "
            f"{stream.num_codebooks}"
        )
    if codec.codebook_size != bos or size <= eos:
        problems.append(
            f"{folder}: codebook_size {size} with stream BOS {bos} and EOS {eos} does not fit the codec's "
            f"{codec.codebook_size} codes"
        )
    return problems
