"""Folders of models: found by path or hub id, and the weight files in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from higgs_ds.errors import InputError

WEIGHT_INDEX = "model.safetensors.index.json"
KEPT_CONFIG = "original_config.json"  # beside a native model that was made from an original one
# What a hub id stands for where no revision is given: its content was replaced by another once, and may be again.
PINNED = {
    "bosonai/higgs-audio-v2-generation-3B-base": "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84",
    "bosonai/higgs-audio-v2-tokenizer": "9d4988fbd4ad07b4cac3a5fa462741a41810dbec",
}


def resolve_folder(name: str, asked_by: str, revision: str | None = None) -> Path:
    """The folder of a model named by path or hub id; a hub id is downloaded into the hub's cache.

    Args:
        revision: commit, tag or branch of a hub id; without one that of PINNED, or the newest.

    Raises InputError, beginning with `asked_by`: there is neither such a folder nor such a repository.
    """
    return _resolve(name, asked_by, lambda: Path(snapshot_download(name, revision=revision or PINNED.get(name))))


def resolve_config_folder(name: str, asked_by: str, revision: str | None = None) -> Path:
    """As `resolve_folder`, but of a hub id only config.json is downloaded."""
    revision = revision or PINNED.get(name)
    return _resolve(name, asked_by, lambda: Path(hf_hub_download(name, "config.json", revision=revision)).parent)


def _resolve(name: str, asked_by: str, download: Callable[[], Path]) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not is_hub_id(name):
        raise InputError(f"{asked_by} {name}: no such folder (a hub id has the form OWNER/NAME)")
    try:
        return download()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{asked_by} {name}: neither a folder here nor to be had from the hub: {reason}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, as its index names them. Raises InputError where any is missing."""
    return indexed_files(folder, WEIGHT_INDEX) or all_there(folder, ["model.safetensors"])


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's, OWNER/NAME, and not of a path."""
    return name.count("/") == 1 and name[0] not in "./~"


def indexed_files(folder: Path, index: str) -> list[Path]:
    """The files that an index of weights names; none without an index. Raises InputError where one is missing."""
    if not (folder / index).is_file():
        return []
    return all_there(folder, json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())


def all_there(folder: Path, names: Iterable[str]) -> list[Path]:
    """Files by name. Raises InputError where one is missing."""
    files = [folder / name for name in sorted(set(names))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise InputError(f"{folder}: lacks {', '.join(missing)}")
    return files


def companions(folder: Path) -> list[Path]:
    """What lies beside a model's weights: configuration, tokenizer, template, generation settings."""
    return [
        path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model")
    ]


def weight_places(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a model. Raises InputError where a file is missing or damaged."""
    return {name: path for path in weight_files(folder) for name in weight_shapes([path])}


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a file, which is opened for it alone: what is read of a file stays in memory until it is closed."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def read_rows(path: Path, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows of one tensor of a file."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice(name)[start:stop]


def byte_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Where in a safetensors file each tensor's bytes begin and end, to write them in place.

    The format (huggingface.co/docs/safetensors): 8 bytes with the header's length, little-endian; a header in JSON with
    offsets behind it; the data.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    start = 8 + length
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def weight_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in some safetensors files, from their headers alone. Raises InputError for others."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: is no safetensors file, or a damaged one: {error}") from error
    return shapes
