"""Build a run from checked inputs: model, adapters, engine, state."""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import PeftModel
from torch import nn

from higgs_ds.adapters.files import name_in_base
from higgs_ds.adapters.save import AdapterFormat, trained_parameters
from higgs_ds.adapters.speakers import NO_SPEAKERS, TrainedSpeakers, read_speakers
from higgs_ds.adapters.starting_point import StartingPoint, adapter_in, compare_quantization
from higgs_ds.bases.builtin import which_builtin
from higgs_ds.checkpoints.folder import masters_in, read_state
from higgs_ds.checkpoints.save import load_into_engine, load_masters_into, publish
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.checkpoints.trained_weights import FullFormat
from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import saving, write_json, write_text
from higgs_ds.common.precision import BF16, native_precision, torch_dtype
from higgs_ds.common.run_files import DROPPED_FILE, FLAGGED_FILE, INVALID_FILE, SETTINGS_FILE, SUMMARY_FILE
from higgs_ds.common.tensor_files import weight_files
from higgs_ds.data.flags import write_list
from higgs_ds.data.pairs import PairDataset
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.data.speakers import trained_voices
from higgs_ds.model.full import describe, make_trainable
from higgs_ds.model.fully_trained import is_own_weight
from higgs_ds.model.loading import empty_model, load_base, load_base_in_4bit, num_parameters
from higgs_ds.model.loss import LossWeights
from higgs_ds.model.quantization import BaseQuantization
from higgs_ds.model.recomputation import checkpoint_layers
from higgs_ds.options.train import recompute_every
from higgs_ds.planning.plan import with_checkpointing
from higgs_ds.planning.weights import Setting
from higgs_ds.reporting.report_page import Reporter, RunFacts
from higgs_ds.training.constant_codebooks import ConstantCodebooks
from higgs_ds.training.data_changes import record_training_data
from higgs_ds.training.engine import Engine
from higgs_ds.training.intervals import few_steps_warning, with_intervals
from higgs_ds.training.objectives import objective_of
from higgs_ds.training.overruled import overruled_by_data
from higgs_ds.training.overview import overview, plan_memory
from higgs_ds.training.preflight import check_room
from higgs_ds.training.reference_model import with_reference
from higgs_ds.training.resume import describe_finished, initial_state
from higgs_ds.training.run import Inputs, PlannedMemory, Run


def _resolve_activation_checkpointing(inputs: Inputs) -> Inputs:
    """Resolve `--activation_checkpointing auto` for the longest sample, alike on all ranks; on a CPU it means none."""
    if inputs.options.model.activation_checkpointing != "auto":
        return inputs
    choice, here = "none", distributed.device()
    if here.type == "cuda":
        ranks = distributed.world_size()
        setting = Setting(
            inputs.bundle.config, inputs.options, inputs.ds_settings, ranks, adapted=inputs.adapted,
            lengths=inputs.lengths,
        )  # fmt: skip
        decided = with_checkpointing(setting, torch.cuda.get_device_properties(here).total_memory)
        choice = distributed.broadcast_object(decided.options.model.activation_checkpointing)
    say(f"--activation_checkpointing auto: {choice}")
    options = inputs.options.replace(activation_checkpointing=choice)
    return replace(inputs, options=options, overruled=(*inputs.overruled, f"--activation_checkpointing auto: {choice}"))


def load_run(inputs: Inputs) -> Run:
    """Load the model, set up what is trained, start the engine, restore a checkpoint. Every rank must call this."""
    inputs = _resolve_activation_checkpointing(inputs)
    options, bundle, resume_from = inputs.options, inputs.bundle, inputs.resume_from
    optim = options.optim
    limit, group_size = optim.max_tokens_per_batch, options.objective.group_size
    sampler = WindowSampler(
        lengths=inputs.train.group_lengths,
        micro_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.grad_accum,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=optim.seed,
        bucket_size=optim.bucket_size,
        max_tokens=limit // group_size if limit else None,
        lengths_in=inputs.train.lengths_in if inputs.train.references is not None else None,
        mix=inputs.train.mix,
        group_size=group_size,
    )
    state = distributed.run_on_all_ranks(lambda: initial_state(inputs, sampler))
    options = with_intervals(options, state.total_steps)
    inputs = replace(inputs, options=options)
    memory = distributed.run_on_all_ranks(lambda: _check_and_announce(inputs, sampler, state))
    model, quantization = distributed.run_on_all_ranks(lambda: _model_to_train(inputs))
    trained = trained_parameters(model)
    masters = masters_in(resume_from) if resume_from else _masters_to_start_from(inputs.start, trained)
    if masters:
        load_masters_into(masters, trained)
    weights = LossWeights.of(
        optim.text_loss_weight, optim.audio_loss_weight, bundle.stream.num_codebooks, optim.codebook_weights
    )
    dual = bundle.family.loss_model(model, options.model.offload_checkpoints)
    engine = Engine(
        dual, trained, inputs.ds_settings, optim, state.total_steps, weights, state.warmup_steps, inputs.full_parts,
        objective_of(options.objective, weights),
    )  # fmt: skip
    torch.manual_seed(optim.seed + 1 + distributed.rank())  # different dropout on every rank
    if resume_from is not None:
        load_into_engine(resume_from, engine, state)
        _announce_change(read_state(resume_from), state, engine.scheduler.get_last_lr(), optim.lr_scheduler_type)
    elif masters:
        engine.set_masters(masters)
    train, val = inputs.train, inputs.val
    if isinstance(train, PairDataset) and isinstance(val, PairDataset):
        train, val = with_reference(engine, train, val, options.rows_per_batch, inputs.output_dir, resume_from)
    distributed.on_main(lambda: _write_run_files(inputs, state))
    form = _output_format(inputs, model, quantization)
    overruled = [
        *inputs.overruled,
        *overruled_by_data(options, len(inputs.train), state.total_steps, state.warmup_steps or 0),
    ]
    has_builtin_codec = which_builtin(options.model.base_ckpt) is not None and options.model.codec_ckpt is None
    facts = RunFacts(state.total_steps, overruled, has_builtin_codec)
    reporter = Reporter(inputs.output_dir, not options.run.no_report, facts)
    return Run(
        options, inputs.output_dir, bundle, train, val, sampler, engine, form, state, inputs.lock,
        reporter, ConstantCodebooks.of(inputs.train, weights, has_builtin_codec), memory, inputs.speech_test,
    )  # fmt: skip


def _masters_to_start_from(start: StartingPoint | None, trained: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return the values of --init_from; heads and embeddings that only --also_train names keep those of the base."""
    if start is None:
        return {}
    of_base = {name: p.detach().float() for name, p in trained.items() if is_own_weight(name_in_base(name))}
    return of_base | start.adapter.tensors()


def _announce_change(saved: TrainerState, state: TrainerState, rates: list[float], schedule: str) -> None:
    """Print how a run was made longer, and what that means for its learning rate."""
    if state.total_steps == saved.total_steps:
        return
    lr, planned = (", ".join(f"{rate:.4g}" for rate in values) for values in (rates, saved.scheduler["_last_lr"]))
    goes_on = "goes on as before" if rates == saved.scheduler["_last_lr"] else f"was to be {planned}"
    say(
        f"the run is made longer, from {saved.total_steps} to {state.total_steps} steps; the learning rate "
        f"({schedule}) of step {state.step + 1} is {lr}, and {goes_on}"
    )


def _output_format(
    inputs: Inputs, model: nn.Module, quantization: BaseQuantization | None
) -> AdapterFormat | FullFormat:
    """Return what a checkpoint records beside the trained tensors."""
    bundle, tune, data = inputs.bundle, inputs.options.tune, inputs.options.data
    speakers = TrainedSpeakers(data.speaker_prompt, trained_voices(inputs.train.index, inputs.train.rows, data))
    if inputs.options.objective.is_dpo:  # pairs have the prompts that the model at the start was trained with
        speakers = replace(_speakers_at_start(inputs), path=None)
    if isinstance(model, PeftModel):
        config, origins = model.peft_config["default"], inputs.start.origins if inputs.start else ()
        return AdapterFormat(
            config, quantization, inputs.fully_trained, bundle.weights_digest, origins, speakers=speakers
        )
    return FullFormat(tune.train_groups, bundle.name, bundle.identity, inputs.full_parts, speakers)


def _speakers_at_start(inputs: Inputs) -> TrainedSpeakers:
    """Return the speakers of the adapter that a run starts from, or is resumed from, or else those of its base."""
    folder = inputs.resume_from or (inputs.start.folder if inputs.start else None)
    of_adapter = read_speakers(adapter_in(folder)) if folder else NO_SPEAKERS
    return of_adapter if of_adapter.voices else read_speakers(inputs.bundle.folder)


def _write_run_files(inputs: Inputs, state: TrainerState) -> None:
    """Write the settings and the data's summary; when resuming, also finish what a kill interrupted."""
    with saving(inputs.output_dir):
        write_json(inputs.output_dir / SETTINGS_FILE, inputs.options.flat())
        write_text(inputs.output_dir / SUMMARY_FILE, inputs.summary)
        (inputs.output_dir / INVALID_FILE).unlink(missing_ok=True)  # of a start that failed
        if inputs.too_long:
            write_text(inputs.output_dir / DROPPED_FILE, "\n".join(inputs.too_long) + "\n")
        if any(flagged.flags for flagged in inputs.flagged):
            write_list(inputs.output_dir / FLAGGED_FILE, inputs.flagged)
    record_training_data(inputs.output_dir, inputs.train)
    if inputs.resume_from is not None:
        publish(inputs.resume_from, inputs.output_dir, state, inputs.options.run.keep_checkpoints)


def _check_and_announce(inputs: Inputs, sampler: WindowSampler, state: TrainerState) -> PlannedMemory | None:
    """Check the free disk space, and print the table at the start of a run, on rank 0. Return its planned memory.

    Raises:
        InputError: the outputs do not fit on the disk, or --lora_targets is not in the base.
    """
    options = inputs.options
    empty = empty_model(inputs.bundle.config, torch.float32)
    shapes = make_trainable(empty, options.tune, options.lora, "", torch.float32, inputs.full_parts, inputs.adapted)
    trained_bytes = 4 * sum(parameter.numel() for parameter in trained_parameters(shapes).values())
    base_bytes = sum(path.stat().st_size for path in weight_files(inputs.bundle.folder))
    if not distributed.is_main():
        return None
    averaged = options.optim.ema_decay is not None
    check_room(inputs.output_dir, state, options.run, trained_bytes, base_bytes, options.is_full_finetuning, averaged)
    memory = None
    if not options.run.quiet:
        memory = plan_memory(inputs)
        base_parameters = num_parameters(inputs.bundle.folder, inputs.full_parts)
        trained = describe(shapes, options.tune, base_parameters, inputs.fully_trained)
        say(overview(inputs, sampler, state, trained, memory))
        finished = describe_finished(state, options) if inputs.resume_from else ""
        if finished:
            say(finished)
    few = few_steps_warning(options, sampler, state.total_steps)
    if few and inputs.resume_from is None:
        warn(few)
    if options.is_full_finetuning and options.run.merge_adapter_with_base:
        warn("warning: --merge_adapter_with_base: --finetune full leaves nothing to merge; final_model/ is complete")
    native = native_precision(distributed.device())
    if options.model.precision == BF16 != native:
        say(f"note: this device has no instructions for bf16; --precision {native} is much faster here")
    return memory


def _model_to_train(inputs: Inputs) -> tuple[nn.Module, BaseQuantization | None]:
    options, bundle = inputs.options, inputs.bundle
    dtype = torch_dtype(options.model.precision)
    quantization = None
    if options.model.load_in_4bit:
        here = distributed.device()
        # Stage 3 moves the weights to the GPUs itself, a share to each rank.
        keep_on = torch.device("cpu") if inputs.zero_stage == 3 else here
        model, quantization = load_base_in_4bit(bundle.folder, dtype, here, keep_on, bundle.added)
        if inputs.start is not None and inputs.resume_from is None:
            warning = compare_quantization(inputs.start, quantization)
            if warning:
                warn(warning)
    else:
        model = load_base(bundle.folder, dtype, bundle.added)
    if dtype == torch.float16:
        _check_range(model)
    torch.manual_seed(options.optim.seed)  # the same initial values on every rank
    if bundle.added:
        model.add_parts(bundle.added, bundle.whisper_folder)
    model.set_attn_implementation(options.model.attn_implementation)
    if options.model.offload_embeddings:
        inputs.bundle.family.offload_embeddings(model)
    every = recompute_every(options.model)
    if every is not None:
        checkpoint_layers(model, every)
    full_parts, adapted = inputs.full_parts, inputs.adapted
    return make_trainable(model, options.tune, options.lora, bundle.name, dtype, full_parts, adapted), quantization


def _check_range(model: nn.Module) -> None:
    """Raise InputError if weights of a base are not finite in fp16."""
    outside = [
        name for name, weight in model.named_parameters() if weight.is_floating_point() and not weight.isfinite().all()
    ]
    if outside:
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        raise InputError(
            f"--precision fp16: {outside[0]}{more} of the base has values that fp16 does not hold (above 65,504); use "
            "--precision bf16 or fp32"
        )
