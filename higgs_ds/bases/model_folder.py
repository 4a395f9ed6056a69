"""Write a model's folder: a copy of a base's folder with some of its weights changed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from higgs_ds.bases.conversion import native_codec, rewrite
from higgs_ds.common.console import warn
from higgs_ds.common.errors import InputError, SaveError
from higgs_ds.common.files import (
    free_bytes,
    new_folder,
    release_freed_memory,
    replaced_folder,
    saving,
    why_not_writable,
    write_json,
)
from higgs_ds.common.hub import PINNED, is_hub_id
from higgs_ds.common.lock import lock_beside, locked
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.common.tensor_files import WEIGHT_INDEX, byte_ranges, companion_files, read_tensor, weight_shapes
from higgs_ds.data.codec_info import CODEC_SUBFOLDER, PROCESSOR_CONFIG, find_codec
from higgs_ds.model.families import family_of
from higgs_ds.model.parts import parts_of
from higgs_ds.options.fields import NATIVE, ORIGINAL

PARTS_FILE = "parts.safetensors"
# Keys whose values may be paths of the machine that a model was saved on.
PATH_KEYS = {
    "config.json": ("_name_or_path",),
    "tokenizer_config.json": ("name_or_path", "special_tokens_map_file", "tokenizer_file"),
}


def named_codec(name: str | None) -> Path | None:
    """Return the native folder of the codec that --codec_ckpt names, or None if `name` is None.

    Raises:
        InputError: there is no such codec.
    """
    return None if name is None else native_codec(find_codec(Path(), name), "--codec_ckpt", default_cache_dir())


@contextlib.contextmanager
def model_folder(
    base_folder: Path,
    output_folder: Path,
    needed_bytes: int,
    export_layout: str,
    overwrite: bool,
    codec_folder: Path | None,
) -> Iterator[Path]:
    """Yield a folder with a copy of a base's other files, to write a native model's weights to.

    After the block it is converted to `export_layout` and becomes `output_folder`.

    Raises:
        InputError: `output_folder` exists without `overwrite`, another process is writing it, or the disk is too full
            for a native model of `needed_bytes` (and its other layout).
        SaveError: writing fails.
    """
    # Programs that read the original layout have the codec in a form of their own.
    codec = codec_folder if export_layout == ORIGINAL else _codec_to_store(base_folder, codec_folder)
    needed_bytes += sum(path.stat().st_size for path in codec.rglob("*") if path.is_file()) if codec else 0
    needed_bytes *= 1 if export_layout == NATIVE else 2  # another layout is written from the native one
    check_output(output_folder, needed_bytes, overwrite)
    with (
        saving(output_folder),
        sole_writer(output_folder),
        (replaced_folder if overwrite else new_folder)(output_folder) as folder,
    ):
        check_output(output_folder, needed_bytes, overwrite)  # again: another process may have just finished
        native = folder if export_layout == NATIVE else folder / NATIVE
        native.mkdir(exist_ok=True)
        _copy_companion_files(base_folder, native, codec)
        yield native
        if export_layout != NATIVE:
            rewrite(native, folder / ORIGINAL, ORIGINAL, "merged model")
        if export_layout == ORIGINAL:
            shutil.rmtree(native)
            for path in (folder / ORIGINAL).iterdir():
                path.rename(folder / path.name)
            (folder / ORIGINAL).rmdir()


@contextlib.contextmanager
def sole_writer(output_folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder that appears as a whole. Raises as `OutputLock.acquire`."""
    output_folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_beside(output_folder), f"--output_path {output_folder}", warn):
        yield


def check_output(folder: Path, needed_bytes: int, overwrite: bool) -> None:
    """Check that a model of `needed_bytes` can be written to a folder.

    Raises:
        InputError: the folder holds other files without `overwrite`, it is not writable, or the disk is too full.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not overwrite)):
        raise InputError(f"{folder}: already exists; choose a new folder for the merged model")
    reason = why_not_writable(folder)
    if reason:
        raise InputError(f"{folder}: cannot be written to: {reason}; choose another --output_path")
    free = free_bytes(folder)
    if free < needed_bytes * 1.05:
        raise InputError(
            f"{folder}: only {free / 2**30:.1f} GiB are free, but the merged model takes {needed_bytes / 2**30:.1f} GiB"
        )


def write_shard(
    source: Path, target: Path, changed: Collection[str], value: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """Copy one file of weights and overwrite those that change. The dtype and size of each weight stay the same.

    Args:
        changed: names of the weights that change.
        value: computes a weight's new value from its name and old value.

    Raises:
        SaveError: a new value is not finite in the weight's dtype, or it reads back differently than written.
    """
    shutil.copyfile(source, target)
    for name, (start, stop) in byte_ranges(target).items():
        if name not in changed:
            continue
        tensor = read_tensor(source, name)
        merged = value(name, tensor).to(tensor.dtype).contiguous()
        if not merged.isfinite().all():
            raise SaveError(f"{source}: {name} is not finite in {tensor.dtype}")
        with target.open("r+b") as file:
            file.seek(start)
            written = file.write(merged.flatten().view(torch.uint8).numpy().data)
        if written != stop - start or not torch.equal(read_tensor(target, name), merged):
            raise SaveError(f"{target}: {name} reads back differently than written")
        release_freed_memory()


def add_parts(folder: Path, shards: list[Path], added: Mapping[str, torch.Tensor], config: Any) -> None:
    """Write the weights of added parts, in the dtype of the base's norms, and list them in the index and the config."""
    places = {name: shard.name for shard in shards for name in weight_shapes([shard])}
    dtype = read_tensor(folder / places["model.norm.weight"], "model.norm.weight").dtype
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in added.items()}, folder / PARTS_FILE)
    write_json(folder / WEIGHT_INDEX, {"weight_map": places | dict.fromkeys(added, PARTS_FILE)})
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = config.to_dict()
    written |= {
        name: values[name] for name in ("model_type", "audio_self_attention", "audio_tower", "audio_in_token_id")
    }
    write_json(folder / "config.json", written)


def check_layout(config: Any, export_layout: str) -> None:
    """Raise InputError if a model is to be written in a layout that its family does not have, or without its parts."""
    family, parts = family_of(config.model_type), parts_of(config)
    if export_layout != NATIVE and ORIGINAL not in family.model_types.values():
        raise InputError(f"--export_layout {export_layout}: {family.title} has one layout, {NATIVE}")
    if parts and export_layout != ORIGINAL:
        raise InputError(
            f"--export_layout {export_layout}: the native layout has no place for the model's {parts}; give "
            f"--export_layout {ORIGINAL}"
        )


def _copy_companion_files(base_folder: Path, folder: Path, codec: Path | None) -> None:
    """Copy the base's files except its weights, and `codec`.

    A copied codec is referenced relative to the model's folder, so that the model can be moved or uploaded.
    """
    for path in companion_files(base_folder):
        shutil.copy(path, folder)
    _remove_paths(folder)
    if codec is None:
        return
    shutil.copytree(codec, folder / CODEC_SUBFOLDER)
    _remove_paths(folder / CODEC_SUBFOLDER)
    if not (folder / PROCESSOR_CONFIG).is_file():
        return
    config = json.loads((folder / PROCESSOR_CONFIG).read_text(encoding="utf-8"))
    reference = config.get("audio_tokenizer") or {}
    config["audio_tokenizer"] = reference | {"audio_tokenizer_name_or_path": CODEC_SUBFOLDER}
    write_json(folder / PROCESSOR_CONFIG, config)


def _remove_paths(folder: Path) -> None:
    """Remove the absolute paths that versions of transformers wrote into a model's files."""
    for name, keys in PATH_KEYS.items():
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            found = {key for key in keys if Path(str(values.get(key))).is_absolute()}
            if found:
                write_json(folder / name, {key: value for key, value in values.items() if key not in found})


def _codec_to_store(base_folder: Path, given: Path | None) -> Path | None:
    """Return the native codec to store in a model's folder.

    None if the base has none in a folder of its own, or if transformers gets this codec by the hub id that the base
    names. For an id in PINNED it does not: it reads the newest revision, which may be another codec, or in the original
    layout.

    Raises:
        InputError: the base names a codec that does not exist.
    """
    path, inside = base_folder / PROCESSOR_CONFIG, base_folder / CODEC_SUBFOLDER
    if not path.is_file():
        return given or (inside if inside.is_dir() else None)
    reference = json.loads(path.read_text(encoding="utf-8")).get("audio_tokenizer") or {}
    name = reference.get("audio_tokenizer_name_or_path") or ""
    is_valid_name = not name or (is_hub_id(name) and name not in PINNED and not Path(name).is_dir())
    if given is not None or (is_valid_name and not (base_folder / CODEC_SUBFOLDER).is_dir()):
        return given
    return native_codec(find_codec(base_folder, None), "--codec_ckpt", default_cache_dir())
