"""launch/convert.py: convert bases, merged models and adapters from one layout to the other."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from higgs_ds.adapters.load import PEFT_PREFIX, Adapter, read_adapter
from higgs_ds.adapters.save import ADAPTER_CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS, DIGEST_KEY, QUANTIZATION_KEY, digest
from higgs_ds.bases.builtin import find_base
from higgs_ds.bases.conversion import pickled_files, rewrite
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import new_folder, saving
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.common.run_files import ADAPTER_FOLDER
from higgs_ds.model.layouts import MODEL_TYPES, native_name, original_name, read_json_config
from higgs_ds.options.commands import ConvertOptions
from higgs_ds.options.fields import NATIVE, ORIGINAL


def main(options: ConvertOptions) -> None:
    """Convert a base, merged model or adapter as the options say, and print the output folder."""
    source, target, to = options.input_path, options.output_path, options.to
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output_path {target}: already exists; choose a new folder")
    if (source / ADAPTER_CONFIG).is_file():
        convert_adapter(source, target, to)
    else:
        folder = find_base(str(source), "--input_path", default_cache_dir())
        layout = MODEL_TYPES[read_json_config(folder, "--input_path")["model_type"]]
        if layout == to and not pickled_files(folder):
            raise _already_converted(source, to)
        for name in rewrite(folder, target, to, "--input_path"):
            print(f"not written, because the {to} layout has no use for it: {name}")
    print(f"{to} layout: {target}")


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
    is_native = not read_adapter(source).in_original_names
    tensors = load_file(source / ADAPTER_WEIGHTS)
    config = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if (NATIVE if is_native else ORIGINAL) == to:
        raise _already_converted(source, to)
    rename = native_name if to == NATIVE else original_name
    renamed = {f"{PEFT_PREFIX}{rename(name.removeprefix(PEFT_PREFIX))}": t for name, t in tensors.items()}
    with safe_open(source / ADAPTER_WEIGHTS, framework="pt") as file:
        metadata = file.metadata() or {}
    # The record of the base's quantization stays unchanged: it uses native weight names in both layouts.
    metadata |= {DIGEST_KEY: digest(renamed, config, metadata.get(QUANTIZATION_KEY))}
    with saving(target), new_folder(target) as folder:
        save_file(renamed, folder / ADAPTER_WEIGHTS, metadata)
        shutil.copy(source / ADAPTER_CONFIG, folder)
        if (source / ADAPTER_CARD).is_file():
            shutil.copy(source / ADAPTER_CARD, folder)
