"""Safetensors files: headers and single tensors are read, many tensors are written in files of about a gigabyte."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from higgs_ds.common.errors import InputError, SaveError
from higgs_ds.common.files import release_freed_memory, write_json

WEIGHT_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, as its index names them. Raises InputError where any is missing."""
    return indexed_files(folder, WEIGHT_INDEX) or require_files(folder, ["model.safetensors"])


def indexed_files(folder: Path, index: str) -> list[Path]:
    """The files that an index of weights names; none without an index. Raises InputError where one is missing."""
    if not (folder / index).is_file():
        return []
    return require_files(folder, json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())


def require_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Files by name. Raises InputError where one is missing."""
    files = [folder / name for name in sorted(set(names))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise InputError(f"{folder}: lacks {', '.join(missing)}")
    return files


def companion_files(folder: Path) -> list[Path]:
    """What lies beside a model's weights: configuration, tokenizer, template, generation settings."""
    return [
        path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model")
    ]


def weight_locations(folder: Path) -> dict[str, Path]:
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


SHARD_BYTES = 2**30


def write_shards(sizes: Mapping[str, int], tensors: Iterator[torch.Tensor], folder: Path, stem: str = "model") -> None:
    """Write tensors to STEM.safetensors, or where they are large to several files with an index, as models have them.

    The tensors of one file are in memory at a time.

    Args:
        sizes: bytes of each tensor by its name, in the order in which they come.

    Raises SaveError where one reads back otherwise than written.
    """
    written: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    bytes_held = 0
    for name, size in sizes.items():
        if held and bytes_held + size > SHARD_BYTES:
            written.append(_write(held, _numbered(folder, stem, len(written) + 1)))
            bytes_held = 0
        held[name] = next(tensors).contiguous()
        bytes_held += size
    written.append(_write(held, _numbered(folder, stem, len(written) + 1)))
    places: dict[str, str] = {}
    for number, names in enumerate(written, start=1):
        one = len(written) == 1
        file = f"{stem}.safetensors" if one else f"{stem}-{number:05d}-of-{len(written):05d}.safetensors"
        _numbered(folder, stem, number).rename(folder / file)
        places |= dict.fromkeys(names, file)
    if len(written) > 1:
        write_json(folder / _index(stem), {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def _numbered(folder: Path, stem: str, number: int) -> Path:
    return folder / f"{stem}-{number:05d}.safetensors"


def _index(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def _write(held: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Write tensors and let go of them; their names."""
    save_file(held, path, {"format": "pt"})
    for name, tensor in held.items():
        if not _bits(read_tensor(path, name)).equal(_bits(tensor)):
            raise SaveError(f"{path}: {name} reads back otherwise than written")
    names = list(held)
    held.clear()
    release_freed_memory()
    return names


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: NaN equals itself there."""
    return tensor.flatten().view(torch.uint8)


def shard_files(folder: Path, stem: str = "model") -> list[Path]:
    """The files that `write_shards` has written. Raises InputError where one is missing."""
    return indexed_files(folder, _index(stem)) or require_files(folder, [f"{stem}.safetensors"])


class StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of some files by name, each read when it is asked for.

    The file that was read last stays open, as long as the next tensor is in it, too.
    """

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        """Take those of the tensors whose names begin with `prefix`, and call them without it.

        Raises InputError where a file is damaged.
        """
        found = {name: (path, shape) for path in files for name, shape in weight_shapes([path]).items()}
        own = {name.removeprefix(prefix): place for name, place in found.items() if name.startswith(prefix)}
        self.places = {name: path for name, (path, _) in own.items()}
        self.sizes = {name: 4 * math.prod(shape) for name, (_, shape) in own.items()}  # bytes in float32
        self.prefix = prefix
        self._open: tuple[Path, safe_open] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self.places[name]
        if self._open is None or self._open[0] != path:
            self._open = None  # before the next one is mapped
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1].get_tensor(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
