"""The built-in bases, by name: a small one that speaks digits, and a tiny one with random weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from higgs_ds.common.console import warn
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import new_folder, saving, write_json
from higgs_ds.common.hub import RELEASED_BASE, is_hub_id, resolve_folder
from higgs_ds.common.resources import SAMPLES
from higgs_ds.common.tensor_files import weight_shapes
from higgs_ds.model.families import FAMILIES, family_of

ASSETS = Path(__file__).parent / "assets"
DEFAULT_BASE, SPEAKING_CODEC, RANDOM_BASE = "speaking-base", "speaking-codec", "tiny-random-base"
SPEAKING_BASES = [f"{DEFAULT_BASE}{family.suffix}" for family in FAMILIES]
RANDOM_BASES = {f"{RANDOM_BASE}{family.suffix}": family for family in FAMILIES}
# Descriptions for users.
BUILT_IN = {
    **dict.fromkeys(SPEAKING_BASES, "built in, small: speaks digits, for trying out the trainer"),
    **dict.fromkeys(RANDOM_BASES, "built in, random weights: generates noise, for trying out the trainer"),
}
RANDOM_VERSION = "3"  # part of the random base's folder: raise it with every change to what `tiny_random` builds
WEIGHTS = "model.safetensors"
PARTS = {
    **dict.fromkeys(
        SPEAKING_BASES,
        ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS),
    ),
    SPEAKING_CODEC: ("config.json", WEIGHTS),
}


def is_builtin(name: str) -> bool:
    """Whether this is the name of a built-in base."""
    return name in BUILT_IN


def which_builtin(name: str | None) -> str | None:
    """Return the built-in base that `name` refers to: DEFAULT_BASE for None, and None for any other base.

    A folder of that name in the working directory takes precedence over the built-in base.
    """
    if name is None:
        return DEFAULT_BASE
    return name if is_builtin(name) and not Path(name).is_dir() else None


def portable_name(base: str) -> str:
    """Return the name of a base without the folders of this machine: a hub id, or the last part of a path.

    A built-in base is in a folder of its name.
    """
    return base if is_hub_id(base) and not Path(base).is_dir() else Path(base).name


def warn_of_builtin_base(name: str | None, manifests: Iterable[Path]) -> None:
    """Print a warning if a built-in base that speaks, the default, is to learn other manifests than the samples."""
    built_in, samples = which_builtin(name), SAMPLES.resolve()
    if built_in not in SPEAKING_BASES or all(path.resolve().is_relative_to(samples) for path in manifests):
        return
    which = f"--base_ckpt {name}" if name else f"without --base_ckpt the base is {built_in}, which"
    warn(
        f"warning: {which} is built in for trying out the trainer: it and its codec know only digits in a few "
        "synthetic voices, and cannot learn another voice. For your own recordings, give "
        f"--base_ckpt {RELEASED_BASE} (a download of 12 GB)"
    )


def find_base(
    name: str | None,
    asked_by: str,
    cache_dir: Path,
    revision: str | None = None,
    resolve: Callable[[str, str, str | None], Path] = resolve_folder,
) -> Path:
    """Return the folder of a base: a built-in one (DEFAULT_BASE for None), a folder, or a hub id at `revision`.

    Args:
        asked_by: the option that names the base, for error messages.
        resolve: finds a folder or a hub id, with everything that is needed of it.

    Raises:
        InputError: there is no base of that name.
        SaveError: the base cannot be written to the cache.
    """
    built_in = which_builtin(name)
    if built_in is not None:
        return builtin_base(built_in, cache_dir)
    assert name is not None  # None is the built-in default
    return resolve(name, asked_by, revision)


def builtin_base(name: str, cache_dir: Path) -> Path:
    """Return the folder of a built-in base in float32, created on first use. Several processes may call it at once.

    Raises:
        InputError: there is no built-in base of that name, or the installation of the project is incomplete.
        SaveError: the base cannot be written to the cache.
    """
    _check_builtin(name)
    if name in RANDOM_BASES:
        base = cache_dir / f"builtin-{RANDOM_VERSION}" / name
        if not base.is_dir():
            from higgs_ds.bases.tiny_random import build_random_base  # its imports take seconds

            build_random_base(base, RANDOM_BASES[name])
        return base
    home = cache_dir / f"speaking-{_assets_digest()[:12]}"
    codec, base = home / SPEAKING_CODEC, home / name
    if not codec.is_dir():
        _copy_in_float32(SPEAKING_CODEC, codec)
    if not base.is_dir():
        _copy_in_float32(name, base, codec)
    return base


def builtin_config(name: str) -> Any:
    """Return the configuration of a built-in base without creating the base.

    Raises:
        InputError: as for `builtin_base`.
    """
    _check_builtin(name)
    import torch

    from higgs_ds.bases.tiny_random import random_config
    from higgs_ds.model.config import read_config

    if name in RANDOM_BASES:
        return random_config(RANDOM_BASES[name])
    config = read_config(ASSETS / name)
    config.dtype = torch.float32
    return config


def _check_builtin(name: str) -> None:
    """Raise InputError if there is no built-in base of that name, or if some of its files are missing or damaged."""
    if not is_builtin(name):
        raise InputError(f"{name}: is not a built-in base; choose {' or '.join(BUILT_IN)}")
    if name in RANDOM_BASES:
        return
    paths = [ASSETS / folder / part for folder, parts in PARTS.items() for part in parts]
    missing = [str(path.relative_to(ASSETS)) for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{ASSETS}: missing {', '.join(missing)} of the built-in base {name}; the installation of the project is "
            "incomplete. Reinstall it, or choose another base"
        )
    weight_shapes([path for path in paths if path.name == WEIGHTS])


def _assets_digest() -> str:
    """Return the SHA-256 over all files of the speaking base. It names the cache folder: other files, other folder."""
    digest = hashlib.sha256((ASSETS / "chat_template.jinja").read_bytes())
    for folder in PARTS:
        for path in sorted(path for path in (ASSETS / folder).iterdir() if path.is_file()):
            content = path.read_bytes()
            digest.update(f"{folder}/{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _copy_in_float32(asset: str, target: Path, codec: Path | None = None) -> None:
    """Copy a model of the assets to a new folder, in float32. With `codec`, also write a processor that names it."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    source = ASSETS / asset
    with saving(target), new_folder(target) as folder:
        for path in source.iterdir():
            if path.is_file() and path.name not in ("config.json", WEIGHTS):
                shutil.copyfile(path, folder / path.name)
        write_json(
            folder / "config.json", _set_dtype_float32(json.loads((source / "config.json").read_text(encoding="utf-8")))
        )
        tensors = load_file(source / WEIGHTS).items()
        in_float32 = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors}
        save_file(in_float32, folder / WEIGHTS, {"format": "pt"})
        if codec is not None:
            tiny = family_of(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]).tiny()
            tiny.write_companions(folder, AutoTokenizer.from_pretrained(source), codec)


def _set_dtype_float32(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with every `dtype` set to float32, those of nested models included."""
    return {
        key: _set_dtype_float32(value) if isinstance(value, dict) else "float32" if key == "dtype" else value
        for key, value in values.items()
    }
