"""Everything before the first step: all inputs checked at once, audio encoded, model, adapters and engine made."""

from __future__ import annotations

import re
import socket
import textwrap
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from higgs_ds import checkpoint, distributed, ds_config
from higgs_ds.builtin import SAMPLE_MANIFEST
from higgs_ds.bundle import Bundle, open_for_training
from higgs_ds.checkpoint import TrainerState
from higgs_ds.config import RESUME_AUTO, RESUME_NEVER, TrainOptions, check_options, recompute_every
from higgs_ds.data.audio_codes import default_cache_dir
from higgs_ds.data.coder import Coder
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.index import Index
from higgs_ds.data.sampler import WindowSampler, split_validation
from higgs_ds.engine import Engine
from higgs_ds.errors import InputError, collected
from higgs_ds.export import AdapterFormat, trained_parameters
from higgs_ds.files import saving, tidy, write_json, write_text
from higgs_ds.hub import weight_files
from higgs_ds.inputs import Inputs
from higgs_ds.loss import LossWeights
from higgs_ds.merge import check_layout
from higgs_ds.metrics import DROPPED_FILE, SETTINGS_FILE, SUMMARY_FILE, say, warn
from higgs_ds.model.full import describe, make_trainable
from higgs_ds.model.higgs import (
    DualLossModel,
    check_weights,
    checkpoint_layers,
    empty_model,
    load_base,
    load_base_in_4bit,
    num_parameters,
    offload_embeddings,
)
from higgs_ds.model.lora import check_biases
from higgs_ds.model.nf4 import BaseQuantization
from higgs_ds.model.parts import parts_of
from higgs_ds.overview import overview
from higgs_ds.planner import Setting, with_checkpointing
from higgs_ds.preflight import check_room
from higgs_ds.prepare import Checked, Preparation, check_folders, scratch_problems
from higgs_ds.publish import check_login
from higgs_ds.support import unsupported
from higgs_ds.trained import FullFormat

# What a run writes by way of a temporary name, which a kill may leave behind.
WRITTEN = re.compile(
    r"checkpoint-\d+|lora_adapters|final_model|adapter|merged_model|trainer_state\.json|settings\.json|"
    r"metrics\.jsonl|dropped_samples\.txt|data_summary\.txt|report\.html"
)
# Options that may differ when a run goes on: they do not change what is trained. Batch size and accumulation may, as
# long as the number of samples per step stays.
FREE_ON_RESUME = (
    "output_dir", "resume", "log_steps", "val_steps", "save_steps", "keep_checkpoints", "on_nonfinite",
    "merge_adapter_with_base", "export_layout", "deepspeed", "cache_dir", "early_stopping_patience",
    "early_stopping_min_delta", "report_to", "quiet", "no_report", "sample_steps", "num_samples", "sample_temperature",
    "push_to_hub", "hub_repo_id", "hub_private", "upload_merged_model",
    "activation_checkpointing", "offload_embeddings", "offload_checkpoints", "attn_implementation",
    "batch_size", "grad_accum", "epochs", "max_steps",
    "train_manifest", "val_manifest", "val_split", "split_by", "format", "reference", "normalize_text",
    "allow_text_targets", "max_clip_s", "max_seq_len", "skip_bad", "num_workers", "base_ckpt", "base_revision",
    "codec_ckpt", "dry_run", "device_memory_gib", "plan_ranks",
)  # fmt: skip


@dataclass
class Run:
    """Everything that the loop works with."""

    options: TrainOptions
    output_dir: Path
    bundle: Bundle
    train: Dataset
    val: Dataset
    sampler: WindowSampler
    engine: Engine
    form: AdapterFormat | FullFormat
    state: TrainerState


def start(options: TrainOptions, given: set[str]) -> Run:
    """Check, encode, load. Every rank must call this.

    Args:
        given: names of the options that the user gave himself; these a JSON file may not contradict.

    Raises InputError, the same on every rank, before any weight of the base is loaded.
    """
    distributed.raise_problems(check_options(options))
    return _load(_check_and_encode(options, given))


def _check_and_encode(options: TrainOptions, given: set[str]) -> Inputs:
    problems: list[str] = []
    output_dir = _output_dir(options)
    cache_dir = options.data.cache_dir or default_cache_dir()
    problems += check_folders(output_dir=output_dir)
    no_scratch = scratch_problems(options.data, cache_dir)
    resolved = collected(problems, lambda: _resolve_ds_config(options, given))
    no_cache = any(distributed.gather_objects(bool(no_scratch)))
    bundle = None if no_cache else collected(problems, lambda: _open_base(options, cache_dir))
    resume_from = collected(problems, lambda: _resume_from(options, output_dir))
    collected(problems, lambda: distributed.on_main(lambda: check_login(options.run)))
    distributed.raise_problems(problems + no_scratch if no_scratch else [])
    if not all(distributed.gather_objects(bundle is not None)):
        bundle = None
    # Without a good base the samples are looked at all the same, so that their problems are not kept for the next try.
    with Preparation(options.data, bundle, cache_dir) as preparation:
        manifests = [options.data.train_manifest or SAMPLE_MANIFEST, options.data.val_manifest]
        checked = [preparation.check(path) for path in manifests if path is not None]
        problems += [problem for manifest in checked for problem in manifest.problems]
        distributed.raise_problems(problems)
        assert resolved and bundle and preparation.coder  # noqa: PT018 - what is missing would be among the problems
        settings, options = resolved
        for manifest in checked:
            preparation.encode(manifest, distributed.device())
        summary = distributed.on_main(lambda: _summary(preparation, checked))
        indexes = [preparation.keep(manifest) for manifest in checked]
    if options.model.whisper_conditioning and not indexes[0].any_heard():
        nothing = (
            "no sample has audio in a system or user turn, which is all that the tower hears; leave the option out"
        )
        advice = "or put references there (--reference system, for recordings)"
        distributed.raise_problems([f"--whisper_conditioning: {nothing}, {advice}"])
    train, val, too_long = _select(options, indexes, preparation.coder)
    return Inputs(options, settings, output_dir, bundle, train, val, too_long, summary, resume_from)


def _summary(preparation: Preparation, checked: list[Checked]) -> str:
    parts = [f"{one.path}:\n{textwrap.indent(preparation.describe(one), '  ')}\n" for one in checked]
    return "".join(parts)


def _resolve_ds_config(options: TrainOptions, given: set[str]) -> tuple[dict[str, Any], TrainOptions]:
    config = ds_config.read_ds_config(options.run.deepspeed)
    settings, options = ds_config.resolve(config, options, given, distributed.world_size())
    problems = unsupported(options, settings, distributed.device().type == "cuda")
    if problems:
        raise InputError(problems)
    return settings, options


def _open_base(options: TrainOptions, cache_dir: Path) -> Bundle:
    bundle = open_for_training(options.model, cache_dir)
    if options.run.merge_adapter_with_base or options.in_full:
        check_layout(parts_of(bundle.config), options.run.export_layout)
    if options.run.sample_steps is not None and parts_of(bundle.config).audio_tower is not None:
        raise InputError("--sample_steps: speaks without what a Whisper tower hears; leave it out with such a base")
    check_weights(bundle.folder)
    check_biases(bundle.config, options.lora)
    weights = options.optim.codebook_weights
    if weights is not None and len(weights) != bundle.config.num_codebooks:
        raise InputError(
            f"--codebook_weights: {len(weights)} given, the base has {bundle.config.num_codebooks} codebooks"
        )
    return bundle


def _output_dir(options: TrainOptions) -> Path:
    if options.run.output_dir is not None:
        return options.run.output_dir
    return distributed.broadcast_object(Path("outputs") / time.strftime("%Y%m%d-%H%M%S"))


def _resume_from(options: TrainOptions, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, which rank 0 decides on. Every rank must call this."""
    found = distributed.on_main(lambda: _find_resumable(options, output_dir))
    if found is not None and not found.is_dir():
        raise InputError(
            f"{found}: is not to be seen on {socket.gethostname()}; all nodes must share the output folder"
        )
    return found


def _find_resumable(options: TrainOptions, output_dir: Path) -> Path | None:
    """The checkpoint to go on from; an earlier run's results are never overwritten unasked."""
    with saving(output_dir):
        tidy(output_dir, WRITTEN)
    resume = options.run.resume
    if resume == RESUME_NEVER:
        earlier = checkpoint.find_checkpoints(output_dir)
        if earlier:
            raise InputError(
                f"--output_dir {output_dir}: holds {earlier[0].name} of an earlier run; go on with --resume auto, "
                "or choose another folder"
            )
        return None
    if resume == RESUME_AUTO:
        newest, passed_over = checkpoint.newest_complete(output_dir)
        for note in passed_over:
            warn(note)
        return newest
    reason = checkpoint.why_incomplete(Path(resume))
    if reason:
        raise InputError(f"--resume {resume}: is no complete checkpoint: {reason}")
    return Path(resume)


def _select(options: TrainOptions, indexes: list[Index], coder: Coder) -> tuple[Dataset, Dataset, list[str]]:
    """The samples to train on and to validate on, and the lines of those that are left out for their length."""
    data, seed = options.data, options.optim.seed
    short = [np.flatnonzero(index.num_tokens <= (data.max_seq_len or np.inf)) for index in indexes]
    too_long = [
        f"{source}: {index.num_tokens[row]} tokens"
        for index, rows in zip(indexes, short, strict=True)
        for row in np.setdiff1d(np.arange(len(index)), rows)
        for source in index.sources([row])
    ]
    if len(indexes) == 2:
        train, val = (Dataset(index, rows, coder) for index, rows in zip(indexes, short, strict=True))
    else:
        (index,), (rows,) = indexes, short
        groups = rows if data.split_by == "sample" else _speakers(index, options)[rows]
        at_train, at_val = split_validation(groups, data.val_split, seed)
        train, val = Dataset(index, rows[at_train], coder), Dataset(index, rows[at_val], coder)
    if len(train) == 0:
        raise InputError(f"--max_seq_len {data.max_seq_len}: every sample is longer; nothing is left to train on")
    if options.run.early_stopping_patience is not None and len(val) == 0:
        raise InputError("--early_stopping_patience: nothing to validate on; give --val_manifest or --val_split")
    longest = int(max(dataset.index.num_tokens[dataset.rows].max(initial=0) for dataset in (train, val)))
    if options.optim.max_tokens_per_batch and longest > options.optim.max_tokens_per_batch:
        raise InputError(
            f"--max_tokens_per_batch {options.optim.max_tokens_per_batch}: the longest sample has {longest} tokens; "
            "give at least as many, or leave out the longest with --max_seq_len"
        )
    return train, val, too_long


def _speakers(index: Index, options: TrainOptions) -> np.ndarray:
    """The number of each sample's speaker, for a split that parts no speaker's samples."""
    numbers, names = index.labels("speaker")
    unnamed = int((numbers < 0).sum())
    if unnamed or len(names) < 2:
        raise InputError(
            f"--split_by speaker: {unnamed} samples name no speaker, the others {len(names)}; all must name one, "
            "and there must be two or more. Use --split_by sample or --val_manifest"
        )
    return numbers


def _with_checkpointing(inputs: Inputs) -> Inputs:
    """Decide `--activation_checkpointing auto` for the longest sample, alike on all ranks; on a CPU, it is none."""
    if inputs.options.model.activation_checkpointing != "auto":
        return inputs
    choice, here = "none", distributed.device()
    if here.type == "cuda":
        asked = inputs.options.replace(max_seq_len=inputs.longest)
        setting = Setting(inputs.bundle.config, asked, inputs.ds_settings, distributed.world_size())
        decided = with_checkpointing(setting, torch.cuda.get_device_properties(here).total_memory)
        choice = distributed.broadcast_object(decided.options.model.activation_checkpointing)
    say(f"--activation_checkpointing auto: {choice}")
    return replace(inputs, options=inputs.options.replace(activation_checkpointing=choice))


def _load(inputs: Inputs) -> Run:
    inputs = _with_checkpointing(inputs)
    options, bundle, resume_from = inputs.options, inputs.bundle, inputs.resume_from
    optim = options.optim
    sampler = WindowSampler(
        lengths=inputs.train.lengths,
        micro_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.grad_accum,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=optim.seed,
        bucket_size=optim.bucket_size,
        max_tokens=optim.max_tokens_per_batch,
    )
    state = distributed.agreed(lambda: _state(inputs, sampler))
    distributed.on_main(lambda: _look_ahead(inputs, sampler, state))
    model, quantization = distributed.agreed(lambda: _model_to_train(inputs))
    trained = trained_parameters(model)
    if resume_from is not None:
        checkpoint.load_masters_into(resume_from, trained)
    weights = LossWeights.of(
        optim.text_loss_weight, optim.audio_loss_weight, bundle.config.num_codebooks, optim.codebook_weights
    )
    dual = DualLossModel(model, options.model.offload_checkpoints)
    engine = Engine(dual, trained, inputs.ds_settings, optim, state.total_steps, weights)
    torch.manual_seed(optim.seed + 1 + distributed.rank())  # dropout of its own on every rank
    if resume_from is not None:
        checkpoint.load_into_engine(resume_from, engine, state)
    distributed.on_main(lambda: _begin_output(inputs, state))
    form = _form(inputs, model, quantization)
    return Run(options, inputs.output_dir, bundle, inputs.train, inputs.val, sampler, engine, form, state)


def _form(inputs: Inputs, model: nn.Module, quantization: BaseQuantization | None) -> AdapterFormat | FullFormat:
    """What is written beside the tensors that are trained."""
    bundle, tune = inputs.bundle, inputs.options.tune
    if isinstance(model, PeftModel):
        return AdapterFormat(model.peft_config["default"], quantization, inputs.in_full)
    return FullFormat(tune.train_groups, bundle.name, bundle.identity, inputs.in_full)


def _begin_output(inputs: Inputs, state: TrainerState) -> None:
    """Write down the settings; a run that goes on also sees to what it was killed before it could do."""
    with saving(inputs.output_dir):
        write_json(inputs.output_dir / SETTINGS_FILE, inputs.options.flat())
        write_text(inputs.output_dir / SUMMARY_FILE, inputs.summary)
        if inputs.too_long:
            write_text(inputs.output_dir / DROPPED_FILE, "\n".join(inputs.too_long) + "\n")
    if inputs.resume_from is not None:
        checkpoint.publish(inputs.resume_from, inputs.output_dir, state, inputs.options.run.keep_checkpoints)


def _state(inputs: Inputs, sampler: WindowSampler) -> TrainerState:
    """Where the run begins: at step 0, or where the checkpoint stands, which must be of the same run."""
    optim = inputs.options.optim
    total_steps = optim.max_steps or sampler.num_steps(optim.epochs)
    fresh = TrainerState(total_steps, _training_settings(inputs, sampler))
    if inputs.resume_from is None:
        return fresh
    saved = checkpoint.read_state(inputs.resume_from)
    checkpoint.check_same_run(saved, fresh, inputs.resume_from)
    return saved


def _look_ahead(inputs: Inputs, sampler: WindowSampler, state: TrainerState) -> None:
    """Say what is about to be trained, on what, and where it will be.

    Raises InputError where what is to be written does not fit, or --lora_targets is not in the base.
    """
    options = inputs.options
    empty = empty_model(inputs.bundle.config, torch.float32)
    shapes = make_trainable(empty, options.tune, options.lora, "", torch.float32, inputs.in_full)
    trained_bytes = 4 * sum(parameter.numel() for parameter in trained_parameters(shapes).values())
    base_bytes = sum(path.stat().st_size for path in weight_files(inputs.bundle.folder))
    check_room(inputs.output_dir, state, options.run, trained_bytes, base_bytes, options.in_full)
    if not options.run.quiet:
        base_parameters = num_parameters(inputs.bundle.folder, inputs.in_full)
        say(overview(inputs, sampler, state, describe(shapes, options.tune, base_parameters, inputs.in_full)))
    if options.in_full and options.run.merge_adapter_with_base:
        warn("warning: --merge_adapter_with_base: --finetune full leaves nothing to merge; final_model/ is complete")
    on_cpu = distributed.device().type == "cpu"
    if on_cpu and options.model.precision == "bf16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        say("note: this CPU has no instructions for bf16; --precision fp32 is much faster here")


def _training_settings(inputs: Inputs, sampler: WindowSampler) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint."""
    settings = {name: value for name, value in inputs.options.flat().items() if name not in FREE_ON_RESUME}
    # --load_in_4bit tells lora and qlora apart.
    unused = asdict(inputs.options.lora) if inputs.options.in_full else asdict(inputs.options.tune)
    settings = {name: value for name, value in settings.items() if name not in unused}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "micro_batches_per_step" if sampler.max_tokens else "samples_per_step": sampler.window_size,
        "training_data": inputs.train.digest(),
        "base": inputs.bundle.identity,
    }


def _model_to_train(inputs: Inputs) -> tuple[nn.Module, BaseQuantization | None]:
    options, bundle = inputs.options, inputs.bundle
    dtype = torch.bfloat16 if options.model.precision == "bf16" else torch.float32
    quantization = None
    if options.model.load_in_4bit:
        here = distributed.device()
        # Stage 3 takes the weights to the GPUs itself, each rank its share.
        keep_on = torch.device("cpu") if inputs.zero_stage == 3 else here
        model, quantization = load_base_in_4bit(bundle.folder, dtype, here, keep_on, bundle.added)
    else:
        model = load_base(bundle.folder, dtype, bundle.added)
    torch.manual_seed(options.optim.seed)  # the same start on every rank
    if bundle.added:
        model.add_parts(bundle.added, bundle.whisper_folder)
    model.set_attn_implementation(options.model.attn_implementation)
    if options.model.offload_embeddings:
        offload_embeddings(model)
    every = recompute_every(options.model)
    if every is not None:
        checkpoint_layers(model, every)
    return make_trainable(model, options.tune, options.lora, bundle.name, dtype, inputs.in_full), quantization
