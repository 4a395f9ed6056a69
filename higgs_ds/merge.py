"""Merge an adapter into its base: each weight in float32, shard by shard, without building either model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from higgs_ds.data.codec import CODEC_SUBFOLDER
from higgs_ds.errors import InputError, SaveError
from higgs_ds.export import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS
from higgs_ds.files import new_folder, replaced_folder, saving, why_not_writable, write_json
from higgs_ds.hub import weight_files, weight_shapes
from higgs_ds.model.higgs import read_config

PEFT_PREFIX = "base_model.model."
PROCESSOR_CONFIG = "processor_config.json"


@dataclass(frozen=True)
class Adapter:
    """LoRA factors (A (r, in), B (out, r)) by the name of the base's weight that they add to."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: float

    def delta(self, name: str) -> torch.Tensor:
        """What is added to a weight, float32 (out, in): scaling x B A (Hu et al. 2021, arXiv 2106.09685)."""
        a, b = self.factors[name]
        return self.scaling * (b.float() @ a.float())


def merge(base_folder: Path, adapter_folder: Path, output_folder: Path, overwrite: bool = False) -> None:
    """Write the merged model, with tokenizer, template, codec reference and generation settings, to a new folder.

    Peak memory is about one shard of the base. Raises InputError: one of the folders is not what it should be, they do
    not fit together, or the output is there already; SaveError where writing fails. Nothing is left behind then, and a
    folder that was to be overwritten is as it was.
    """
    read_config(base_folder)
    adapter = read_adapter(adapter_folder)
    shards = weight_files(base_folder)
    _check_fit(adapter, shards, adapter_folder, base_folder)
    _check_output(output_folder, sum(path.stat().st_size for path in shards), overwrite)
    with saving(output_folder), (replaced_folder if overwrite else new_folder)(output_folder) as folder:
        _copy_companions(base_folder, folder, output_folder)
        merged = sum(_merge_shard(shard, adapter, folder / shard.name) for shard in shards)
        if merged != len(adapter.factors):
            raise SaveError(f"{output_folder}: {merged} of {len(adapter.factors)} adapted weights were merged")


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter of plain LoRA. Raises InputError where the folder is something else, and says what to give."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(_no_adapter(folder))
    try:
        config = LoraConfig.from_pretrained(folder)
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: its adapter cannot be read: {error}") from error
    problems = [
        f"{folder}: {name} is {getattr(config, name)!r}, which cannot be merged here; plain LoRA can"
        for name, plain in (("use_dora", False), ("bias", "none"), ("fan_in_fan_out", False), ("rank_pattern", {}),
                            ("alpha_pattern", {}), ("modules_to_save", None), ("lora_bias", False))
        if getattr(config, name) != plain
    ]  # fmt: skip
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in sorted(tensors):
        if not name.endswith(".lora_A.weight"):
            if not name.endswith(".lora_B.weight") or name.replace(".lora_B.", ".lora_A.") not in tensors:
                problems.append(f"{folder}: {name} is no part of a plain LoRA pair")
            continue
        b = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if b is None:
            problems.append(f"{folder}: {name} has no lora_B beside it")
        else:
            target = name.removeprefix(PEFT_PREFIX).replace(".lora_A.weight", ".weight")
            factors[target] = (tensors[name], b)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    problems += [f"{folder}: {name} holds NaN or infinity" for name in broken]
    if not factors:
        problems.append(f"{folder}: {ADAPTER_WEIGHTS} holds no LoRA tensors")
    if problems:
        raise InputError(problems)
    return Adapter(factors, config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))


def _no_adapter(folder: Path) -> str:
    near = sorted({path.parent for parent in (folder, folder.parent) for path in _adapters_below(parent)})
    where = "; adapters nearby: " + ", ".join(map(str, near)) if near else ""
    if folder.name.startswith("checkpoint-"):
        return (
            f"{folder}: is a checkpoint directory, for going on with training (--resume), and no adapter; give the "
            f"adapter directory, {folder / ADAPTER_FOLDER}{where}"
        )
    return f"{folder}: is no adapter: it holds no {ADAPTER_CONFIG}{where}"


def _adapters_below(folder: Path) -> Iterable[Path]:
    return [*folder.glob(ADAPTER_CONFIG), *folder.glob(f"*/{ADAPTER_CONFIG}")]


def _check_fit(adapter: Adapter, shards: list[Path], adapter_folder: Path, base_folder: Path) -> None:
    shapes = weight_shapes(shards)
    problems = []
    for name, (a, b) in adapter.factors.items():
        if name not in shapes:
            problems.append(f"{adapter_folder}: adapts {name}, which the base {base_folder} has not")
        elif (b.shape[0], a.shape[1]) != shapes[name] or a.shape[0] != b.shape[1]:
            problems.append(
                f"{adapter_folder}: adapts {name} as {b.shape[0]} x {a.shape[1]}, in the base it is {shapes[name]}"
            )
    if problems:
        raise InputError(problems)


def _check_output(folder: Path, needed_bytes: int, overwrite: bool) -> None:
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not overwrite)):
        raise InputError(f"{folder}: is there already; choose a new folder for the merged model")
    reason = why_not_writable(folder)
    if reason:
        raise InputError(f"{folder}: cannot be written to: {reason}; choose another --output_path")
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes * 1.05:
        raise InputError(
            f"{folder}: there are {free / 2**30:.1f} GiB free, the merged model takes {needed_bytes / 2**30:.1f} GiB"
        )


def _merge_shard(source: Path, adapter: Adapter, target: Path) -> int:
    """Copy one file of weights with the adapter added to those it adapts; returns how many these were."""
    tensors, merged = {}, 0
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata() or {"format": "pt"}
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor = file.get_tensor(name)
            if name in adapter.factors:
                tensor = (tensor.float() + adapter.delta(name)).to(tensor.dtype)
                merged += 1
                if not tensor.isfinite().all():
                    raise SaveError(f"{source}: {name} is not finite once merged")
            tensors[name] = tensor
    save_file(tensors, target, metadata)
    with safe_open(target, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(name), tensor):
                raise SaveError(f"{target}: {name} reads back otherwise than written")
    return merged


def _copy_companions(base_folder: Path, folder: Path, final_folder: Path) -> None:
    """Copy everything of the base but its weights, and its codec where that is a folder on this machine."""
    for path in base_folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model"):
            shutil.copy(path, folder)
    if (folder / PROCESSOR_CONFIG).is_file():
        config = json.loads((folder / PROCESSOR_CONFIG).read_text(encoding="utf-8"))
        reference = config.get("audio_tokenizer") or {}
        codec = base_folder / CODEC_SUBFOLDER
        if not codec.is_dir():
            codec = Path(reference.get("audio_tokenizer_name_or_path") or "")
        if codec.is_absolute() and codec.is_dir():
            shutil.copytree(codec, folder / CODEC_SUBFOLDER)
            reference["audio_tokenizer_name_or_path"] = str(final_folder.resolve() / CODEC_SUBFOLDER)
            write_json(folder / PROCESSOR_CONFIG, config)
