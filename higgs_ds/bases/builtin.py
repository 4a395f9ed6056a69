"""The bases that the project brings along, by name: one that speaks digits, and one of random weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, HiggsAudioV2Config

from higgs_ds.bases import tiny_random
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import new_folder, saving, write_json
from higgs_ds.common.hub import resolve_folder
from higgs_ds.common.tensor_files import weight_shapes
from higgs_ds.model.loading import read_config

ASSETS = Path(__file__).parent / "assets"
DEFAULT_BASE, SPEAKING_CODEC = "speaking-base", "speaking-codec"
# What a user is told of each.
BUILT_IN = {
    DEFAULT_BASE: "built in, small: for trying out, it speaks digits",
    tiny_random.BASE_NAME: "built in, random: for trying out, it speaks noise",
}
WEIGHTS = "model.safetensors"
PARTS = {
    DEFAULT_BASE: ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS),
    SPEAKING_CODEC: ("config.json", WEIGHTS),
}


def is_builtin(name: str) -> bool:
    """Whether a base of this name comes with the project."""
    return name in BUILT_IN


def which_builtin(name: str | None) -> str | None:
    """The built-in base that is meant, which is DEFAULT_BASE where none is named; None where another one is.

    A folder of that name in the working directory comes before the built-in base.
    """
    if name is None:
        return DEFAULT_BASE
    return name if is_builtin(name) and not Path(name).is_dir() else None


def find_base(name: str | None, asked_by: str, cache_dir: Path, revision: str | None = None) -> Path:
    """The folder of a base: built in, by default DEFAULT_BASE, a folder, or a hub id at a `revision`.

    Raises InputError, beginning with `asked_by`, where there is none of that name; SaveError.
    """
    built_in = which_builtin(name)
    if built_in is not None:
        return builtin_base(built_in, cache_dir)
    assert name is not None  # that would be the default
    return resolve_folder(name, asked_by, revision)


def builtin_base(name: str, cache_dir: Path) -> Path:
    """The folder of a built-in base, in float32, made on first use; several processes may ask at once.

    Raises InputError where there is none of that name, or the project is not installed whole; SaveError.
    """
    _check(name)
    if name == tiny_random.BASE_NAME:
        return tiny_random.random_base(cache_dir)
    home = cache_dir / f"speaking-{_assets_digest()[:12]}"
    codec, base = home / SPEAKING_CODEC, home / DEFAULT_BASE
    if not codec.is_dir():
        _copy_in_float32(SPEAKING_CODEC, codec)
    if not base.is_dir():
        _copy_in_float32(DEFAULT_BASE, base, codec)
    return base


def builtin_config(name: str) -> HiggsAudioV2Config:
    """The configuration of a built-in base, which need not be made for it. Raises InputError as `builtin_base` does."""
    _check(name)
    if name == tiny_random.BASE_NAME:
        return tiny_random.random_config()
    config = read_config(ASSETS / DEFAULT_BASE)
    config.dtype = torch.float32
    return config


def _check(name: str) -> None:
    """Raise InputError for a name of no built-in base, and where the files of this one are not all there."""
    if not is_builtin(name):
        raise InputError(f"{name}: is no built-in base; there are {' and '.join(BUILT_IN)}")
    if name == tiny_random.BASE_NAME:
        return
    paths = [ASSETS / folder / part for folder, parts in PARTS.items() for part in parts]
    missing = [str(path.relative_to(ASSETS)) for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{ASSETS}: lacks {', '.join(missing)} of the built-in base {name}; the project is not installed whole. "
            "Install it anew, or name another base"
        )
    weight_shapes([path for path in paths if path.name == WEIGHTS])


def _assets_digest() -> str:
    """SHA-256 over all that the speaking base is made of: another one has another folder in the cache."""
    digest = hashlib.sha256((ASSETS / "chat_template.jinja").read_bytes())
    for folder in PARTS:
        for path in sorted(path for path in (ASSETS / folder).iterdir() if path.is_file()):
            content = path.read_bytes()
            digest.update(f"{folder}/{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _copy_in_float32(asset: str, target: Path, codec: Path | None = None) -> None:
    """Copy a model of the assets to a new folder, its weights in float32; a base gets a processor with its `codec`."""
    source = ASSETS / asset
    with saving(target), new_folder(target) as folder:
        for path in source.iterdir():
            if path.is_file() and path.name not in ("config.json", WEIGHTS):
                shutil.copyfile(path, folder / path.name)
        write_json(
            folder / "config.json", _in_float32(json.loads((source / "config.json").read_text(encoding="utf-8")))
        )
        tensors = load_file(source / WEIGHTS).items()
        wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors}
        save_file(wide, folder / WEIGHTS, {"format": "pt"})
        if codec is not None:
            tiny_random.build_processor(AutoTokenizer.from_pretrained(source), codec).save_pretrained(folder)


def _in_float32(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose models, those within it too, are told to be in float32."""
    return {
        key: _in_float32(value) if isinstance(value, dict) else "float32" if key == "dtype" else value
        for key, value in values.items()
    }
