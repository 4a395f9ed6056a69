"""Safetensors files: read headers and single tensors, and write many tensors in files of about a gigabyte."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from higgs_ds.common.errors import InputError, SaveError
from higgs_ds.common.files import release_freed_memory, write_json

if TYPE_CHECKING:
    import torch

WEIGHT_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model, as its index lists them. Raises InputError if any is missing."""
    return indexed_files(folder, WEIGHT_INDEX) or require_files(folder, ["model.safetensors"])


def indexed_files(folder: Path, index: str) -> list[Path]:
    """Return the files that a weight index lists; none without an index. Raises InputError if any is missing."""
    if not (folder / index).is_file():
        return []
    return require_files(folder, json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())


def require_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the paths of files in a folder. Raises InputError if any is missing."""
    files = [folder / name for name in sorted(set(names))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise InputError(f"{folder}: missing {', '.join(missing)}")
    return files


def companion_files(folder: Path) -> list[Path]:
    """Return the files beside a model's weights: configuration, tokenizer, chat template, generation settings."""
    return [
        path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model")
    ]


def weight_locations(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor of a model. Raises InputError if a file is missing or damaged."""
    return {name: path for path in weight_files(folder) for name in weight_shapes([path])}


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """Read one tensor. The file is opened for it alone: what is read stays in memory until the file is closed."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def read_rows(path: Path, name: str, start: int, stop: int) -> torch.Tensor:
    """Read rows `start` to `stop` (exclusive) of one tensor."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice(name)[start:stop]


def byte_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Return where each tensor's bytes begin and end in a safetensors file, to write them in place.

    The format (huggingface.co/docs/safetensors): 8 bytes with the header's length, little-endian; a JSON header with
    each tensor's offsets, counted from the end of the header; the data.
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
    """Read the shape of every tensor in safetensors files, from the headers. Raises InputError for any other file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as file:  # headers only, without importing torch
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a safetensors file, or damaged: {error}") from error
    return shapes


_SAMPLES, _SAMPLE_BYTES = 8, 512  # of each tensor


def sampled_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the names, sizes and some bytes of all tensors, in whichever of the files each of them is.

    The bytes are evenly spread over each tensor, so that weights that were trained or merged have another digest, and
    a large model's takes no time.
    """
    samples: dict[str, list[bytes]] = {}
    for path in files:
        with path.open("rb") as file:
            for name, (start, stop) in byte_ranges(path).items():
                samples[name] = [str(stop - start).encode()]
                for number in range(_SAMPLES):
                    file.seek(start + (stop - start) * number // _SAMPLES)
                    samples[name].append(file.read(min(_SAMPLE_BYTES, stop - file.tell())))
    hashed = hashlib.sha256()
    for name, parts in sorted(samples.items()):
        hashed.update(repr((name, parts)).encode())
    return hashed.hexdigest()


SHARD_BYTES = 2**30


def write_shards(sizes: Mapping[str, int], tensors: Iterator[torch.Tensor], folder: Path, stem: str = "model") -> None:
    """Write tensors to STEM.safetensors, or to several files with an index if they are large, as models are stored.

    Only the tensors of one file are in memory at a time.

    Args:
        sizes: bytes of each tensor by name, in the order of `tensors`.

    Raises:
        SaveError: a tensor reads back differently than written.
    """
    written: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = 0
    for name, size in sizes.items():
        if pending and pending_bytes + size > SHARD_BYTES:
            written.append(_write_shard(pending, _shard_path(folder, stem, len(written) + 1)))
            pending_bytes = 0
        pending[name] = next(tensors).contiguous()
        pending_bytes += size
    written.append(_write_shard(pending, _shard_path(folder, stem, len(written) + 1)))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(written, start=1):
        single = len(written) == 1
        file = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(written):05d}.safetensors"
        _shard_path(folder, stem, number).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(written) > 1:
        write_json(
            folder / _index_name(stem), {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        )


def _shard_path(folder: Path, stem: str, number: int) -> Path:
    return folder / f"{stem}-{number:05d}.safetensors"


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def _write_shard(tensors: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Write tensors to one file, verify them, clear the dict to free them, and return their names."""
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt"})
    for name, tensor in tensors.items():
        if not _bytes_of(read_tensor(path, name)).equal(_bytes_of(tensor)):
            raise SaveError(f"{path}: {name} reads back differently than written")
    names = list(tensors)
    tensors.clear()
    release_freed_memory()
    return names


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as bytes, in which NaN equals itself."""
    import torch

    return tensor.flatten().view(torch.uint8)


def shard_files(folder: Path, stem: str = "model") -> list[Path]:
    """Return the files that `write_shards` has written. Raises InputError if any is missing."""
    return indexed_files(folder, _index_name(stem)) or require_files(folder, [f"{stem}.safetensors"])


class StoredTensors(Mapping[str, "torch.Tensor"]):
    """Tensors of safetensors files by name, read on access.

    The file that was read last stays open until a tensor of another file is read.
    """

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        """Select the tensors whose names begin with `prefix`, and strip it from their names.

        Raises:
            InputError: a file is damaged.
        """
        found = {name: (path, shape) for path in files for name, shape in weight_shapes([path]).items()}
        selected = {name.removeprefix(prefix): place for name, place in found.items() if name.startswith(prefix)}
        self.places = {name: path for name, (path, _) in selected.items()}
        self.sizes = {name: 4 * math.prod(shape) for name, (_, shape) in selected.items()}  # bytes in float32
        self.prefix = prefix
        self._open: tuple[Path, safe_open] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self.places[name]
        if self._open is None or self._open[0] != path:
            self._open = None  # close it before the next file is mapped
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1].get_tensor(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
