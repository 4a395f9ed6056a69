"""Checks of option values, before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from higgs_ds.common.resources import command
from higgs_ds.options.evaluation import check_evaluation
from higgs_ds.options.fields import (
    DPO,
    EMBEDDINGS,
    NO_SPEAKER_PROMPT,
    PAIRS,
    RANDOM_REFERENCE,
    RESUME_AUTO,
    TRAIN_GROUPS,
)
from higgs_ds.options.flags import check_flag_options
from higgs_ds.options.learning_rates import check_learning_rates
from higgs_ds.options.objective import check_objective
from higgs_ds.options.speakers import check_speaker_options
from higgs_ds.options.train import DataOptions, TrainOptions

MOST_REPETITIONS = 1000  # of a sample in an epoch; larger numbers of --mix are taken for mistakes


def check_data_options(options: DataOptions) -> list[str]:
    """Return the problems of data options; empty if there are none."""
    problems = _check_manifests(options) + check_speaker_options(options)
    if not 0 <= options.val_split < 1:
        problems.append(f"--val_split {options.val_split}: must be from 0 to below 1")
    if not 0 <= options.reference_dropout < 1:
        problems.append(
            f"--reference_dropout {options.reference_dropout}: must be from 0 to below 1; to leave out all, use "
            "--reference none"
        )
    elif options.reference_dropout and options.reference == "none":
        problems.append(
            f"--reference_dropout {options.reference_dropout}: --reference none leaves out every reference already; "
            "remove one of them"
        )
    if not 0 < options.max_clip_s < float("inf"):
        problems.append(f"--max_clip_s {options.max_clip_s}: must be above 0")
    if options.trim_silence is not None and not 0 <= options.trim_silence < float("inf"):
        problems.append(f"--trim_silence {options.trim_silence}: must be 0 or more; leave it out to trim nothing")
    if not 0 < options.silence_db < float("inf"):
        problems.append(f"--silence_db {options.silence_db}: must be above 0")
    for name in ("max_seq_len", "num_workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be 1 or more")
    return problems


def _check_manifests(options: DataOptions) -> list[str]:
    """Return the problems of the lists of manifests, and of --mix."""
    problems = []
    for name in ("train_manifest", "val_manifest"):
        paths = getattr(options, name)
        if paths == ():
            problems.append(f"--{name}: names no manifest; leave the option out")
        first: dict[str, Path] = {}
        for path in paths or ():
            if "\0" in str(path):
                problems.append(f"--{name} {str(path)!r}: is not a file name: it contains a null character")
                continue
            key = os.path.realpath(path)
            if key in first:
                also = "" if first[key] == path else f", which is also {first[key]},"
                repeat = "; to repeat its samples, name it once, with the number 2 in --mix"
                problems.append(f"--{name}: names {path}{also} twice{repeat if name == 'train_manifest' else ''}")
            first[key] = path
    if options.mix is not None:
        shown, num_manifests = " ".join(f"{number:g}" for number in options.mix), len(options.train_manifests)
        if len(options.mix) != num_manifests:
            problems.append(
                f"--mix {shown}: {len(options.mix)} given, and --train_manifest names {num_manifests}; give a number "
                "for each manifest"
            )
        if not all(0 < number <= MOST_REPETITIONS for number in options.mix):
            problems.append(f"--mix {shown}: each number must be above 0, up to {MOST_REPETITIONS:,}")
    return problems


def _check_finetune_options(options: TrainOptions) -> list[str]:
    """Return the problems of options that contradict --finetune."""
    groups = options.tune.train_groups
    if not options.is_full_finetuning:
        problems = []
        if groups != TRAIN_GROUPS:
            problems.append(
                "--train_groups: only applies to --finetune full; use --lora_targets, and --also_train, for adapters"
            )
        if options.model.offload_embeddings and EMBEDDINGS in options.lora.also_train:
            problems.append(
                "--also_train embeddings: trained embeddings cannot be in host memory; remove --offload_embeddings"
            )
        return problems
    problems = []
    if options.model.load_in_4bit:
        problems.append(
            "--load_in_4bit: 4-bit weights cannot be trained with --finetune full; remove the option, or train "
            "adapters on them (--finetune qlora)"
        )
    problems += [
        f"--{lora_field.name}: only applies to adapters, and --finetune full trains none; remove the option"
        for lora_field in dataclasses.fields(options.lora)
        if lora_field.name != "init_from" and getattr(options.lora, lora_field.name) != lora_field.default
    ]
    if options.lora.init_from is not None:
        problems.append(
            f"--init_from: --finetune full trains no adapters; merge the adapter ({command('merge')}), and give the "
            "merged model as --base_ckpt"
        )
    if not groups:
        problems.append(f"--train_groups: nothing would be trained; name one or more of {', '.join(TRAIN_GROUPS)}")
    if options.model.offload_embeddings and EMBEDDINGS in groups:
        problems.append(
            "--offload_embeddings: trained embeddings cannot be in host memory; remove the option, or train other "
            f"groups (--train_groups {' '.join(group for group in TRAIN_GROUPS if group != EMBEDDINGS)})"
        )
    return problems


def _check_pairs(options: TrainOptions) -> list[str]:
    """Return the problems of options that do not go with the data of --objective."""
    data, pairs = options.data, options.objective.pairs
    if not options.objective.is_dpo:
        given = f"--format {PAIRS}: has rejected samples, which only --objective {DPO} with --pairs FILE trains on"
        return [given] if data.format == PAIRS and not pairs else []
    problems = []
    if not pairs and not options.run.dry_run:
        problems.append(f"--objective {DPO}: needs --pairs FILE, pairs of a chosen and a rejected sample")
    if pairs and data.train_manifest != pairs:
        problems.append(f"--train_manifest: --objective {DPO} trains on --pairs only; remove it")
    if pairs and data.format != PAIRS:
        problems.append(f"--format {data.format}: --pairs are always of the format {PAIRS}; remove the option")
    for name, value in (
        ("mix", data.mix),
        ("skip_bad", data.skip_bad),
        ("split_by", data.split_by if data.split_by != "sample" else None),
        ("reference_dropout", data.reference_dropout),
        ("reference", RANDOM_REFERENCE if data.reference == RANDOM_REFERENCE else None),
        ("speaker_prompt", data.speaker_prompt if data.speaker_prompt != NO_SPEAKER_PROMPT else None),
    ):
        if value:
            shown = " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
            problems.append(f"--{name} {shown}: does not go with --objective {DPO}; remove the option")
    return problems


def check_options(options: TrainOptions) -> list[str]:
    """Return the problems of all training options; empty if there are none."""
    flat = options.flat()
    problems = check_data_options(options.data) + check_flag_options(options.flags)
    problems += check_objective(options.objective) + _check_pairs(options) + check_evaluation(options.evaluation)
    if options.evaluation.evaluate_steps and not options.data.val_split and options.data.val_manifest is None:
        problems.append(
            "--evaluate_steps: needs held-out samples, and --val_split is 0; give some as --val_manifest, or leave out "
            "--val_split"
        )
    problems += _check_finetune_options(options) + check_learning_rates(options)

    def expect(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            problems.append(f"--{name} {flat[name]}: must be {allowed}")

    for name in (
        "lora_r", "lora_alpha", "batch_size", "bucket_size", "grad_accum", "epochs", "log_steps", "val_steps",
        "save_steps", "max_steps", "max_tokens_per_batch", "keep_checkpoints", "early_stopping_patience", "lr_cycles",
        "sample_steps", "num_samples",
    ):  # fmt: skip
        expect(name, flat[name] is None or flat[name] >= 1, "1 or more")
    for name in ("lora_dropout", "warmup_ratio"):
        expect(name, 0 <= flat[name] < 1, "from 0 to below 1")
    expect("lr_decay_ratio", 0 < flat["lr_decay_ratio"] <= 1, "above 0, up to 1")
    for name in (
        "weight_decay",
        "max_grad_norm",
        "text_loss_weight",
        "audio_loss_weight",
        "early_stopping_min_delta",
        "sample_temperature",
    ):
        expect(name, 0 <= flat[name] < float("inf"), "0 or more")
    checkpointing = flat["activation_checkpointing"]
    keywords = ("none", "every_layer", "auto")
    expect(
        "activation_checkpointing",
        checkpointing in keywords or (checkpointing.isdecimal() and int(checkpointing) >= 1),
        "none, every_layer, auto, or a number N of layers, 1 or more",
    )
    if flat["offload_checkpoints"] and checkpointing == "none":
        problems.append(
            "--offload_checkpoints: --activation_checkpointing none recomputes no layers; use every_layer, a number N, "
            "or auto"
        )
    expect("ema_decay", flat["ema_decay"] is None or 0 < flat["ema_decay"] < 1, "above 0 and below 1")
    expect("lr", 0 < flat["lr"] < float("inf"), "above 0")
    for name in ("device_memory_gib", "plan_ranks"):
        if flat[name] is not None:
            expect(name, 0 < flat[name] < float("inf"), "above 0")
            if not flat["dry_run"]:
                problems.append(f"--{name}: only applies to --dry_run")
    if flat["require_fit"] and not flat["dry_run"]:
        problems.append("--require_fit: only applies to --dry_run")
    if flat["push_to_hub"] and flat["hub_repo_id"] is None:
        problems.append("--push_to_hub: needs --hub_repo_id OWNER/NAME")
    for name in ("hub_repo_id", "hub_private", "hub_license", "upload_merged_model"):
        if flat[name] and not flat["push_to_hub"]:
            problems.append(f"--{name}: needs --push_to_hub")
    if flat["upload_merged_model"] and not flat["merge_adapter_with_base"] and not options.is_full_finetuning:
        problems.append("--upload_merged_model: needs --merge_adapter_with_base, which writes the merged model")
    if flat["early_stopping_min_delta"] and flat["early_stopping_patience"] is None:
        problems.append("--early_stopping_min_delta: needs --early_stopping_patience")
    if flat["resume"] == RESUME_AUTO and flat["output_dir"] is None:
        problems.append("--resume auto: needs --output_dir, the folder of the run to resume")
    if flat["text_loss_weight"] == flat["audio_loss_weight"] == 0:
        problems.append("--text_loss_weight and --audio_loss_weight are both 0: nothing would be trained")
    weights = flat["codebook_weights"]
    if weights is not None and (min(weights) < 0 or not 0 < sum(weights) < float("inf")):
        problems.append(f"--codebook_weights {weights}: must be 0 or more, with a sum above 0")
    return problems
