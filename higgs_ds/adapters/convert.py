"""launch/convert.py: convert bases, merged models and adapters from one layout to the other."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from higgs_ds.adapters.files import PEFT_PREFIX, name_in_base
from higgs_ds.adapters.load import Adapter, read_adapter
from higgs_ds.adapters.lora_config import LoraValues
from higgs_ds.adapters.save import ADAPTER_CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, DIGEST_KEY, QUANTIZATION_KEY, digest
from higgs_ds.bases.builtin import find_base
from higgs_ds.bases.conversion import pickled_files, rewrite
from higgs_ds.bases.model_folder import sole_writer
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import check_folders, new_folder, saving, write_json
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.common.run_files import ADAPTER_FOLDER, SPEAKERS_FILE
from higgs_ds.model.families import MODEL_TYPES, family_of_weight, read_json_config
from higgs_ds.model.fully_trained import is_own_weight
from higgs_ds.options.commands import ConvertOptions
from higgs_ds.options.fields import NATIVE, ORIGINAL


def main(options: ConvertOptions) -> None:
    """Convert a base, merged model or adapter as the options say, and print the output folder."""
    source, target, to = options.input_path, options.output_path, options.to
    problems = check_folders(output_path=target)
    if problems:
        raise InputError(problems)
    with sole_writer(target):
        if target.exists() and any(target.iterdir()):
            raise InputError(f"--output_path {target}: already exists; choose a new folder")
        _convert(source, target, to)
    print(f"{to} layout: {target}")


def _convert(source: Path, target: Path, to: str) -> None:
    if (source / ADAPTER_CONFIG).is_file():
        convert_adapter(source, target, to)
    else:
        folder = find_base(str(source), "--input_path", default_cache_dir())
        layout = MODEL_TYPES[read_json_config(folder, "--input_path")["model_type"]]
        if layout == to and not pickled_files(folder):
            raise _already_converted(source, to)
        for name in rewrite(folder, target, to, "--input_path"):
            print(f"not written, because the {to} layout has no use for it: {name}")


def _already_converted(source: Path, layout: str) -> InputError:
    return InputError(f"--input_path {source}: is already in the {layout} layout")


@contextlib.contextmanager
def adapter_in_native_names(folder: Path, adapter: Adapter) -> Iterator[Path]:
    """Yield `folder` or, if it has original tensor names, a temporary native copy: PEFT ignores unknown names."""
    if not adapter.in_original_names:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        convert_adapter(folder, Path(temporary) / ADAPTER_FOLDER, NATIVE)
        yield Path(temporary) / ADAPTER_FOLDER


def convert_adapter(source: Path, target: Path, to: str) -> None:
    """Write an adapter to a new folder with the tensor names of the layout `to`.

    Raises:
        InputError: `source` is not an adapter, or is already in that layout.
        SaveError: writing fails.
    """
    adapter = read_adapter(source)
    tensors = load_file(source / ADAPTER_WEIGHTS)
    config = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if (ORIGINAL if adapter.in_original_names else NATIVE) == to:
        raise _already_converted(source, to)
    rename = name_in_base if to == NATIVE else _original_name
    renamed = {f"{PEFT_PREFIX}{rename(name.removeprefix(PEFT_PREFIX))}": t for name, t in tensors.items()}
    layers = {layer: str(rename(f"{layer}.weight")).removesuffix(".weight") for layer in adapter.layers.values()}
    config |= _of_renamed_layers(config, layers)
    if adapter.full:
        own = [name if to == NATIVE else _original_name(name) for name in adapter.full_weights if is_own_weight(name)]
        modules = [str(name).removesuffix(".weight") for name in own]
        config["modules_to_save"] = sorted([*adapter.full.parts.modules, *modules])
    with safe_open(source / ADAPTER_WEIGHTS, framework="pt") as file:
        metadata = file.metadata() or {}
    # The record of the base's quantization stays unchanged: it uses native weight names in both layouts.
    metadata |= {DIGEST_KEY: digest(renamed, config, metadata.get(QUANTIZATION_KEY))}
    with saving(target), new_folder(target) as folder:
        save_file(renamed, folder / ADAPTER_WEIGHTS, metadata)
        write_json(folder / ADAPTER_CONFIG, config)
        for name in (ADAPTER_CARD, SPEAKERS_FILE):
            if (source / name).is_file():
                shutil.copy(source / name, folder)


def _original_name(name: str) -> str | None:
    return family_of_weight(name).original_name(name)


def _of_renamed_layers(config: Mapping[str, Any], layers: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of an adapter's configuration that must change because its layers get other names.

    PEFT finds layers, ranks and alphas by the ends of names or by regular expressions, which may not match new names.

    Args:
        layers: the new name of each adapted layer, by its old name.
    """
    changed: dict[str, Any] = {}
    targets = config.get("target_modules")
    ends = tuple(f".{target}" for target in targets) if isinstance(targets, list) else ()
    if config.get("layers_to_transform") is not None or not all(f".{new}".endswith(ends) for new in layers.values()):
        changed |= {"target_modules": sorted(layers.values()), "exclude_modules": None}
        changed |= {"layers_to_transform": None, "layers_pattern": None}
    values = LoraValues.of(config)
    if values.rank_pattern:
        changed["rank_pattern"] = {f"^{re.escape(new)}": values.rank(old) for old, new in layers.items()}
    if values.alpha_pattern:
        changed["alpha_pattern"] = {f"^{re.escape(new)}": values.alpha(old) for old, new in layers.items()}
    return changed
