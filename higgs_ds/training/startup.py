"""Everything before the first step: check all inputs at once, encode audio, build model, adapters and engine."""

from __future__ import annotations

import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from higgs_ds.adapters.starting_point import StartingPoint, check_geometry, compare_bases, starting_point
from higgs_ds.bases.builtin import warn_of_builtin_base
from higgs_ds.bases.bundle import Bundle, open_for_training
from higgs_ds.bases.model_folder import check_layout
from higgs_ds.checkpoints.folder import read_state
from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import InputError, collect_problems
from higgs_ds.common.files import check_folders
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.common.precision import AUTO, PRECISIONS, native_precision
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.common.run_files import EVALUATION_FOLDER, FLAGGED_FILE, INVALID_FILE
from higgs_ds.data.flags import say_flagged
from higgs_ds.data.pair_codes import add_codes_beside
from higgs_ds.data.preparation import CheckedManifest, Preparation
from higgs_ds.data.scratch import scratch_problems
from higgs_ds.data.speakers import check_prompts, find_equal_prompts
from higgs_ds.model.loading import check_weights
from higgs_ds.model.lora import check_biases
from higgs_ds.model.parts import parts_of
from higgs_ds.options import ds_config
from higgs_ds.options.checks import check_options
from higgs_ds.options.compatibility import unsupported
from higgs_ds.options.train import TrainOptions
from higgs_ds.reporting.publish import check_licence, check_login
from higgs_ds.reporting.trackers import check_wandb_login
from higgs_ds.speech.codec_check import check_codec
from higgs_ds.training.evaluation import open_speech_test, scoring_of
from higgs_ds.training.loading import load_run
from higgs_ds.training.overruled import overruled_by_file
from higgs_ds.training.resume import find_resume_checkpoint
from higgs_ds.training.run import Inputs, Run
from higgs_ds.training.selection import describe_manifests, select


def start(options: TrainOptions, given: set[str], lock: FolderLock) -> Run:
    """Check, encode, load. Every rank must call this.

    Args:
        given: names of the options that the user has set, which the DeepSpeed file must not contradict.
        lock: is acquired for the output folder.

    Raises:
        InputError: the same on every rank, before any weight of the base is loaded.
    """
    distributed.raise_problems(check_options(options))
    return load_run(_check_and_encode(options, given, lock))


def _check_and_encode(options: TrainOptions, given: set[str], lock: FolderLock) -> Inputs:
    problems: list[str] = []
    output_dir = _output_dir(options)
    cache_dir = options.data.cache_dir or default_cache_dir()
    problems += check_folders(output_dir=output_dir)
    if not problems and options.evaluation.evaluate_steps:
        problems += check_folders(output_dir=output_dir / EVALUATION_FOLDER)
    no_scratch = scratch_problems(options.data, cache_dir)
    resume_from = collect_problems(problems, lambda: _open_output(options, output_dir, lock))
    list_of_invalid = None if problems else output_dir / INVALID_FILE  # the folder may be another run's
    found = collect_problems(problems, lambda: starting_point(options, given, output_dir, resume_from))
    start, options = found or (None, options)
    native = _native_precision(options, resume_from, problems)
    resolved = collect_problems(problems, lambda: _resolve_ds_config(options, given, native))
    no_cache = any(distributed.gather_objects(bool(no_scratch)))
    bundle = None if no_cache else collect_problems(problems, lambda: _open_base(options, cache_dir))
    start = collect_problems(problems, lambda: _compare_with_base(start, options, bundle))
    collect_problems(problems, lambda: distributed.on_main(lambda: check_login(options.run)))
    collect_problems(problems, lambda: check_licence(options.run, bundle))
    collect_problems(problems, lambda: distributed.on_main(lambda: check_wandb_login(options.run.report_to)))
    scoring = scoring_of(options.evaluation)
    encoder = collect_problems(problems, scoring.check)
    distributed.raise_problems(problems + no_scratch if no_scratch else [])
    if not all(distributed.gather_objects(bundle is not None)):
        bundle = None
    # The samples are checked even if the base is invalid, so that all problems are reported at once.
    coder = bundle.coder(cache_dir) if bundle else None
    with Preparation(options.data, coder, cache_dir) as preparation:
        manifests = (*options.data.train_manifests, *(options.data.val_manifest or ()))
        if coder and options.objective.is_dpo:
            distributed.on_main(lambda: add_codes_beside(manifests, coder.cache))
        checked = [preparation.check(path) for path in manifests]
        problems += preparation.problems(checked, list_of_invalid)
        problems += check_prompts(options.data, checked)
        distributed.raise_problems(problems)
        assert resolved and bundle and preparation.coder  # noqa: PT018 - a missing one has raised a problem
        if options.model.precision == AUTO:
            say(f"--precision auto: {resolved[1].model.precision}")
        overruled = overruled_by_file(options, resolved[1], options.run.deepspeed)
        settings, options = resolved
        warn_of_builtin_base(options.model.base_ckpt, manifests)
        to_train, num_clips = checked[: len(options.data.train_manifests)], options.flags.flag_codec_clips
        num_clips = 0 if options.objective.is_dpo else num_clips  # rejected clips may be anything
        compared = distributed.on_main(lambda: check_codec(preparation, to_train, options.model, num_clips))
        for manifest in checked:
            preparation.encode(manifest)
        summary = distributed.on_main(lambda: _summary(preparation, checked)) + compared
        indexes = [preparation.keep(manifest) for manifest in checked]
        # Of pairs, each text has two clips, and a rejected one may be noise: everything would be flagged.
        to_flag = indexes if distributed.is_main() and not options.objective.is_dpo else []
        flagged = [preparation.flagged(index, options.flags) for index in to_flag]
    for manifest, of_manifest in zip(checked, flagged, strict=False):  # only rank 0 has any
        say_flagged(manifest.path, of_manifest, f"all are listed in {output_dir / FLAGGED_FILE}")
    train, val, too_long = select(options, indexes, preparation.coder)
    if equal_prompts := find_equal_prompts(train.index, train.rows, train.references):
        warn(f"warning: {equal_prompts.describe()}")
    speech_test = distributed.run_on_all_ranks(lambda: open_speech_test(options.evaluation, val, scoring, encoder))
    lines = describe_manifests(train, val)
    summary += "".join(f"{line}\n" for line in ["manifests:", *(f"  {line}" for line in lines)]) if lines else ""
    return Inputs(
        options,
        settings,
        output_dir,
        bundle,
        train,
        val,
        too_long,
        summary,
        resume_from,
        lock,
        start,
        flagged,
        tuple(overruled),
        speech_test,
    )


def _summary(preparation: Preparation, checked: list[CheckedManifest]) -> str:
    parts = [f"{manifest.path}:\n{textwrap.indent(preparation.describe(manifest), '  ')}\n" for manifest in checked]
    return "".join(parts)


def _native_precision(options: TrainOptions, resume_from: Path | None, problems: list[str]) -> str:
    """Return what --precision auto means: what a resumed run was trained in, or what all devices compute in."""
    if resume_from is not None:
        saved = read_state(resume_from).settings.get("precision")
        if saved in PRECISIONS:
            return saved
    by_rank = distributed.gather_objects(native_precision(distributed.device()))
    if options.model.precision == AUTO and len(set(by_rank)) > 1:
        found = ", ".join(f"rank {rank}: {precision}" for rank, precision in enumerate(by_rank))
        problems.append(f"--precision auto: the devices of the ranks differ ({found}); give the precision of all ranks")
    return by_rank[0]


def _resolve_ds_config(options: TrainOptions, given: set[str], native: str) -> tuple[dict[str, Any], TrainOptions]:
    config = ds_config.read_ds_config(options.run.deepspeed)
    settings, options = ds_config.resolve(config, options, given, distributed.world_size(), native)
    problems = unsupported(options, settings, distributed.device().type == "cuda")
    if problems:
        raise InputError(problems)
    return settings, options


def _open_base(options: TrainOptions, cache_dir: Path) -> Bundle:
    bundle = open_for_training(options.model, cache_dir)
    if options.run.merge_adapter_with_base or options.is_full_finetuning:
        check_layout(bundle.config, options.run.export_layout)
    speaking = {"samples": options.run.samples, "sample_steps": options.run.sample_steps}
    speaking["evaluate_steps"] = options.evaluation.evaluate_steps
    if any(speaking.values()) and parts_of(bundle.config).audio_tower is not None:
        given = ", ".join(f"--{name}" for name, value in speaking.items() if value)
        raise InputError(f"{given}: cannot use the input of a Whisper tower; leave out with such a base")
    check_weights(bundle.folder)
    check_biases(bundle.config, options.lora)
    weights = options.optim.codebook_weights
    if weights is not None and len(weights) != bundle.config.num_codebooks:
        raise InputError(
            f"--codebook_weights: {len(weights)} given, the base has {bundle.config.num_codebooks} codebooks"
        )
    return bundle


def _compare_with_base(
    start: StartingPoint | None, options: TrainOptions, bundle: Bundle | None
) -> StartingPoint | None:
    if start is None or bundle is None:
        return None
    check_geometry(start, options, bundle.config, bundle.name)
    return replace(start, comparison=compare_bases(start, bundle))


def _open_output(options: TrainOptions, output_dir: Path, lock: FolderLock) -> Path | None:
    """Lock the output folder, and return the checkpoint to resume from."""
    lock.acquire(output_dir)
    return find_resume_checkpoint(options, output_dir)


def _output_dir(options: TrainOptions) -> Path:
    if options.run.output_dir is not None:
        return options.run.output_dir
    return distributed.broadcast_object(Path("outputs") / time.strftime("%Y%m%d-%H%M%S"))
