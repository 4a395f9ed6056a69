"""Everything before the first step: all inputs checked at once, audio encoded, model, adapters and engine made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel

from higgs_ds import checkpoint, distributed, ds_config
from higgs_ds.builtin import SAMPLE_MANIFEST
from higgs_ds.bundle import Bundle, open_bundle
from higgs_ds.checkpoint import TrainerState
from higgs_ds.config import RESUME_AUTO, RESUME_NEVER, TrainOptions, check_options
from higgs_ds.data.audio_codes import CodeCache, default_cache_dir, encode_clips, find_keys
from higgs_ds.data.codec import Codec, codec_digest
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.manifest import read_manifest
from higgs_ds.data.sample import AudioClip, Sample
from higgs_ds.data.sampler import WindowSampler, split_validation
from higgs_ds.engine import Engine
from higgs_ds.errors import InputError
from higgs_ds.export import adapter_parameters
from higgs_ds.files import saving, why_not_writable, write_json
from higgs_ds.loss import LossWeights
from higgs_ds.metrics import say
from higgs_ds.model.higgs import DualLossModel, check_text_head, load_base
from higgs_ds.model.lora import add_lora, describe

T = TypeVar("T")
# Options that may differ when a run goes on: they do not change what is trained. Batch size and accumulation may, as
# long as the number of samples per step stays.
FREE_ON_RESUME = (
    "output_dir", "resume", "log_steps", "val_steps", "save_steps", "merge_adapter_with_base", "deepspeed", "cache_dir",
    "activation_checkpointing", "batch_size", "grad_accum", "epochs", "max_steps", "train_manifest", "val_manifest",
    "val_split", "allow_text_targets", "base_ckpt", "base_revision", "codec_ckpt",
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What the checks have found good."""

    options: TrainOptions
    ds_settings: dict[str, Any]
    output_dir: Path
    bundle: Bundle
    train: Dataset
    val: Dataset
    missing: list[AudioClip]  # clips of this rank's share that are not encoded yet
    resume_from: Path | None


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
    lora_config: LoraConfig
    state: TrainerState


def start(options: TrainOptions, given: set[str]) -> Run:
    """Check, encode, load. Every rank must call this.

    Args:
        given: names of the options that the user gave himself; these a JSON file may not contradict.

    Raises InputError, the same on every rank, before any weight of the base is loaded.
    """
    distributed.raise_problems(check_options(options))
    inputs = _check(options, given)
    _encode(inputs)
    return _load(inputs)


def _check(options: TrainOptions, given: set[str]) -> Inputs:
    problems: list[str] = []

    def attempt(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except InputError as error:
            problems.extend(error.problems)
            return None

    output_dir = _output_dir(options)
    cache_dir = options.data.cache_dir or default_cache_dir()
    for name, folder in (("output_dir", output_dir), ("cache_dir", cache_dir)):
        reason = why_not_writable(folder)
        if reason:
            problems.append(f"--{name} {folder}: cannot be written to: {reason}; choose another folder")
    resolved = attempt(lambda: _resolve_ds_config(options, given))
    bundle = None if why_not_writable(cache_dir) else attempt(lambda: _open_base(options, cache_dir))
    resume_from = attempt(lambda: _resume_from(options, output_dir))
    samples = _read_samples(options, problems)
    # Without a good base the clips are looked at all the same, so that their problems are not kept for the next try.
    cache = CodeCache(cache_dir, codec_digest(bundle.codec_folder) if bundle else "")
    keys, missing = _find_clips(cache, bundle, [*samples[0], *samples[1]], problems)
    distributed.raise_problems(problems)
    assert resolved and bundle  # noqa: PT018 - what is missing would be among the problems
    settings, options = resolved

    def dataset(its_samples: list[Sample]) -> Dataset:
        return Dataset(its_samples, keys, cache, bundle.tokenizer, bundle.stream, bundle.pad_id)

    return Inputs(options, settings, output_dir, bundle, dataset(samples[0]), dataset(samples[1]), missing, resume_from)


def _resolve_ds_config(options: TrainOptions, given: set[str]) -> tuple[dict[str, Any], TrainOptions]:
    config = ds_config.read_ds_config(options.run.deepspeed)
    return ds_config.resolve(config, options, given, distributed.world_size())


def _open_base(options: TrainOptions, cache_dir: Path) -> Bundle:
    model = options.model
    bundle = open_bundle(model.base_ckpt, model.base_revision, model.codec_ckpt, cache_dir)
    check_text_head(bundle.folder)
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
    """The checkpoint to go on from; an earlier run's results are never overwritten unasked."""
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
            say(note)
        return newest
    reason = checkpoint.why_incomplete(Path(resume))
    if reason:
        raise InputError(f"--resume {resume}: is no complete checkpoint: {reason}")
    return Path(resume)


def _read_samples(options: TrainOptions, problems: list[str]) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples; what is wrong with their manifests is added to `problems`."""
    data = options.data
    samples, found = read_manifest(data.train_manifest or SAMPLE_MANIFEST, data.allow_text_targets)
    problems += found
    if data.val_manifest is not None:
        val_samples, found = read_manifest(data.val_manifest, data.allow_text_targets)
        problems += found
        return samples, val_samples
    train, val = split_validation(len(samples), data.val_split, options.optim.seed)
    return [samples[i] for i in train], [samples[i] for i in val]


def _find_clips(
    cache: CodeCache, bundle: Bundle | None, samples: list[Sample], problems: list[str]
) -> tuple[dict[AudioClip, str], list[AudioClip]]:
    """Keys of all clips, and this rank's share of those to be encoded; every rank looks at a share of the files."""
    sources: dict[AudioClip, str] = {}
    for sample in samples:
        for clip in sample.clips:
            sources.setdefault(clip, sample.source)
    share = list(sources.items())[distributed.rank() :: distributed.world_size()]
    sample_rate, hop_length = (bundle.sample_rate, bundle.hop_length) if bundle else (24000, 960)
    my_keys, missing, found = find_keys(cache, share, sample_rate, hop_length)
    problems += found
    return {clip: key for keys in distributed.gather_objects(my_keys) for clip, key in keys.items()}, missing


def _encode(inputs: Inputs) -> None:
    """Encode this rank's share of the missing clips, and wait for the others'."""
    if inputs.missing:
        codec = Codec(inputs.bundle.codec_folder, distributed.device())
        encode_clips(inputs.train.cache, codec, inputs.missing, inputs.train.keys)
        del codec
        torch.cuda.empty_cache()  # give the model the codec's room
    distributed.barrier()


def _load(inputs: Inputs) -> Run:
    options, bundle, resume_from = inputs.options, inputs.bundle, inputs.resume_from
    optim = options.optim
    sampler = WindowSampler(
        num_samples=len(inputs.train),
        micro_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.grad_accum,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=optim.seed,
    )
    state = distributed.agreed(lambda: _state(inputs, sampler))
    model = distributed.agreed(lambda: _adapted_model(options, bundle))
    trained = adapter_parameters(model)
    _report(inputs, sampler, state, describe(model))
    if resume_from is not None:
        checkpoint.load_adapter_into(resume_from, trained)
    weights = LossWeights.of(
        optim.text_loss_weight, optim.audio_loss_weight, bundle.config.num_codebooks, optim.codebook_weights
    )
    engine = Engine(DualLossModel(model), trained, inputs.ds_settings, optim, state.total_steps, weights)
    torch.manual_seed(optim.seed + 1 + distributed.rank())  # dropout of its own on every rank
    if resume_from is not None:
        checkpoint.load_into_engine(resume_from, engine, state)
    if distributed.is_main():
        with saving(inputs.output_dir):
            write_json(inputs.output_dir / "settings.json", options.flat())
    lora_config = model.peft_config["default"]
    return Run(options, inputs.output_dir, bundle, inputs.train, inputs.val, sampler, engine, lora_config, state)


def _state(inputs: Inputs, sampler: WindowSampler) -> TrainerState:
    """Where the run begins: at step 0, or where the checkpoint stands, which must be of the same run."""
    optim = inputs.options.optim
    total_steps = optim.max_steps or optim.epochs * sampler.windows_per_epoch
    fresh = TrainerState(total_steps, sampler.windows_per_epoch, _training_settings(inputs, sampler))
    if inputs.resume_from is None:
        return fresh
    saved = checkpoint.read_state(inputs.resume_from)
    checkpoint.check_same_run(saved, fresh, inputs.resume_from)
    return saved


def _training_settings(inputs: Inputs, sampler: WindowSampler) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint."""
    settings = {name: value for name, value in inputs.options.flat().items() if name not in FREE_ON_RESUME}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "samples_per_step": sampler.window_size,
        "training_data": inputs.train.digest(),
        "base": inputs.bundle.identity,
    }


def _adapted_model(options: TrainOptions, bundle: Bundle) -> PeftModel:
    dtype = torch.bfloat16 if options.model.precision == "bf16" else torch.float32
    model = load_base(bundle.folder, dtype)
    if options.model.activation_checkpointing == "every_layer":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(options.optim.seed)  # the same adapters on every rank
    return add_lora(model, options.lora, bundle.name)


def _report(inputs: Inputs, sampler: WindowSampler, state: TrainerState, adapters: str) -> None:
    """Say what is about to be trained, on what, and where it will be."""
    options, config = inputs.options, inputs.bundle.config
    built_in = "" if options.model.base_ckpt else " (built in, random: for trying out, it speaks noise)"
    say(f"base: {inputs.bundle.name}{built_in}")
    say(
        f"model: {config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_codebooks} codebooks, "
        f"{options.model.precision}, ZeRO stage {inputs.ds_settings['zero_optimization']['stage']}"
    )
    say(adapters)
    say(f"data: {len(inputs.train)} samples to train on, {len(inputs.val)} to validate on")
    say(
        f"steps: {state.total_steps} of {sampler.window_size} samples ({options.optim.batch_size} per rank x "
        f"{options.optim.grad_accum} accumulated x {distributed.world_size()} ranks), "
        f"{sampler.windows_per_epoch} an epoch"
    )
    if inputs.resume_from is not None:
        say(f"resumed: {inputs.resume_from}, at step {state.step}")
    say(f"output: {inputs.output_dir}")
