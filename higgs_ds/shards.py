"""Tensors that come one after another, in files of about a gigabyte; and read again one by one, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from higgs_ds.errors import SaveError
from higgs_ds.files import release_freed_memory, write_json
from higgs_ds.hub import all_there, indexed_files, read_tensor, weight_shapes

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
    return indexed_files(folder, _index(stem)) or all_there(folder, [f"{stem}.safetensors"])


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
