"""Rewrite a model's files in another layout or as safetensors: without loss, one file in memory at a time."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import free_bytes, new_folder, saving, sha256_of, write_json, write_text
from higgs_ds.common.tensor_files import (
    WEIGHT_INDEX,
    byte_ranges,
    companion_files,
    indexed_files,
    read_tensor,
    weight_files,
    weight_locations,
    weight_shapes,
    write_shards,
)
from higgs_ds.data.codec_info import (
    CODEC_SUBFOLDER,
    ORIGINAL_CODEC,
    PROCESSOR_CONFIG,
    is_original_codec,
    read_codec_json,
)
from higgs_ds.model.families import MODEL_TYPES, family_of, read_json_config, special_tokens
from higgs_ds.model.family import Family
from higgs_ds.options.fields import NATIVE

if TYPE_CHECKING:
    import torch

SAVED_ORIGINAL_CONFIG = "original_config.json"  # stored with a native model that was converted from an original one
SAMPLE_RATE = 24000  # Hz; all codecs of this family use it
_CACHE_VERSION = 2  # of converted models in the cache: raise it with every change to what is written
ORIGINAL_CODEC_FILE = "model.pth"
_PICKLED = (".bin", ".pth", ".pt")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its name, its size in bytes, and a function that reads it."""

    name: str
    size: int
    read: Callable[[], torch.Tensor]


def native_folder(folder: Path, asked_by: str, cache_dir: Path) -> Path:
    """Return `folder` if it holds a native model in safetensors; else convert it once, and return the cached folder.

    Raises:
        InputError: it is not a model of this family, it is damaged, or there is not enough free disk space. The
            message begins with `asked_by`.
        SaveError: writing fails.
    """
    config = read_json_config(folder, asked_by)
    if MODEL_TYPES[config["model_type"]] == NATIVE and not pickled_files(folder):
        return folder
    weights = pickled_files(folder) or weight_files(folder)
    stamps = _stamps(weights)
    identity = hashlib.sha256(repr((_CACHE_VERSION, sha256_of(folder / "config.json"), stamps)).encode()).hexdigest()
    target = cache_dir / "converted" / identity[:32]
    if not target.is_dir():
        rewrite(folder, target, NATIVE, asked_by)
    return target


def _stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def native_codec(folder: Path, asked_by: str, cache_dir: Path) -> Path:
    """Return `folder` if it holds a codec that transformers reads; else convert it once, and return the cached folder.

    Raises:
        InputError: it does not hold a codec in either layout, or a damaged one. The message begins with `asked_by`.
        SaveError: writing fails.
    """
    config = read_codec_json(folder)
    if not is_original_codec(config):
        return folder
    where, path = f"{asked_by} {folder}", folder / ORIGINAL_CODEC_FILE
    if not path.is_file():
        raise InputError(f"{where}: missing {ORIGINAL_CODEC_FILE}")
    identity = hashlib.sha256(f"{sha256_of(folder / 'config.json')} {sha256_of(path)}".encode()).hexdigest()
    target = cache_dir / "converted" / f"codec-{identity[:32]}"
    if not target.is_dir():
        write_codec(target, config, _load_pickled(path), where)
    return target


def bundled_codec(folder: Path, prefix: str, asked_by: str, cache_dir: Path) -> Path | None:
    """Return the cached folder of a codec that is in a base's own files; None if there is none.

    Args:
        prefix: of the names of the codec's tensors.

    Raises:
        InputError: the tensors are not those of a codec. The message begins with `asked_by`.
        SaveError: writing fails.
    """
    from higgs_ds.data.codec_layout import RELEASED

    places = {name: path for name, path in weight_locations(folder).items() if name.startswith(prefix)}
    if not places:
        return None
    stamps = _stamps(sorted(set(places.values())))
    target = cache_dir / "converted" / f"codec-{hashlib.sha256(repr(stamps).encode()).hexdigest()[:32]}"
    if not target.is_dir():
        tensors = {name.removeprefix(prefix): read_tensor(path, name) for name, path in places.items()}
        write_codec(target, RELEASED, tensors, f"{asked_by} {folder}: its audio codec")
    return target


def write_codec(target: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], where: str) -> None:
    """Write a codec as a new folder that transformers reads, in float32.

    Args:
        config: the values of its configuration in the original layout that its tensors do not show.
        tensors: by their names in either layout.

    Raises:
        InputError: starting with `where`; the tensors are not those of a codec.
        SaveError: writing fails.
    """
    import torch
    from safetensors.torch import save_file

    from higgs_ds.data.codec import check_codec_tensors
    from higgs_ds.data.codec_layout import native_codec_config, native_codec_tensors

    new_config = native_codec_config(config, tensors, where)
    weights = native_codec_tensors(tensors, len(config["ratios"]))
    check_codec_tensors(where, new_config, weights)
    new_config.architectures, new_config.dtype = ["HiggsAudioV2TokenizerModel"], torch.float32
    with saving(target), new_folder(target) as temporary:
        new_config.save_pretrained(temporary)
        in_float32 = {n: t.float().contiguous() if t.is_floating_point() else t for n, t in weights.items()}
        save_file(in_float32, temporary / "model.safetensors", {"format": "pt"})


def rewrite(source: Path, target: Path, to: str, asked_by: str) -> list[str]:
    """Write a base or merged model to a new folder in the layout `to`: its own or the other one.

    Returns:
        The names of tensors that the layout `to` has no use for; they are not written.

    Raises:
        InputError: `source` is not such a model, or there is not enough free disk space. The message begins with
            `asked_by`.
        SaveError: writing fails.
    """
    config = read_json_config(source, asked_by)
    new_config, rename = _config_and_names(source, config, to)
    groups, dropped = _group_by_new_name(source, rename, family_of(config["model_type"]))
    needed, free = sum(part.size for parts in groups.values() for part in parts), free_bytes(target)
    if needed > free:
        raise InputError(
            f"{asked_by} {source}: writing it in the {to} layout to {target} takes {needed / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free there"
        )
    with saving(target), new_folder(target) as folder:
        sizes = {name: sum(part.size for part in parts) for name, parts in groups.items()}
        write_shards(sizes, map(_concatenate, groups.values()), folder)
        for path in companion_files(source):
            if path.name not in ("config.json", SAVED_ORIGINAL_CONFIG) and not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
        if (source / CODEC_SUBFOLDER).is_dir():
            shutil.copytree(source / CODEC_SUBFOLDER, folder / CODEC_SUBFOLDER)
        write_json(folder / "config.json", new_config)
        if to == NATIVE and config is not new_config:
            write_json(folder / SAVED_ORIGINAL_CONFIG, config)
            if not (folder / PROCESSOR_CONFIG).is_file():
                bundled = (folder / CODEC_SUBFOLDER).is_dir()
                codec = CODEC_SUBFOLDER if bundled else ORIGINAL_CODEC
                for name, content in family_of(new_config["model_type"]).processor_files(new_config, codec).items():
                    if isinstance(content, str):
                        write_text(folder / name, content)
                    else:
                        write_json(folder / name, content)
    return dropped


def _config_and_names(
    source: Path, config: dict[str, Any], to: str
) -> tuple[dict[str, Any], Callable[[str], str | None]]:
    """Return the configuration in the layout `to`, and a function that maps tensor names to that layout."""
    family = family_of(config["model_type"])
    if MODEL_TYPES[config["model_type"]] == to:
        return config, lambda name: name
    if to == NATIVE:
        return family.native_config(config, special_tokens(source), str(source / "config.json")), family.native_name
    kept = source / SAVED_ORIGINAL_CONFIG
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8")), family.original_name
    return family.original_config(config, special_tokens(source)), family.original_name


def _group_by_new_name(
    source: Path, rename: Callable[[str], str | None], family: Family
) -> tuple[dict[str, list[StoredTensor]], list[str]]:
    """Return the tensors that make up each tensor of the new layout, in the order of its rows, and the dropped names.

    Raises:
        InputError: a tensor belongs to neither layout.
    """
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
        raise InputError(f"{source}: {len(unknown)} tensors belong to neither layout, for instance {some}")
    for parts in groups.values():
        parts.sort(key=lambda stored: family.part_of_rows(stored.name))
    return groups, dropped


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a model's safetensors files or, if it has none, of its pickled files, without running code.

    Raises:
        InputError: files are missing or damaged.
    """
    pickled = pickled_files(folder)
    if not pickled:
        files = weight_files(folder)
        weight_shapes(files)  # raises InputError with the names of damaged files
        for path in files:
            for name, (start, stop) in byte_ranges(path).items():
                yield StoredTensor(name, stop - start, partial(read_tensor, path, name))
    for path in pickled:
        for name, tensor in _load_pickled(path).items():
            yield StoredTensor(name, tensor.nbytes, tensor.clone)


def pickled_files(folder: Path) -> list[Path]:
    """Return the weight files that torch.save wrote; empty if the model has safetensors files."""
    if any(folder.glob("*.safetensors")) or (folder / WEIGHT_INDEX).is_file():
        return []
    indexed = indexed_files(folder, "pytorch_model.bin.index.json")
    return indexed or sorted(path for path in folder.iterdir() if path.suffix in _PICKLED)


def _load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Load the tensors of a torch.save file, memory-mapped if its format allows it."""
    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before 2020 cannot be memory-mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: is not a file of weights, or holds more than tensors: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: must hold a dictionary of tensors by name")
    return dict(state)


def _concatenate(parts: list[StoredTensor]) -> torch.Tensor:
    import torch

    tensors = [part.read() for part in parts]
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors)
