"""Merge an adapter into its base: each weight in float32, tensor by tensor, without building either model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from higgs_ds.adapters.load import Adapter, BaseWeights, check_fit, read_adapter
from higgs_ds.adapters.recorded_base import describe_recorded_base, find_recorded_base
from higgs_ds.adapters.speakers import read_speakers
from higgs_ds.adapters.verify import Agreement, compare_merged, compare_with_peft
from higgs_ds.bases.builtin import find_base
from higgs_ds.bases.conversion import native_folder
from higgs_ds.bases.model_folder import add_parts, check_layout, model_folder, named_codec, write_shard
from higgs_ds.common.errors import InputError, SaveError
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.common.tensor_files import weight_files, weight_shapes
from higgs_ds.model.config import read_config, with_parts
from higgs_ds.options.commands import MergeOptions, check_lora_scale
from higgs_ds.options.fields import MERGE_DEQUANTIZED, MERGE_ORIGINAL, NATIVE

LARGEST_DIFFERENCE = 0.1  # relative, root mean square, of the logits; rounding weights to bf16 causes about 0.01


@dataclass
class MergeReport:
    """What a merge was made from. `differing`: weights that quantize differently here than in training.

    `base`: a line about a base that the adapter names; empty if the caller gave one.
    """

    merge_base: str
    strength: float = 1.0
    quantized: int = 0
    differing: list[str] = field(default_factory=list)
    agreement: Agreement | None = None
    base: str = ""

    def lines(self) -> list[str]:
        """Return the lines to print for the user."""
        into = f"the {self.merge_base} weights" if self.quantized else "the base's weights"
        lines = [*([self.base] if self.base else []), f"Merged into: {into}"]
        if self.strength != 1:
            lines.append(f"Strength: the adapter's change times {self.strength:g} (--lora_scale)")
        if self.differing:
            lines.append(
                f"warning: {len(self.differing)} of {self.quantized} weights quantize differently here than in "
                f"training (for instance {self.differing[0]}): the base, the device or the version of bitsandbytes is "
                "another one. The merged model is close to, but not exactly, what was trained"
            )
        if self.agreement is not None:
            lines.append(f"Self-check: {self.agreement}")
        return lines


def main(options: MergeOptions) -> None:
    """Merge as the options say, and print a report and the output folder."""
    problems = check_lora_scale(options.lora_scale, options.lora_adapter_path)
    if problems:
        raise InputError(problems)
    given = options.base_model_path
    base = None if given is None else find_base(given, "--base_model_path", default_cache_dir())
    report = merge(
        base,
        options.lora_adapter_path,
        options.output_path,
        options.merge_base,
        verify=not options.no_verify,
        export_layout=options.export_layout,
        codec_folder=named_codec(options.codec_ckpt),
        strength=options.lora_scale,
    )
    print("\n".join([*report.lines(), f"Merged model: {options.output_path}"]))


def merge(
    base_folder: Path | None,
    adapter_folder: Path,
    output_folder: Path,
    merge_base: str | None = None,
    verify: bool = True,
    export_layout: str = NATIVE,
    overwrite: bool = False,
    codec_folder: Path | None = None,
    strength: float = 1.0,
) -> MergeReport:
    """Write the merged model, with tokenizer, template, codec reference and generation settings, to a new folder.

    Peak memory is about the largest tensor of the base, in float32.

    Args:
        base_folder: None for the base that the adapter names, see `find_recorded_base`.
        merge_base: "dequantized" merges into the dequantized weights of a 4-bit base, the function that QLoRA trained;
            "original" merges into the base's own weights; None stands for what the adapter was trained on.
        verify: compare the merged model's logits with those of the base with the unmerged adapter, and the merged
            weights of one layer of each kind with PEFT's.
        export_layout: "native", "original", or "both", each in a folder of its own below `output_folder`.
        codec_folder: the native codec to store with the model; None for the one that the base names.
        strength: a factor of the adapter's change of the weights.

    Raises:
        InputError: a folder is not what it should be, they do not fit together, or the output already exists.
        SaveError: writing or the comparison fails. Nothing is left on disk, and a folder to overwrite is unchanged.
    """
    adapter, speakers = read_adapter(adapter_folder, strength), read_speakers(adapter_folder)
    described = describe_recorded_base(adapter) if base_folder is None else ""
    if base_folder is None:
        base_folder = find_recorded_base(adapter, adapter_folder)
    base_folder = native_folder(base_folder, "--base_model_path", default_cache_dir())
    config = with_parts(read_config(base_folder, "--base_model_path"), adapter.full.parts)
    check_layout(config, export_layout)
    if merge_base is None:
        merge_base = MERGE_ORIGINAL if adapter.quantization is None else MERGE_DEQUANTIZED
    shards = weight_files(base_folder)
    shapes = weight_shapes(shards)
    check_fit(adapter, shapes, adapter_folder, base_folder)
    added = {name: tensor for name, tensor in adapter.full_weights.items() if name not in shapes}
    needed = sum(path.stat().st_size for path in shards) + sum(tensor.nbytes for tensor in added.values())
    base = BaseWeights(adapter.quantization, merge_base == MERGE_DEQUANTIZED)
    changed = {
        name for name in shapes if name in adapter.factors or name in adapter.full_weights or base.is_quantized(name)
    }
    changed |= {name.removesuffix("weight") + "bias" for name in adapter.factors if adapter.bias(name) is not None}
    with model_folder(base_folder, output_folder, needed, export_layout, overwrite, codec_folder) as native:
        for shard in shards:
            write_shard(shard, native / shard.name, changed, lambda name, old: _merged_value(name, old, adapter, base))
        if added:
            add_parts(native, shards, added, config)
        speakers.write(native)
        report = MergeReport(merge_base, strength, base.quantized, base.differing, base=described)
        if verify:
            report.agreement = _verify(base_folder, native, adapter, merge_base)
            compare_with_peft(
                base_folder, native, adapter_folder, adapter, BaseWeights(adapter.quantization, base.dequantized)
            )
    return report


def _verify(base_folder: Path, merged_folder: Path, adapter: Adapter, merge_base: str) -> Agreement:
    as_trained = adapter.quantization is not None or merge_base == MERGE_DEQUANTIZED
    agreement = compare_merged(base_folder, merged_folder, adapter, BaseWeights(adapter.quantization, as_trained))
    if merge_base == MERGE_ORIGINAL and as_trained:
        agreement.note = "the adapter was trained on 4-bit weights and merged into the original ones"
    elif agreement.relative > LARGEST_DIFFERENCE:
        raise SaveError(f"{merged_folder}: the merged model differs from what was trained: {agreement}")
    return agreement


def _merged_value(name: str, tensor: torch.Tensor, adapter: Adapter, base: BaseWeights) -> torch.Tensor:
    if name in adapter.full_weights:
        return adapter.full_weights[name]
    if name.endswith(".bias"):
        added = adapter.bias(name.removesuffix("bias") + "weight")
        assert added is not None
        return tensor.float() + added
    weight = base.as_trained(name, tensor)
    return adapter.merged(name, weight) if name in adapter.factors else weight
