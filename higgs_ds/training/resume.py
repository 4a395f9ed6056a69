"""Find the checkpoint to resume from, and check that the run's settings are the same."""

from __future__ import annotations

import re
import socket
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from higgs_ds.checkpoints.folder import find_checkpoints, newest_complete, read_state, why_incomplete
from higgs_ds.checkpoints.state import TrainerState, check_same_run
from higgs_ds.common import distributed
from higgs_ds.common.console import warn
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import restore_leftovers, saving
from higgs_ds.common.words import counted
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.options.evaluation import EvaluationOptions
from higgs_ds.options.fields import RESUME_AUTO, RESUME_NEVER
from higgs_ds.options.flags import FlagOptions
from higgs_ds.options.objective import ObjectiveOptions
from higgs_ds.options.train import TrainOptions
from higgs_ds.training.data_changes import describe_data_change
from higgs_ds.training.run import Inputs

# What a run first writes under a temporary name, which remains after a kill. Models may also be written by a command.
WRITTEN_BY_RUNS = re.compile(
    r"checkpoint-\d+|lora_adapters(?:_ema)?|trainer_state\.json|settings\.json|metrics\.jsonl|dropped_samples\.txt|"
    r"training_data\.npz|reference_log_probs\.safetensors|flagged_samples\.tsv|invalid_samples\.txt|data_summary\.txt|report\.html"
)
WRITTEN = re.compile(rf"{WRITTEN_BY_RUNS.pattern}|final_model|adapter|merged_model|to_publish")
# Options that may differ when a run is resumed: they do not change what is trained. Batch size and accumulation may
# differ if the number of samples per step stays the same.
FREE_ON_RESUME = (
    "output_dir", "resume", "log_steps", "val_steps", "save_steps", "keep_checkpoints", "on_nonfinite",
    "merge_adapter_with_base", "export_layout", "deepspeed", "cache_dir", "early_stopping_patience",
    "early_stopping_min_delta", "report_to", "quiet", "no_report", "samples", "sample_steps", "num_samples",
    "sample_temperature", "push_to_hub", "hub_repo_id", "hub_private", "hub_license", "upload_merged_model",
    "activation_checkpointing", "offload_embeddings", "offload_checkpoints", "attn_implementation",
    "batch_size", "grad_accum", "epochs", "max_steps",
    "train_manifest", "pairs", "mix", "val_manifest", "val_split", "split_by", "format", "reference", "normalize_text",
    "allow_text_targets", "max_clip_s", "max_seq_len", "skip_bad", "num_workers", "base_ckpt", "base_revision",
    "codec_ckpt", "dry_run", "require_fit", "device_memory_gib", "plan_ranks", "init_from",
    "silence_db", "speaker_descriptions", *(flag.name for flag in fields(FlagOptions)),
    *(option.name for option in fields(EvaluationOptions)),
)  # fmt: skip
# What checkpoints of earlier versions do not record, with the only value that it had.
NOT_RECORDED: dict[str, Any] = {
    "reference_dropout": 0.0,
    "random_references": False,
    "also_train": [],
    "mix": None,
    "trim_silence": None,
    "train_fill": False,
    "speaker_prompt": "none",
    **{name: value for name, value in asdict(ObjectiveOptions()).items() if name != "pairs"},
}


def find_resume_checkpoint(options: TrainOptions, output_dir: Path) -> Path | None:
    """Return the checkpoint to resume from, which rank 0 chooses. Every rank must call this."""
    found = distributed.on_main(lambda: _find_resumable(options, output_dir))
    if found is not None and not found.is_dir():
        raise InputError(f"{found}: is not visible on {socket.gethostname()}; all nodes must share the output folder")
    return found


def _find_resumable(options: TrainOptions, output_dir: Path) -> Path | None:
    """Return the checkpoint to resume from. An earlier run's results are never overwritten silently."""
    with saving(output_dir):
        restore_leftovers(output_dir, WRITTEN, WRITTEN_BY_RUNS)
    resume = options.run.resume
    if resume == RESUME_NEVER:
        earlier = find_checkpoints(output_dir)
        if earlier:
            raise InputError(
                f"--output_dir {output_dir}: contains {earlier[0].name} of an earlier run; resume it with "
                "--resume auto, or choose another folder"
            )
        return None
    if resume == RESUME_AUTO:
        newest, skipped = newest_complete(output_dir)
        for note in skipped:
            warn(note)
        return newest
    reason = why_incomplete(Path(resume))
    if reason:
        raise InputError(f"--resume {resume}: is not a complete checkpoint: {reason}")
    return Path(resume)


def initial_state(inputs: Inputs, sampler: WindowSampler) -> TrainerState:
    """Return the state at the start: of step 0, or of the checkpoint, which must belong to the same run.

    That run may have had fewer steps. Its warm-up stays as it was.
    """
    optim = inputs.options.optim
    total_steps = optim.max_steps or sampler.num_steps(optim.epochs)
    # A run that starts from an adapter validates first, to show that it stands where the adapter stood.
    due = inputs.start is not None and len(inputs.val) > 0
    evaluated_with = _evaluation_settings(inputs)
    fresh = TrainerState(
        total_steps,
        _training_settings(inputs, sampler),
        validation_due=due,
        evaluation_due=bool(evaluated_with),
        evaluated_with=evaluated_with,
    )
    if inputs.resume_from is not None:
        saved = read_state(inputs.resume_from)
        missing = (NOT_RECORDED.keys() & fresh.settings.keys()) - saved.settings.keys()
        saved.settings |= {name: NOT_RECORDED[name] for name in sorted(missing)}
        check_same_run(saved, fresh, inputs.resume_from, _differences_in_words(saved, fresh, inputs))
        fresh = saved
        _go_on_evaluating(fresh, evaluated_with)
    fresh.metric = inputs.options.evaluation.metric_for_best_model
    if fresh.warmup_steps is None:
        fresh.warmup_steps = int(optim.warmup_ratio * fresh.total_steps)
    fresh.total_steps = total_steps
    return fresh


def _evaluation_settings(inputs: Inputs) -> dict[str, Any]:
    """Return the settings without which evaluations cannot be compared; empty if there are none."""
    options = inputs.options.evaluation
    if options.evaluate_steps is None:
        return {}
    names = ("evaluate_samples", "evaluate_temperature", "recognizer", "speaker_model")
    return {name: getattr(options, name) for name in names} | {"validation samples": inputs.val.digest()}


def _go_on_evaluating(state: TrainerState, evaluated_with: dict[str, Any]) -> None:
    """Forget evaluations that cannot be compared with those to come, and one that is due, but no longer wanted."""
    if not evaluated_with:
        if state.evaluation_due:
            warn(f"note: the interrupted evaluation of step {state.step} is left out, as --evaluate_steps is not given")
        state.evaluation_due = False
        return
    changed = [name for name, value in evaluated_with.items() if state.evaluated_with.get(name) != value]
    if state.evaluations and changed:
        warn(f"note: {', '.join(changed)}: changed, so that earlier evaluations are not compared with those to come")
        state.evaluations = {}
    state.evaluated_with = evaluated_with


def describe_finished(state: TrainerState, options: TrainOptions) -> str:
    """Say that a resumed run is finished, and what trains it further; empty if it is not finished."""
    run, optim = options.run, options.optim
    if state.step >= state.total_steps:
        length = f"--epochs ({optim.epochs})" if optim.max_steps is None else f"--max_steps ({optim.max_steps})"
        return (
            f"this run is finished: all of its {counted(state.total_steps, 'step')} are done, and none is trained now; "
            f"to train further, resume it with more {length}"
        )
    if state.is_out_of_patience(run.early_stopping_patience, run.early_stopping_min_delta):
        return (
            f"this run is finished: --early_stopping_patience {run.early_stopping_patience} ended it at step "
            f"{state.step} of {state.total_steps}, and no step is trained now; to train further, resume it with more "
            "patience"
        )
    return ""


def _differences_in_words(saved: TrainerState, fresh: TrainerState, inputs: Inputs) -> dict[str, str]:
    """Describe the differences of settings whose values are digests."""
    assert inputs.resume_from is not None
    words = {"base": "was trained on another base: its config.json, or the name or size of a weight file, differs"}
    identity = saved.settings.get("training_data")
    if identity != fresh.settings["training_data"]:
        words["training_data"] = describe_data_change(inputs.resume_from.parent, identity, inputs.train)
    return words


def _training_settings(inputs: Inputs, sampler: WindowSampler) -> dict[str, Any]:
    """Return the settings that must be the same to resume from a checkpoint."""
    settings = {name: value for name, value in inputs.options.flat().items() if name not in FREE_ON_RESUME}
    # --load_in_4bit distinguishes lora from qlora.
    unused = asdict(inputs.options.lora) if inputs.options.is_full_finetuning else asdict(inputs.options.tune)
    settings = {name: value for name, value in settings.items() if name not in unused}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "micro_batches_per_step" if sampler.max_tokens else "samples_per_step": sampler.window_size,
        "training_data": inputs.train.digest(),
        "mix": list(inputs.train.mix.numbers) if inputs.train.mix else None,
        "base": inputs.bundle.identity,
        "init_from": f"SHA-256 {inputs.start.origins[0].sha256}" if inputs.start else None,
        "random_references": inputs.options.data.has_random_references,  # other values of --reference are in the data
    }
