"""launch/prepare.py: check manifests and encode their audio before training."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from higgs_ds.bases.builtin import warn_of_builtin_base
from higgs_ds.bases.bundle import open_for_training
from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data.flags import list_problems, say_flagged, write_list
from higgs_ds.data.joined_index import join
from higgs_ds.data.preparation import WHOLE, CheckedManifest, Preparation
from higgs_ds.data.reference_choice import references_of
from higgs_ds.data.scratch import scratch_problems
from higgs_ds.data.speakers import check_prompts, find_equal_prompts
from higgs_ds.data.survey import Share
from higgs_ds.options.checks import check_data_options
from higgs_ds.options.commands import PrepareOptions, parse_shard
from higgs_ds.options.flags import FlagOptions, check_flag_options
from higgs_ds.options.train import DataOptions, ModelOptions
from higgs_ds.speech.codec_check import check_codec

DEFAULT_FLAGS = FlagOptions()


def main(options: DataOptions, model: ModelOptions, how: PrepareOptions, flags: FlagOptions = DEFAULT_FLAGS) -> None:
    """Check the manifests of a later run and encode their audio. Every rank must call this, in a process group."""
    cache_dir = options.cache_dir or default_cache_dir()
    problems = check_data_options(options) + check_flag_options(flags)
    problems += scratch_problems(options, cache_dir) + list_problems(how.flagged_list)
    distributed.raise_problems(problems)
    bundle = open_for_training(model, cache_dir)
    manifests = (*options.train_manifests, *(options.val_manifest or ()))
    warn_of_builtin_base(model.base_ckpt, manifests)
    shard = Share(*parse_shard(how.shard))
    with Preparation(options, bundle.coder(cache_dir), cache_dir, shard) as preparation:
        checked = [preparation.check(path) for path in manifests]
        for manifest in checked:
            if manifest.index is not None:
                say(f"{manifest.path}:\n{textwrap.indent(preparation.describe(manifest), '  ')}")
        distributed.on_main(lambda: _report_flagged(preparation, checked, how.flagged_list, flags))
        problems = preparation.problems(checked)
        if shard == WHOLE:
            problems += check_prompts(options, checked)
        distributed.raise_problems(problems)
        _warn_of_equal_prompts(options, checked, shard)
        to_train, num_clips, keep = checked[: len(options.train_manifests)], flags.flag_codec_clips, not how.check_only
        compared = distributed.on_main(lambda: check_codec(preparation, to_train, model, num_clips, keep))
        say(compared.rstrip("\n"))
        if how.check_only:
            return
        for manifest in checked:
            preparation.encode(manifest)
            preparation.keep(manifest)
    say(f"prepared: all audio is encoded in {cache_dir}")


def _report_flagged(
    preparation: Preparation, checked: list[CheckedManifest], target: Path | None, options: FlagOptions
) -> None:
    """Print which samples may be bad, and write all of them to a file on request."""
    found = [(m.path, preparation.flagged(m.index, options)) for m in checked if m.index is not None]
    for path, flagged in found:
        say_flagged(path, flagged, f"{target or '--flagged_list FILE'} lists all of them")
    if target is not None:
        write_list(target, [flagged for _, flagged in found])


def _warn_of_equal_prompts(options: DataOptions, checked: list[CheckedManifest], shard: Share) -> None:
    """Print which speakers of the training samples have the same prompts. A shard does not have all of them."""
    if shard != WHOLE:
        return
    indexes = [manifest.index for manifest in checked[: len(options.train_manifests)] if manifest.index is not None]
    index = join(indexes)
    rows = np.arange(len(index))
    references = references_of(index, rows, rows, options, seed=0)
    if equal_prompts := find_equal_prompts(index, rows, references):
        warn(f"warning: {equal_prompts.describe()}")
