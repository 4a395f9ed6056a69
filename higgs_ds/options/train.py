"""The options of launch/train.py, in groups. launch/prepare.py shares the data and model options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from higgs_ds.common.precision import AUTO, PRECISIONS
from higgs_ds.common.resources import SAMPLE_MANIFEST
from higgs_ds.options.evaluation import EvaluationOptions
from higgs_ds.options.fields import (
    ALSO_TRAIN,
    ATTENTION,
    FINETUNE,
    FORMATS,
    FULL,
    LORA,
    LORA_TARGET_GROUPS,
    NO_SPEAKER_PROMPT,
    PAIRS,
    QLORA,
    RANDOM_REFERENCE,
    SPEAKER_PROMPTS,
    SPEAKER_REFERENCE,
    TRAIN_GROUPS,
    option,
)
from higgs_ds.options.flags import FlagOptions
from higgs_ds.options.objective import ObjectiveOptions
from higgs_ds.options.optim import OptimOptions
from higgs_ds.options.run import RunOptions


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    train_manifest: tuple[Path, ...] | None = option(
        None,
        "manifests of the training samples, each a file or a folder (default: the built-in digits)",
        metavar="PATH",
    )
    mix: tuple[float, ...] | None = option(
        None,
        "how often an epoch has the samples of each training manifest, a number for each: 2 for twice, 0.5 for half of "
        "them, in the next epoch the other half (default: once)",
    )
    val_manifest: tuple[Path, ...] | None = option(
        None,
        "manifests of the validation samples (default: --val_split of each training manifest)",
        metavar="PATH",
    )
    format: str = option("auto", "format of the manifests; auto: detected from their content", ("auto", *FORMATS))
    val_split: float = option(0.05, "fraction of the training samples held out for validation, 0 to below 1")
    split_by: str = option(
        "sample", "what --val_split holds out: single samples, or whole speakers", ("sample", "speaker")
    )
    reference: str = option(
        "context",
        "where to put the reference clips of a recording: in turns before it (context), in the system message "
        "(system), or nowhere (none); random: as context, and a sample without a reference gets another clip of its "
        "speaker, in each epoch another one",
        ("context", "system", "none", RANDOM_REFERENCE),
    )  # fmt: skip
    reference_dropout: float = option(
        0.0,
        "fraction of the samples that leave out their reference, in each epoch others, so that the model learns to "
        "speak with and without one; 0 to below 1",
    )
    speaker_prompt: str = option(
        NO_SPEAKER_PROMPT,
        "what tells the speakers apart in the prompts, so that one model learns several voices: nothing that the data "
        "does not have (none), the speaker's name in the system message (tag), a description of the voice there "
        "(description), or another clip of the speaker (reference, the same as --reference random)",
        SPEAKER_PROMPTS,
    )
    speaker_descriptions: Path | None = option(
        None,
        "YAML or JSON file with a description of each speaker's voice by the speaker's name, for --speaker_prompt "
        "description; those in the samples come first",
        metavar="FILE",
    )
    normalize_text: bool = option(
        False, "normalize sound tags ([laugh]), units and punctuation in spoken texts as the base model's example does"
    )
    allow_text_targets: bool = option(
        False, "also train on samples whose assistant turns have no audio (speech to text, chat)"
    )
    max_clip_s: float = option(600.0, "maximum length of a clip, in seconds; a longer clip is an error")
    trim_silence: float | None = option(
        None, "cut the silence at both ends of every clip down to this many seconds (default: keep it)", metavar="S"
    )
    silence_db: float = option(40.0, "dB below the loudest 10 ms of a clip, under which 10 ms of it are silence")
    max_seq_len: int | None = option(None, "skip samples with more tokens than this; dropped_samples.txt lists them")
    skip_bad: Path | None = option(None, "skip bad samples, and list them with the reason in this file", metavar="FILE")
    num_workers: int | None = option(
        None,
        "threads that check audio, and processes that encode it without a GPU, per rank (default: one per core)",
    )
    cache_dir: Path | None = option(
        None, "cache folder for encoded audio (default: $HIGGS_DS_CACHE, or ~/.cache/higgs_ds)", metavar="DIR"
    )

    @property
    def train_manifests(self) -> tuple[Path, ...]:
        """The manifests of the training samples; by default, the built-in digits."""
        return self.train_manifest or (SAMPLE_MANIFEST,)

    @property
    def has_random_references(self) -> bool:
        return self.reference == RANDOM_REFERENCE or self.speaker_prompt == SPEAKER_REFERENCE

    @property
    def reference_placement(self) -> str:
        """Where the reference clips that a recording brings go: context, system or none."""
        return "context" if self.has_random_references else self.reference


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    base_ckpt: str | None = option(
        None,
        "base model: a folder, a hub id, or a built-in one, speaking-base or tiny-random-base (default: speaking-base)",
        metavar="BASE",
    )
    base_revision: str | None = option(
        None,
        "commit, tag or branch of a --base_ckpt on the hub (default: the release commit of bosonai's base model, the "
        "newest of others)",
        metavar="REV",
    )
    codec_ckpt: str | None = option(None, "audio codec, a folder or a hub id (default: named by the base model)")
    precision: str = option(
        AUTO,
        "bf16 or fp16 with float32 master weights, or float32 for everything; auto: bf16 on a GPU or CPU that "
        "computes in it, otherwise fp16 on a GPU and fp32 on a CPU",
        (AUTO, *PRECISIONS),
    )
    load_in_4bit: bool = option(
        False,
        "QLoRA: quantize the linear layers of the decoder to 4 bits (NF4, double quantization); the rest is in "
        "--precision",
    )
    offload_embeddings: bool = option(False, "keep the embeddings in host memory and look them up there")
    activation_checkpointing: str = option(
        "none",
        "recompute layers in the backward pass to save memory: none, every_layer, N for every N-th layer, or auto for "
        "as few layers as fit the GPU's memory",
        metavar="none|every_layer|N|auto",
    )
    offload_checkpoints: bool = option(
        False, "keep the inputs of recomputed layers in host memory until the backward pass needs them"
    )
    train_fill: bool = option(
        False,
        "also learn the codes before and after each codebook's own that a model's runtimes force; it changes the "
        "loss, and nothing that is heard",
    )
    audio_self_attention: bool = option(
        False, "fully fine-tune the attention among audio positions; it is added to a base model that does not have it"
    )
    whisper_conditioning: bool = option(
        False,
        "fully fine-tune the Whisper tower that encodes the clips of system and user turns; it is added to a base "
        "model that does not have it",
    )
    whisper_ckpt: str = option(
        "openai/whisper-large-v3",
        "Whisper model whose encoder initializes an added Whisper tower, a folder or a hub id",
        metavar="WHISPER",
    )
    attn_implementation: str = option(
        "sdpa",
        "attention of torch (sdpa) or of the package flash-attn (needs a GPU, and bf16 or fp16); both are causal",
        ATTENTION,
    )  # fmt: skip


@dataclass(frozen=True)
class TuneOptions:
    """Fine-tuning"""

    finetune: str = option(
        LORA,
        "what to train: all weights or groups of them (full), adapters (lora), or adapters on a 4-bit base model "
        "(qlora, the same as lora with --load_in_4bit)",
        FINETUNE,
    )
    train_groups: tuple[str, ...] = option(
        TRAIN_GROUPS,
        "groups of weights that --finetune full trains; a norm belongs to the group of the layer that follows it, the "
        "last norm to heads; embeddings and heads are not tied, so each can be trained without the other",
        TRAIN_GROUPS,
        "GROUP",
    )


@dataclass(frozen=True)
class LoraOptions:
    """LoRA"""

    lora_r: int = option(16, "rank of the LoRA adapters")
    lora_alpha: int = option(32, "the output of an adapter is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.05, "dropout on the input of the adapters, 0 to below 1")
    lora_targets: tuple[str, ...] = option(
        LORA_TARGET_GROUPS,
        "groups of linear layers that get an adapter: attention, text_mlp, audio_mlp",
        LORA_TARGET_GROUPS,
        "GROUP",
    )
    use_rslora: bool = option(False, "rank-stabilized LoRA: scale by lora_alpha / sqrt(lora_r) instead")
    use_dora: bool = option(
        False, "DoRA: also train the row norms of each weight; slower, and not supported at ZeRO stage 3"
    )
    lora_bias: bool = option(False, "add a bias to the adapters; only for a base model whose linear layers have a bias")
    also_train: tuple[str, ...] = option(
        (),
        "fully fine-tune the embeddings or heads, of text and of codes, beside the adapters, and store them together; "
        "for a new language",
        ALSO_TRAIN,
        "GROUP",
    )
    init_from: Path | None = option(
        None,
        "start from this adapter, of this trainer or of PEFT: its folder, or a run or checkpoint that contains one; "
        "rank, alpha, layers and scaling are the adapter's",
        metavar="ADAPTER",
    )


@dataclass(frozen=True)
class TrainOptions:
    """All options of launch/train.py, in groups.

    `--finetune qlora` and `--load_in_4bit` mean the same for adapters: if one of them is given, both are set. `--pairs`
    are manifests, too.
    """

    data: DataOptions = field(default_factory=DataOptions)
    flags: FlagOptions = field(default_factory=FlagOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    tune: TuneOptions = field(default_factory=TuneOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        if self.objective.pairs:
            data = self.data
            manifests = self.objective.pairs if data.train_manifest is None else data.train_manifest
            format_ = PAIRS if data.format == "auto" else data.format
            object.__setattr__(self, "data", dataclasses.replace(data, train_manifest=manifests, format=format_))
        if self.tune.finetune == QLORA:
            object.__setattr__(self, "model", dataclasses.replace(self.model, load_in_4bit=True))
        elif self.tune.finetune == LORA and self.model.load_in_4bit:
            object.__setattr__(self, "tune", dataclasses.replace(self.tune, finetune=QLORA))

    @property
    def is_full_finetuning(self) -> bool:
        """Whether the model's own weights are trained instead of adapters."""
        return self.tune.finetune == FULL

    @property
    def rows_per_batch(self) -> int:
        """Number of samples in a micro-batch: --batch_size counts pairs where there are any."""
        return self.optim.batch_size * self.objective.group_size

    def replace(self, **values: Any) -> TrainOptions:
        """Return a copy with some options changed, by their names on the command line."""
        groups = {}
        for group_field in dataclasses.fields(self):
            group = getattr(self, group_field.name)
            names = {f.name for f in dataclasses.fields(group)} & values.keys()
            groups[group_field.name] = dataclasses.replace(group, **{name: values.pop(name) for name in names})
        if values:
            raise TypeError(f"unknown option: {', '.join(sorted(values))}")
        return TrainOptions(**groups)

    def flat(self) -> dict[str, Any]:
        """Return all options by their names on the command line, as JSON values."""
        flat: dict[str, Any] = {}
        for group_field in dataclasses.fields(self):
            flat.update(dataclasses.asdict(getattr(self, group_field.name)))
        return {name: _without_paths(value) for name, value in flat.items()}


def _without_paths(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_without_paths, value))
    return str(value) if isinstance(value, Path) else value


def recompute_every(options: ModelOptions) -> int | None:
    """Return N if every N-th layer is recomputed, or None if none is. `auto` must have been resolved before."""
    value = options.activation_checkpointing
    return {"none": None, "every_layer": 1}[value] if value in ("none", "every_layer") else int(value)
