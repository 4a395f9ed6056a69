"""A model's files written anew in another layout, or as safetensors: one file in memory at a time, without loss."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DacFeatureExtractor

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import free_bytes, new_folder, saving, sha256_of, write_json, write_text
from higgs_ds.common.tensor_files import (
    WEIGHT_INDEX,
    byte_ranges,
    companion_files,
    indexed_files,
    read_tensor,
    weight_files,
    weight_shapes,
    write_shards,
)
from higgs_ds.data.codec import CODEC_SUBFOLDER, ORIGINAL_CODEC, PROCESSOR_CONFIG, check_codec_tensors, read_codec_json
from higgs_ds.data.codec_layout import is_original_codec, native_codec_config, native_codec_tensors
from higgs_ds.data.prompt import AUDIO_DELAY, AUDIO_EOS, AUDIO_OUT, AUDIO_OUT_BOS
from higgs_ds.model.layouts import (
    MODEL_TYPES,
    native_config,
    native_name,
    original_config,
    original_name,
    part_of_rows,
    read_json_config,
    special_tokens,
)
from higgs_ds.options.fields import NATIVE

SAVED_ORIGINAL_CONFIG = "original_config.json"  # beside a native model that was made from an original one
SAMPLE_RATE = 24000  # Hz, of all codecs of this family
_CACHE_VERSION = 2  # of what is kept in the cache: raise it with every change to what is written
ORIGINAL_CODEC_FILE = "model.pth"
_PICKLED = (".bin", ".pth", ".pt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor where it lies: its size in bytes, and how to read it."""

    name: str
    size: int
    read: Callable[[], torch.Tensor]


def native_folder(folder: Path, asked_by: str, cache_dir: Path) -> Path:
    """The folder itself where it holds a native model in safetensors; else the one that it is written to, once.

    Raises InputError, beginning with `asked_by`: it is no model of this family, is damaged, or there is no room;
    SaveError.
    """
    config = read_json_config(folder, asked_by)
    if MODEL_TYPES[config["model_type"]] == NATIVE and not pickled_files(folder):
        return folder
    weights = pickled_files(folder) or weight_files(folder)
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    identity = hashlib.sha256(repr((_CACHE_VERSION, sha256_of(folder / "config.json"), stamps)).encode()).hexdigest()
    target = cache_dir / "converted" / identity[:32]
    if not target.is_dir():
        rewrite(folder, target, NATIVE, asked_by)
    return target


def native_codec(folder: Path, asked_by: str, cache_dir: Path) -> Path:
    """The folder itself where it holds a codec as transformers reads it; else the one it is written to, once.

    Raises InputError, beginning with `asked_by`: it holds no such codec, or a damaged one; SaveError.
    """
    config = read_codec_json(folder)
    if not is_original_codec(config):
        return folder
    where, path = f"{asked_by} {folder}", folder / ORIGINAL_CODEC_FILE
    if not path.is_file():
        raise InputError(f"{where}: lacks {ORIGINAL_CODEC_FILE}")
    identity = hashlib.sha256(f"{sha256_of(folder / 'config.json')} {sha256_of(path)}".encode()).hexdigest()
    target = cache_dir / "converted" / f"codec-{identity[:32]}"
    if not target.is_dir():
        tensors = _unpickled(path)
        made = native_codec_config(config, tensors, where)
        weights = native_codec_tensors(tensors, len(config["ratios"]))
        check_codec_tensors(where, made, weights)
        made.architectures, made.dtype = ["HiggsAudioV2TokenizerModel"], torch.float32
        with saving(target), new_folder(target) as temporary:
            made.save_pretrained(temporary)
            save_file(
                {name: t.float().contiguous() for name, t in weights.items()},
                temporary / "model.safetensors",
                {"format": "pt"},
            )
    return target


def rewrite(source: Path, target: Path, to: str, asked_by: str) -> list[str]:
    """Write a base or merged model in a layout, its own or the other, to a new folder; the names that were left out.

    Raises InputError, beginning with `asked_by`, where `source` is no such model or there is no room; SaveError.
    """
    config = read_json_config(source, asked_by)
    made, rename = _config_and_names(source, config, to)
    groups, dropped = _renamed(source, rename)
    needed, free = sum(part.size for parts in groups.values() for part in parts), free_bytes(target)
    if needed > free:
        raise InputError(
            f"{asked_by} {source}: is to be written in the {to} layout to {target}, which takes {needed / 2**30:.1f} "
            f"GiB, and {free / 2**30:.1f} GiB are free there"
        )
    with saving(target), new_folder(target) as folder:
        sizes = {name: sum(part.size for part in parts) for name, parts in groups.items()}
        write_shards(sizes, map(_joined, groups.values()), folder)
        for path in companion_files(source):
            if path.name not in ("config.json", SAVED_ORIGINAL_CONFIG) and not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
        if (source / CODEC_SUBFOLDER).is_dir():
            shutil.copytree(source / CODEC_SUBFOLDER, folder / CODEC_SUBFOLDER)
        write_json(folder / "config.json", made)
        if to == NATIVE and config is not made:
            write_json(folder / SAVED_ORIGINAL_CONFIG, config)
            if not (folder / PROCESSOR_CONFIG).is_file():
                bundled = (folder / CODEC_SUBFOLDER).is_dir()
                write_processor(folder, made, CODEC_SUBFOLDER if bundled else ORIGINAL_CODEC)
    return dropped


def write_processor(folder: Path, config: dict[str, Any], codec: str) -> None:
    """Write what transformers' processor loads, which folders in the original layout lack, with a codec's place."""
    extractor = DacFeatureExtractor(sampling_rate=SAMPLE_RATE, hop_length=1)  # the codec pads clips by itself
    values = {
        "processor_class": "HiggsAudioV2Processor",
        "feature_extractor": extractor.to_dict(),
        "audio_tokenizer": {
            "audio_tokenizer_class": "HiggsAudioV2TokenizerModel",
            "audio_tokenizer_name_or_path": codec,
        },
        "audio_token": AUDIO_OUT,
        "audio_bos_token": AUDIO_OUT_BOS,
        "audio_eos_token": AUDIO_EOS,
        "audio_delay_token": AUDIO_DELAY,
        "audio_stream_bos_id": config["audio_stream_bos_id"],
        "audio_stream_eos_id": config["audio_stream_eos_id"],
    }
    write_json(folder / PROCESSOR_CONFIG, values)
    template = files("higgs_ds.bases").joinpath("assets/chat_template.jinja").read_text(encoding="utf-8")
    write_text(folder / "chat_template.jinja", template)


def _config_and_names(
    source: Path, config: dict[str, Any], to: str
) -> tuple[dict[str, Any], Callable[[str], str | None]]:
    """The configuration in another layout, and how tensors are called there."""
    if MODEL_TYPES[config["model_type"]] == to:
        return config, lambda name: name
    if to == NATIVE:
        return native_config(config, special_tokens(source), str(source / "config.json")), native_name
    kept = source / SAVED_ORIGINAL_CONFIG
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8")), original_name
    return original_config(config, special_tokens(source)), original_name


def _renamed(source: Path, rename: Callable[[str], str | None]) -> tuple[dict[str, list[StoredTensor]], list[str]]:
    """What each tensor of the other layout is made of, in the order of its rows; and what is left out."""
    groups: dict[str, list[StoredTensor]] = {}
    dropped, unknown = [], []
    for stored in stored_tensors(source):
        try:
            name = rename(stored.name)
        except KeyError:
            unknown.append(stored.name)
            continue
        if name is None:
            dropped.append(stored.name)
        else:
            groups.setdefault(name, []).append(stored)
    if unknown:
        some = ", ".join(sorted(unknown)[:3])
        raise InputError(f"{source}: {len(unknown)} tensors are of neither layout, for instance {some}")
    for parts in groups.values():
        parts.sort(key=lambda stored: part_of_rows(stored.name))
    return groups, dropped


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """The tensors of a model's safetensors files or, where it has none, of its pickled ones, which run nothing.

    Raises InputError where files are missing or damaged.
    """
    pickled = pickled_files(folder)
    if not pickled:
        files = weight_files(folder)
        weight_shapes(files)  # names those that are damaged
        for path in files:
            for name, (start, stop) in byte_ranges(path).items():
                yield StoredTensor(name, stop - start, partial(read_tensor, path, name))
    for path in pickled:
        for name, tensor in _unpickled(path).items():
            yield StoredTensor(name, tensor.nbytes, tensor.clone)


def pickled_files(folder: Path) -> list[Path]:
    """The files of a model that holds its weights as torch.save writes them, and not as safetensors."""
    if any(folder.glob("*.safetensors")) or (folder / WEIGHT_INDEX).is_file():
        return []
    indexed = indexed_files(folder, "pytorch_model.bin.index.json")
    return indexed or sorted(path for path in folder.iterdir() if path.suffix in _PICKLED)


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, mapped and not read where its format allows."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of a format before 2020, which cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: is no file of weights, or holds more than tensors: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: holds something else than tensors by name")
    return dict(state)


def _joined(parts: list[StoredTensor]) -> torch.Tensor:
    tensors = [part.read() for part in parts]
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)
