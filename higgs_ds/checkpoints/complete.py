"""Make a complete model of a checkpoint of full fine-tuning: replace the base's weights, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from higgs_ds.bases.builtin import find_base
from higgs_ds.bases.bundle import base_identity
from higgs_ds.bases.conversion import native_folder
from higgs_ds.bases.model_folder import add_parts, check_layout, model_folder, named_codec, write_shard
from higgs_ds.checkpoints.folder import why_incomplete
from higgs_ds.checkpoints.trained_weights import FullFormat, read_trained
from higgs_ds.common.errors import InputError
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.common.tensor_files import weight_files, weight_shapes
from higgs_ds.model.config import read_config, with_parts
from higgs_ds.model.families import family_of
from higgs_ds.options.commands import ExportOptions
from higgs_ds.options.fields import NATIVE


def main(options: ExportOptions) -> None:
    """Make a complete model as the options say, and print its folder."""
    base = options.base_model_path or read_trained(options.checkpoint_path)[1].base
    folder = find_base(base, "--base_model_path", default_cache_dir())
    codec_folder = named_codec(options.codec_ckpt)
    complete_model(
        options.checkpoint_path, folder, options.output_path, options.export_layout, codec_folder=codec_folder,
        averaged=options.ema,
    )  # fmt: skip
    print(f"Complete model: {options.output_path}")


def complete_model(
    checkpoint: Path,
    base_folder: Path,
    output_folder: Path,
    export_layout: str = NATIVE,
    overwrite: bool = False,
    codec_folder: Path | None = None,
    averaged: bool = False,
) -> None:
    """Write the model of a checkpoint to a folder: a copy of the base with the trained weights.

    Each weight is read, cast to the base's dtype, written over its copy, read back and compared. Peak memory is about
    the largest weight in float32, plus the parts that the base does not have.

    Args:
        export_layout: "native", "original", or "both", each in a folder of its own below `output_folder`.
        codec_folder: the native codec to store with the model; None for the one that the base names.
        averaged: whether to take the averages of the trained weights (--ema_decay) instead of the weights.

    Raises:
        InputError: the checkpoint is damaged or of another kind, the base is not the one that was trained, or the
            output already exists.
        SaveError: writing fails. Nothing is left on disk, and a folder to overwrite is unchanged.
    """
    weights, form = read_trained(checkpoint, averaged)
    reason = why_incomplete(checkpoint)
    if reason:
        raise InputError(f"{checkpoint}: is not a complete checkpoint: {reason}")
    base_folder = native_folder(base_folder, "--base_model_path", default_cache_dir())
    _check_base(base_folder, checkpoint, form)
    config = with_parts(read_config(base_folder, "--base_model_path"), form.full_parts)
    check_layout(config, export_layout)
    shards = weight_files(base_folder)
    in_base = weight_shapes(shards)
    added = sorted(weights.keys() - in_base.keys())
    needed = sum(path.stat().st_size for path in shards) + sum(weights.sizes[name] for name in added)
    source_of = family_of(config.model_type).source_of
    changed = {name for name in in_base if source_of(name) in weights}
    with model_folder(base_folder, output_folder, needed, export_layout, overwrite, codec_folder) as native:
        for shard in shards:
            write_shard(shard, native / shard.name, changed, lambda name, _: weights[source_of(name)])
        if added:
            add_parts(native, shards, {name: weights[name] for name in added}, config)
        form.speakers.write(native)


def _check_base(folder: Path, checkpoint: Path, form: FullFormat) -> None:
    if base_identity(folder) != form.base_identity:
        raise InputError(
            f"{folder}: is not the base that {checkpoint} was trained from. That base was named {form.base}; give it "
            "as --base_model_path"
        )
