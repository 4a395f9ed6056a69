"""Every option: its default, its meaning, its check. Imports no torch, so `--help` answers at once."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from higgs_ds.errors import InputError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DS_CONFIG = PROJECT_ROOT / "ds_configs" / "zero2.json"
FORMATS = ("chatml", "native", "swift", "metadata", "paired", "list", "csv", "table")
FINETUNE = FULL, LORA, QLORA = ("full", "lora", "qlora")
LORA_TARGET_GROUPS = ("attention", "text_mlp", "audio_mlp")
EMBEDDINGS, HEADS = "embeddings", "heads"
TRAIN_GROUPS = (*LORA_TARGET_GROUPS, EMBEDDINGS, HEADS)
ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
LAYOUTS = NATIVE, ORIGINAL = ("native", "original")
BOTH_LAYOUTS = "both"
MERGE_DEQUANTIZED, MERGE_ORIGINAL = "dequantized", "original"
RESUME_NEVER, RESUME_AUTO = "never", "auto"
TENSORBOARD, WANDB = "tensorboard", "wandb"


REQUIRED = dataclasses.MISSING  # the default of an option without one


def option(default: Any, help_text: str, choices: tuple[str, ...] | None = None, metavar: str | None = None) -> Any:
    """A dataclass field that is also a command line option of the same name."""
    return field(default=default, metadata={"help": help_text, "choices": choices, "metavar": metavar})


EXPORT_HELP = (
    "layout of the merged or complete model: what transformers reads, what boson_multimodal reads, or a folder of each"
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
class PrepareOptions:
    """Preparation"""

    check_only: bool = option(False, "check everything, encode and write nothing")
    shard: str = option("0/1", "I/N: only the I-th of N parts, from 0, while other processes do the others")


@dataclass(frozen=True)
class MergeOptions:
    """Merging"""

    base_model_path: str = option(REQUIRED, "the base, a folder or a hub id", metavar="BASE")
    lora_adapter_path: Path = option(REQUIRED, "lora_adapters/, not a checkpoint-N/", metavar="DIR")
    output_path: Path = option(REQUIRED, "a new folder for the result", metavar="DIR")
    merge_base: str | None = option(
        None,
        "merge into the weights as a 4-bit base holds them, which is what a QLoRA adapter was trained on, or into the "
        "original ones (default: what the adapter was trained on)",
        (MERGE_DEQUANTIZED, MERGE_ORIGINAL),
    )
    export_layout: str = option(NATIVE, EXPORT_HELP, (*LAYOUTS, BOTH_LAYOUTS))
    codec_ckpt: str | None = option(
        None, "audio codec that goes with the model, a folder or a hub id (default: named by the base)", metavar="CODEC"
    )
    no_verify: bool = option(False, "do not compare the merged model's logits with the adapter's beside its base")


@dataclass(frozen=True)
class ConvertOptions:
    """Conversion"""

    input_path: Path = option(REQUIRED, "a base, a merged model or an adapter", metavar="DIR")
    output_path: Path = option(REQUIRED, "a new folder for the result", metavar="DIR")
    to: str = option(REQUIRED, "what transformers reads, or what boson_multimodal reads", LAYOUTS)


@dataclass(frozen=True)
class ExportOptions:
    """Export"""

    checkpoint_path: Path = option(REQUIRED, "a checkpoint-N/ of a run with --finetune full", metavar="DIR")
    output_path: Path = option(REQUIRED, "a new folder for the complete model", metavar="DIR")
    base_model_path: str | None = option(
        None, "the base, a folder or a hub id (default: as the checkpoint names it)", metavar="BASE"
    )
    export_layout: str = option(NATIVE, EXPORT_HELP, (*LAYOUTS, BOTH_LAYOUTS))
    codec_ckpt: str | None = option(
        None, "audio codec that goes with the model, a folder or a hub id (default: named by the base)", metavar="CODEC"
    )


@dataclass(frozen=True)
class InspectOptions:
    """Looking at what runs have left. `path` is the one argument that has no name."""

    path: Path
    base_model_path: str | None = None
    as_json: bool = False


@dataclass(frozen=True)
class GenerateOptions:
    """Generation"""

    text: str = option("", "what is to be spoken")
    base_model_path: str | None = option(
        None,
        "base or merged model, a folder, a hub id or a built-in one (default: the adapter's base, or speaking-base)",
        metavar="BASE",
    )
    lora_adapter_path: Path | None = option(None, "adapter to speak with", metavar="DIR")
    codec_ckpt: str | None = option(None, "audio codec, a folder or a hub id (default: named by the base)")
    output: Path = option(Path("speech.wav"), "WAV file to write", metavar="FILE")
    ref_audio: Path | None = option(None, "a clip of the voice to speak with", metavar="FILE")
    ref_text: str | None = option(None, "what is said in ref_audio")
    scene: str = option("Audio is recorded from a quiet room.", "description of the scene")
    max_new_tokens: int | None = option(None, "longest speech, in rows of codes, 25 to the second")
    temperature: float | None = option(None, "0 for greedy decoding, else sampled (default: the model's own settings)")
    top_k: int | None = option(None, "sample from the k likeliest codes")
    top_p: float | None = option(None, "sample from the likeliest codes with this total probability")
    seed: int = option(42, "seed of the sampling")


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluation"""

    test_manifest: Path = option(REQUIRED, "samples that were held out, a file or a folder", metavar="PATH")
    format: str = option("auto", "format of the manifest; auto: told from its content", ("auto", *FORMATS))
    base_model_path: str | None = option(
        None,
        "base or merged model, a folder, a hub id or a built-in one (default: the adapter's base, or speaking-base)",
        metavar="BASE",
    )
    lora_adapter_path: Path | None = option(None, "adapter to speak with", metavar="DIR")
    codec_ckpt: str | None = option(None, "audio codec, a folder or a hub id (default: named by the base)")
    output_dir: Path = option(Path("evaluation"), "folder for the numbers and the WAV files", metavar="DIR")
    num_samples: int | None = option(None, "speak only the first so many samples (default: all)")
    temperature: float = option(0.0, "0 for greedy decoding, else sampled")
    seed: int = option(42, "seed of the sampling")
    recognizer: str | None = option(
        None,
        "count the words that are heard: by pocketsphinx, over the manifest's own words (English), or by a speech "
        "recognizer of transformers, a folder or a hub id",
        metavar="RECOGNIZER",
    )
    compare_with: Path | None = option(
        None, "evaluation.json of another evaluation, whose numbers are shown beside these", metavar="FILE"
    )
    cache_dir: Path | None = option(
        None, "where encoded audio is kept ($HIGGS_DS_CACHE, or ~/.cache/higgs_ds)", metavar="DIR"
    )


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
    def in_full(self) -> bool:
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


def parse_shard(text: str) -> tuple[int, int]:
    """I and N of I/N. Raises InputError for anything but 0 <= I < N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard {text}: must be I/N, with I from 0 to N - 1, for instance 0/4")
    return int(match[1]), int(match[2])


def check_data_options(options: DataOptions) -> list[str]:
    """Problems of single options of the data."""
    problems = []
    if not 0 <= options.val_split < 1:
        problems.append(f"--val_split {options.val_split}: must be from 0 to below 1")
    if not 0 < options.max_clip_s < float("inf"):
        problems.append(f"--max_clip_s {options.max_clip_s}: must be above 0")
    for name in ("max_seq_len", "num_workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: must be 1 or more")
    return problems


def recompute_every(options: ModelOptions) -> int | None:
    """Every how many layers one is recomputed; None for none. `auto` must have been decided."""
    value = options.activation_checkpointing
    return {"none": None, "every_layer": 1}[value] if value in ("none", "every_layer") else int(value)


def _finetune_problems(options: TrainOptions) -> list[str]:
    """Options that do not go with what --finetune says."""
    groups = options.tune.train_groups
    if not options.in_full:
        needless = groups != TRAIN_GROUPS
        return ["--train_groups: is for --finetune full; adapters go where --lora_targets says"] if needless else []
    problems = []
    if options.model.load_in_4bit:
        problems.append(
            "--load_in_4bit: weights in 4 bits cannot be trained by --finetune full; leave it out, or train adapters "
            "on them (--finetune qlora)"
        )
    problems += [
        f"--{one.name}: is for adapters, and --finetune full trains none; leave it out"
        for one in dataclasses.fields(options.lora)
        if getattr(options.lora, one.name) != one.default
    ]
    if not groups:
        problems.append(f"--train_groups: nothing would be trained; name one or more of {', '.join(TRAIN_GROUPS)}")
    if options.model.offload_embeddings and EMBEDDINGS in groups:
        problems.append(
            "--offload_embeddings: embeddings that are trained cannot be in host memory; leave it out, or train other "
            f"groups (--train_groups {' '.join(group for group in TRAIN_GROUPS if group != EMBEDDINGS)})"
        )
    return problems


def check_options(options: TrainOptions) -> list[str]:
    """Problems of single options; empty where there are none."""
    flat = options.flat()
    problems = check_data_options(options.data) + _finetune_problems(options)

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
    named = ("none", "every_layer", "auto")
    expect(
        "activation_checkpointing",
        checkpointing in named or (checkpointing.isdecimal() and int(checkpointing) >= 1),
        "none, every_layer, auto, or a number N of layers, 1 or more",
    )
    if flat["offload_checkpoints"] and checkpointing == "none":
        problems.append(
            "--offload_checkpoints: there are no checkpoints with --activation_checkpointing none; give every_layer, "
            "a number N, or auto"
        )
    expect("lr", 0 < flat["lr"] < float("inf"), "above 0")
    for name in ("device_memory_gib", "plan_ranks"):
        if flat[name] is not None:
            expect(name, 0 < flat[name] < float("inf"), "above 0")
            if not flat["dry_run"]:
                problems.append(f"--{name}: is for a --dry_run only")
    if flat["push_to_hub"] and flat["hub_repo_id"] is None:
        problems.append("--push_to_hub: needs --hub_repo_id OWNER/NAME")
    for name in ("hub_repo_id", "hub_private", "upload_merged_model"):
        if flat[name] and not flat["push_to_hub"]:
            problems.append(f"--{name}: needs --push_to_hub")
    if flat["upload_merged_model"] and not flat["merge_adapter_with_base"] and not options.in_full:
        problems.append("--upload_merged_model: needs --merge_adapter_with_base, which makes the merged model")
    if flat["early_stopping_min_delta"] and flat["early_stopping_patience"] is None:
        problems.append("--early_stopping_min_delta: needs --early_stopping_patience")
    if flat["resume"] == RESUME_AUTO and flat["output_dir"] is None:
        problems.append("--resume auto: needs --output_dir, the folder of the run to go on with")
    if flat["text_loss_weight"] == flat["audio_loss_weight"] == 0:
        problems.append("--text_loss_weight and --audio_loss_weight are both 0: nothing would be trained")
    weights = flat["codebook_weights"]
    if weights is not None and (min(weights) < 0 or not 0 < sum(weights) < float("inf")):
        problems.append(f"--codebook_weights {weights}: must be 0 or more, with a sum above 0")
    return problems
