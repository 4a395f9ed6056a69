"""Merge an adapter into its base: each weight in float32, tensor by tensor, without building either model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import HiggsAudioV2Config

from higgs_ds.adapter import Adapter, BaseWeights, check_fit, read_adapter
from higgs_ds.builtin import find_base
from higgs_ds.config import MERGE_DEQUANTIZED, MERGE_ORIGINAL, NATIVE, ORIGINAL, MergeOptions
from higgs_ds.data.audio_codes import default_cache_dir
from higgs_ds.data.codec import CODEC_SUBFOLDER, PROCESSOR_CONFIG, find_codec
from higgs_ds.errors import InputError, SaveError
from higgs_ds.files import (
    new_folder,
    release_freed_memory,
    replaced_folder,
    room_at,
    saving,
    why_not_writable,
    write_json,
)
from higgs_ds.hub import WEIGHT_INDEX, byte_ranges, companions, read_tensor, weight_files, weight_shapes
from higgs_ds.model.higgs import read_config
from higgs_ds.model.parts import Parts, parts_of, with_parts
from higgs_ds.relayout import native_codec, native_folder, rewrite
from higgs_ds.verify import Agreement, compare_merged

LARGEST_DIFFERENCE = 0.1  # of the logits, root mean square; rounding the weights to bf16 makes about a hundredth
PARTS_FILE = "parts.safetensors"


@dataclass
class MergeReport:
    """What a merge was made from. `differing`: weights that are quantized otherwise here than they were in training."""

    merge_base: str
    quantized: int = 0
    differing: list[str] = field(default_factory=list)
    agreement: Agreement | None = None

    def lines(self) -> list[str]:
        """What a user should know, a line each."""
        lines = [f"Merged into: the {self.merge_base} weights" if self.quantized else "Merged into: the base's weights"]
        if self.differing:
            lines.append(
                f"warning: {len(self.differing)} of {self.quantized} weights quantize otherwise here than in training "
                f"(for instance {self.differing[0]}): another base, device or version of bitsandbytes. The merged "
                "model is close to, but not exactly, what was trained"
            )
        if self.agreement is not None:
            lines.append(f"Self-check: {self.agreement}")
        return lines


def main(options: MergeOptions) -> None:
    """Merge as the options say, and print what from and where to."""
    base = find_base(options.base_model_path, "--base_model_path", default_cache_dir())
    report = merge(
        base,
        options.lora_adapter_path,
        options.output_path,
        options.merge_base,
        verify=not options.no_verify,
        export_layout=options.export_layout,
        codec_folder=named_codec(base, options.codec_ckpt),
    )
    print("\n".join([*report.lines(), f"Merged model: {options.output_path}"]))


def named_codec(base_folder: Path, name: str | None) -> Path | None:
    """The codec that --codec_ckpt names, native; None where it names none. Raises InputError."""
    return None if name is None else native_codec(find_codec(base_folder, name), "--codec_ckpt", default_cache_dir())


def merge(
    base_folder: Path,
    adapter_folder: Path,
    output_folder: Path,
    merge_base: str | None = None,
    verify: bool = True,
    export_layout: str = NATIVE,
    overwrite: bool = False,
    codec_folder: Path | None = None,
) -> MergeReport:
    """Write the merged model, with tokenizer, template, codec reference and generation settings, to a new folder.

    Peak memory is about the largest tensor of the base, in float32.

    Args:
        merge_base: "dequantized", into the weights as a 4-bit base holds them, which is the function that QLoRA has
            trained, or "original"; None for what the adapter was trained on.
        verify: compare the result's logits with those of the adapter beside the base.
        export_layout: "native", "original", or "both", each in a folder of its own below `output_folder`.
        codec_folder: the codec that goes with the model, native; None for the one that the base names.

    Raises InputError: one of the folders is not what it should be, they do not fit together, or the output is there
    already; SaveError where writing or the comparison fails. Nothing is left behind then, and a folder that was to be
    overwritten is as it was.
    """
    base_folder = native_folder(base_folder, "--base_model_path", default_cache_dir())
    adapter = read_adapter(adapter_folder)
    config = with_parts(read_config(base_folder, "--base_model_path"), adapter.in_full)
    check_layout(parts_of(config), export_layout)
    if merge_base is None:
        merge_base = MERGE_ORIGINAL if adapter.quantization is None else MERGE_DEQUANTIZED
    shards = weight_files(base_folder)
    shapes = weight_shapes(shards)
    check_fit(adapter, shapes, adapter_folder, base_folder)
    models = 1 if export_layout == NATIVE else 2  # another layout is written from the native one
    added = {name: tensor for name, tensor in adapter.whole.items() if name not in shapes}
    needed = sum(path.stat().st_size for path in shards) + sum(tensor.nbytes for tensor in added.values())
    check_output(output_folder, models * needed, overwrite)
    base = BaseWeights(adapter.quantization, merge_base == MERGE_DEQUANTIZED)
    changed = {name for name in shapes if name in adapter.factors or name in adapter.whole or base.is_quantized(name)}
    changed |= {name.removesuffix("weight") + "bias" for name in adapter.factors if adapter.bias(name) is not None}
    with model_folder(base_folder, output_folder, export_layout, overwrite, codec_folder) as native:
        for shard in shards:
            write_shard(shard, native / shard.name, changed, lambda name, old: _merged(name, old, adapter, base))
        if added:
            add_parts(native, shards, added, config)
        report = MergeReport(merge_base, base.quantized, base.differing)
        if verify:
            report.agreement = _verified(base_folder, native, adapter, merge_base)
    return report


@contextlib.contextmanager
def model_folder(
    base_folder: Path, output_folder: Path, export_layout: str, overwrite: bool, codec_folder: Path | None
) -> Iterator[Path]:
    """Where a native model's weights are to be written, beside a base's other files; it becomes `output_folder`."""
    with saving(output_folder), (replaced_folder if overwrite else new_folder)(output_folder) as folder:
        native, within = (folder, Path()) if export_layout == NATIVE else (folder / NATIVE, Path(NATIVE))
        native.mkdir(exist_ok=True)
        _copy_companions(base_folder, native, output_folder / within, codec_folder)
        yield native
        if export_layout != NATIVE:
            rewrite(native, folder / ORIGINAL, ORIGINAL, "merged model")
        if export_layout == ORIGINAL:
            shutil.rmtree(native)
            for path in (folder / ORIGINAL).iterdir():
                path.rename(folder / path.name)
            (folder / ORIGINAL).rmdir()


def _verified(base_folder: Path, merged_folder: Path, adapter: Adapter, merge_base: str) -> Agreement:
    as_trained = adapter.quantization is not None or merge_base == MERGE_DEQUANTIZED
    agreement = compare_merged(base_folder, merged_folder, adapter, BaseWeights(adapter.quantization, as_trained))
    if merge_base == MERGE_ORIGINAL and as_trained:
        agreement.note = "the adapter was trained on 4-bit weights and merged into the original ones"
    elif agreement.relative > LARGEST_DIFFERENCE:
        raise SaveError(f"{merged_folder}: the merged model is not what was trained: {agreement}")
    return agreement


def check_output(folder: Path, needed_bytes: int, overwrite: bool) -> None:
    """Raise InputError where a model of so many bytes cannot be written to a folder, or other things are there."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not overwrite)):
        raise InputError(f"{folder}: is there already; choose a new folder for the merged model")
    reason = why_not_writable(folder)
    if reason:
        raise InputError(f"{folder}: cannot be written to: {reason}; choose another --output_path")
    free = room_at(folder)
    if free < needed_bytes * 1.05:
        raise InputError(
            f"{folder}: there are {free / 2**30:.1f} GiB free, the merged model takes {needed_bytes / 2**30:.1f} GiB"
        )


def write_shard(
    source: Path, target: Path, changed: Collection[str], value: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """Copy one file of weights, and write those that change over the copies, which they equal in type and size.

    Args:
        value: what a weight of this name and old value becomes.
    """
    shutil.copyfile(source, target)
    for name, (start, stop) in byte_ranges(target).items():
        if name not in changed:
            continue
        tensor = read_tensor(source, name)
        merged = value(name, tensor).to(tensor.dtype).contiguous()
        if not merged.isfinite().all():
            raise SaveError(f"{source}: {name} is not finite once it is {tensor.dtype}")
        with target.open("r+b") as file:
            file.seek(start)
            written = file.write(merged.flatten().view(torch.uint8).numpy().data)
        if written != stop - start or not torch.equal(read_tensor(target, name), merged):
            raise SaveError(f"{target}: {name} reads back otherwise than written")
        release_freed_memory()


def add_parts(folder: Path, shards: list[Path], added: Mapping[str, torch.Tensor], config: HiggsAudioV2Config) -> None:
    """Write the weights of parts that the base lacks, in the dtype of its norms, and tell of them."""
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


def check_layout(parts: Parts, export_layout: str) -> None:
    """Raise InputError where a model with such parts is asked for in the native layout, which has no place for them."""
    if parts and export_layout != ORIGINAL:
        raise InputError(
            f"--export_layout {export_layout}: the native layout has no place for the model's {parts}; give "
            f"--export_layout {ORIGINAL}"
        )


def _merged(name: str, tensor: torch.Tensor, adapter: Adapter, base: BaseWeights) -> torch.Tensor:
    if name in adapter.whole:
        return adapter.whole[name]
    if name.endswith(".bias"):
        added = adapter.bias(name.removesuffix("bias") + "weight")
        assert added is not None
        return tensor.float() + added
    weight = base.as_trained(name, tensor)
    return adapter.merged(name, weight) if name in adapter.factors else weight


def _copy_companions(base_folder: Path, folder: Path, final_folder: Path, codec_folder: Path | None) -> None:
    """Copy everything of the base but its weights, and the codec where that is a folder on this machine."""
    for path in companions(base_folder):
        shutil.copy(path, folder)
    if not (folder / PROCESSOR_CONFIG).is_file():
        return
    config = json.loads((folder / PROCESSOR_CONFIG).read_text(encoding="utf-8"))
    reference = config.get("audio_tokenizer") or {}
    codec = codec_folder or base_folder / CODEC_SUBFOLDER
    if not codec.is_dir():
        codec = Path(reference.get("audio_tokenizer_name_or_path") or "")
    if codec.is_absolute() and codec.is_dir():
        shutil.copytree(codec, folder / CODEC_SUBFOLDER)
        reference["audio_tokenizer_name_or_path"] = str(final_folder.resolve() / CODEC_SUBFOLDER)
        write_json(folder / PROCESSOR_CONFIG, config)
