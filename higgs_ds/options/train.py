"""The options of launch/train.py, in groups; launch/prepare.py shares those of the data and the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from higgs_ds.common.resources import DEFAULT_DS_CONFIG
from higgs_ds.options.fields import (
    ATTENTION,
    BOTH_LAYOUTS,
    EXPORT_HELP,
    FINETUNE,
    FORMATS,
    FULL,
    LAYOUTS,
    LORA,
    LORA_TARGET_GROUPS,
    NATIVE,
    OPTIMIZERS,
    QLORA,
    RESUME_NEVER,
    TENSORBOARD,
    TRAIN_GROUPS,
    WANDB,
    option,
)


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    train_manifest: Path | None = option(
        None, "training samples, a file or a folder (without it: the built-in digits)", metavar="PATH"
    )
    val_manifest: Path | None = option(None, "validation samples; without it a share is split off", metavar="PATH")
    format: str = option("auto", "format of the manifests; auto: told from their content", ("auto", *FORMATS))
    val_split: float = option(0.05, "share of the training samples held out for validation, 0 to below 1")
    split_by: str = option("sample", "hold out single samples, or whole speakers", ("sample", "speaker"))
    reference: str = option(
        "context", "where a recording's reference clips go: turns in front, the system message, or left out",
        ("context", "system", "none"),
    )  # fmt: skip
    normalize_text: bool = option(
        False, "spell sound tags ([laugh]), units and punctuation in spoken texts as the base's example does"
    )
    allow_text_targets: bool = option(
        False, "also train samples whose assistant turns hold no audio (speech to text, chat)"
    )
    max_clip_s: float = option(600.0, "longest clip, in seconds; a longer one is an error")
    max_seq_len: int | None = option(None, "leave out samples of more tokens than this (which: dropped_samples.txt)")
    skip_bad: Path | None = option(None, "leave out bad samples, and write which and why to this file", metavar="FILE")
    num_workers: int | None = option(
        None, "threads of each rank that check audio, processes that encode it without a GPU (default: one a core)"
    )
    cache_dir: Path | None = option(
        None, "where encoded audio is kept ($HIGGS_DS_CACHE, or ~/.cache/higgs_ds)", metavar="DIR"
    )


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    base_ckpt: str | None = option(
        None,
        "base model, a folder, a hub id or a built-in one: speaking-base, tiny-random-base (without it: the first)",
        metavar="BASE",
    )
    base_revision: str | None = option(
        None,
        "commit, tag or branch of a base_ckpt on the hub (default: bosonai's base as of its release, others' newest)",
        metavar="REV",
    )
    codec_ckpt: str | None = option(None, "audio codec, a folder or a hub id (default: named by the base)")
    precision: str = option("bf16", "bf16 with float32 master weights, or float32 throughout", ("bf16", "fp32"))
    load_in_4bit: bool = option(
        False, "hold the decoder's linear layers in 4 bits (NF4, double quantization): QLoRA; the rest in --precision"
    )
    offload_embeddings: bool = option(False, "hold the embeddings in host memory and look them up there")
    activation_checkpointing: str = option(
        "none",
        "recompute layers in the backward pass to save memory: none, every_layer, N for every N-th layer, or auto for "
        "as few as the GPU's memory asks for",
        metavar="none|every_layer|N|auto",
    )
    offload_checkpoints: bool = option(
        False, "hold the inputs of recomputed layers in host memory until the backward pass asks for them"
    )
    audio_self_attention: bool = option(
        False, "train the attention among audio positions, in full; it is added to a base that lacks it"
    )
    whisper_conditioning: bool = option(
        False,
        "train the Whisper tower that hears clips of system and user turns, in full; it is added to a base without one",
    )
    whisper_ckpt: str = option(
        "openai/whisper-large-v3",
        "Whisper model whose encoder becomes such a tower, a folder or a hub id",
        metavar="WHISPER",
    )
    attn_implementation: str = option(
        "sdpa", "torch's attention, or that of the package flash-attn (a GPU, bf16), causal without a mask either way",
        ATTENTION,
    )  # fmt: skip


@dataclass(frozen=True)
class TuneOptions:
    """Fine-tuning"""

    finetune: str = option(
        LORA,
        "train all weights or groups of them (full), adapters (lora), or adapters on a 4-bit base (qlora, as is lora "
        "with --load_in_4bit)",
        FINETUNE,
    )
    train_groups: tuple[str, ...] = option(
        TRAIN_GROUPS,
        "which weights --finetune full trains; a norm goes with what it stands in front of, the last with the heads; "
        "embeddings and heads are not tied, each is trained or not by itself",
        TRAIN_GROUPS,
        "GROUP",
    )


@dataclass(frozen=True)
class LoraOptions:
    """LoRA"""

    lora_r: int = option(16, "rank of the adapters")
    lora_alpha: int = option(32, "the adapters' product is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "dropout in front of the adapters, 0 to below 1")
    lora_targets: tuple[str, ...] = option(
        LORA_TARGET_GROUPS,
        "which linear layers get an adapter: attention, text_mlp, audio_mlp",
        LORA_TARGET_GROUPS,
        "GROUP",
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(lora_r) instead (rank-stabilized LoRA)")
    use_dora: bool = option(False, "train each weight's row norms as well (DoRA); slower, not at ZeRO stage 3")
    lora_bias: bool = option(False, "give the adapters a bias; only for a base whose linear layers have one")


@dataclass(frozen=True)
class OptimOptions:
    """Optimization"""

    batch_size: int = option(2, "samples per rank and forward pass")
    max_tokens_per_batch: int | None = option(
        None, "fill each forward pass with samples up to so many tokens, padding counted, in place of batch_size"
    )
    bucket_size: int = option(1024, "samples that are sorted by length together, for less padding; 1: none are")
    grad_accum: int = option(8, "forward passes per optimizer step")
    epochs: int = option(2, "passes over the training samples")
    max_steps: int | None = option(None, "end after this many optimizer steps, in place of epochs")
    optim: str = option(
        "adamw", "AdamW with its state in float32 or in 8 bits; paged: may move to host memory when the GPU is full",
        OPTIMIZERS,
    )  # fmt: skip
    lr: float = option(2e-4, "peak learning rate of AdamW; weights that are trained in full usually take far less")
    lr_scheduler_type: str = option(
        "cosine", "learning rate schedule behind the warm-up; warmup_stable_decay falls at the very end alone",
        ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "warmup_stable_decay"),
    )  # fmt: skip
    lr_cycles: int = option(2, "cosines of cosine_with_restarts")
    lr_decay_ratio: float = option(0.1, "share of the steps in which warmup_stable_decay falls to 0, 0 to 1")
    warmup_ratio: float = option(0.03, "share of the steps in which the learning rate rises from 0, 0 to below 1")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 leaves them as they are")
    text_loss_weight: float = option(1.0, "weight of the mean text loss in the total loss")
    audio_loss_weight: float = option(1.0, "weight of the mean audio loss in the total loss")
    codebook_weights: tuple[float, ...] | None = option(
        None, "weight of each codebook in the audio loss, scaled to a sum of 1 (default: all alike)"
    )
    on_nonfinite: str = option(
        "stop", "at a NaN or infinite loss or gradient: stop, or pass over that step (up to ten, or one in a hundred)",
        ("stop", "skip"),
    )  # fmt: skip
    seed: int = option(42, "seed of the split, the sample order, the adapters' start and dropout")


@dataclass(frozen=True)
class RunOptions:
    """Run"""

    output_dir: Path | None = option(None, "results (default: outputs/DATE-TIME)", metavar="DIR")
    log_steps: int = option(10, "optimizer steps between log lines")
    report_to: tuple[str, ...] = option(
        (), "write the metrics there, too, besides metrics.jsonl: tensorboard, wandb", (TENSORBOARD, WANDB), "WHERE"
    )
    no_report: bool = option(False, "do not draw report.html")
    quiet: bool = option(False, "show errors and warnings only")
    val_steps: int = option(100, "optimizer steps between validations")
    sample_steps: int | None = option(
        None, "optimizer steps between samples: what the model says to fixed validation prompts, as WAV files"
    )
    num_samples: int = option(2, "how many of these prompts")
    sample_temperature: float = option(0.0, "0 for greedy decoding, else sampled")
    save_steps: int = option(1000, "optimizer steps between checkpoints")
    keep_checkpoints: int | None = option(
        None, "keep this many of the newest checkpoints, and the one with the lowest validation loss (default: all)"
    )
    early_stopping_patience: int | None = option(
        None, "end after so many validations in a row whose loss is not the lowest yet; each lowest is saved"
    )
    early_stopping_min_delta: float = option(0.0, "by how much a validation loss must be lower to count as lower")
    resume: str = option(RESUME_NEVER, "never, auto (the newest checkpoint in output_dir), or a checkpoint folder")
    merge_adapter_with_base: bool = option(
        False, "merge at the end: final_model/ adapter/ merged_model/ (with --finetune full, final_model/ is complete)"
    )
    export_layout: str = option(NATIVE, EXPORT_HELP, (*LAYOUTS, BOTH_LAYOUTS))
    push_to_hub: bool = option(
        False, "upload the adapter, or the complete model, to the Hugging Face hub at the end (`hf auth login` first)"
    )
    hub_repo_id: str | None = option(None, "repository to upload to, made where there is none", metavar="OWNER/NAME")
    hub_private: bool = option(False, "make that repository a private one")
    upload_merged_model: bool = option(False, "upload the merged model instead (needs --merge_adapter_with_base)")
    dry_run: bool = option(False, "only print how much memory each part will take, from the base's config.json alone")
    device_memory_gib: float | None = option(
        None, "memory of a GPU, in GiB, that a --dry_run plans for (default: that of the GPU here)"
    )
    plan_ranks: int | None = option(None, "number of ranks that a --dry_run plans for (default: those started)")
    deepspeed: Path = option(DEFAULT_DS_CONFIG, "DeepSpeed JSON file", metavar="FILE")


@dataclass(frozen=True)
class TrainOptions:
    """All options of launch/train.py, in groups.

    `--finetune qlora` and `--load_in_4bit` say the same of adapters: where one of them is given, both are set.
    """

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    tune: TuneOptions = field(default_factory=TuneOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if self.tune.finetune == QLORA:
            object.__setattr__(self, "model", dataclasses.replace(self.model, load_in_4bit=True))
        elif self.tune.finetune == LORA and self.model.load_in_4bit:
            object.__setattr__(self, "tune", dataclasses.replace(self.tune, finetune=QLORA))

    @property
    def is_full_finetuning(self) -> bool:
        """Whether the model's own weights are trained, and no adapters."""
        return self.tune.finetune == FULL

    def replace(self, **values: Any) -> TrainOptions:
        """A copy with some options changed, each named as on the command line."""
        groups = {}
        for group_field in dataclasses.fields(self):
            group = getattr(self, group_field.name)
            names = {f.name for f in dataclasses.fields(group)} & values.keys()
            groups[group_field.name] = dataclasses.replace(group, **{name: values.pop(name) for name in names})
        if values:
            raise TypeError(f"no such option: {', '.join(sorted(values))}")
        return TrainOptions(**groups)

    def flat(self) -> dict[str, Any]:
        """Every option by its name on the command line, as JSON values."""
        flat: dict[str, Any] = {}
        for group_field in dataclasses.fields(self):
            flat.update(dataclasses.asdict(getattr(self, group_field.name)))
        return {name: str(value) if isinstance(value, Path) else value for name, value in flat.items()}


def recompute_every(options: ModelOptions) -> int | None:
    """Every how many layers one is recomputed; None for none. `auto` must have been decided."""
    value = options.activation_checkpointing
    return {"none": None, "every_layer": 1}[value] if value in ("none", "every_layer") else int(value)
