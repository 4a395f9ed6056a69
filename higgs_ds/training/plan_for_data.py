"""--dry_run with --train_manifest: check the data as a run does, and plan for its longest sample. Nothing is encoded:
the number of frames of a clip follows from its duration, and the number of tokens of a text from the tokenizer.
"""

from __future__ import annotations

from higgs_ds.bases.bundle import open_for_training
from higgs_ds.common import distributed
from higgs_ds.common.console import say
from higgs_ds.common.errors import collect_problems
from higgs_ds.common.hub import resolve_without_weights
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data.preparation import Preparation
from higgs_ds.data.scratch import scratch_problems
from higgs_ds.data.speakers import check_prompts
from higgs_ds.options.checks import check_data_options
from higgs_ds.options.train import TrainOptions
from higgs_ds.planning import dry_run
from higgs_ds.planning.batches import SampleLengths
from higgs_ds.training.selection import select


def main(options: TrainOptions, given: set[str]) -> None:
    """Print the plan, on rank 0. Every rank must call this, in a process group if there are several.

    Raises:
        InputError, DoesNotFitError: as `planning.dry_run.main`; and what is wrong with the data, as in training.
    """
    problems: list[str] = []
    if distributed.is_main():
        # Resolved as below, so that a base that cannot be found is one problem.
        collect_problems(problems, lambda: dry_run.make_setting(options, given, resolve_without_weights))
    lengths = None
    if not check_data_options(options.data):
        lengths = _measure(options, problems)
    distributed.raise_problems(problems)
    dry_run.main(options, given, lengths)


def _measure(options: TrainOptions, problems: list[str]) -> SampleLengths | None:
    """Return the lengths of all samples of a run. Problems are added to those that are given.

    The samples are checked even if the base is invalid, so that all problems are reported at once.
    """
    cache_dir = options.data.cache_dir or default_cache_dir()
    no_scratch = scratch_problems(options.data, cache_dir)
    if any(distributed.gather_objects(bool(no_scratch))):
        problems += no_scratch
        return None
    bundle = collect_problems(problems, lambda: open_for_training(options.model, cache_dir, weights=False))
    coder = bundle.coder(cache_dir) if bundle else None
    with Preparation(options.data, coder, cache_dir) as preparation:
        manifests = (*options.data.train_manifests, *(options.data.val_manifest or ()))
        checked = [preparation.check(path) for path in manifests]
        problems += preparation.problems(checked)
        problems += check_prompts(options.data, checked)
        indexes = [manifest.index for manifest in checked if manifest.index is not None]
        if coder is None or len(indexes) < len(checked):
            return None
        selected = collect_problems(problems, lambda: select(options, indexes, coder))
        if selected is None:
            return None
        train, val, too_long = selected
        if too_long:
            say(f"{len(too_long):,} samples are longer than --max_seq_len {options.data.max_seq_len}, and left out")
        return SampleLengths.of([train.longest_lengths, val.longest_lengths], options)
