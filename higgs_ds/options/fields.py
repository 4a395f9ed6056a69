"""Declaration of an option, and the values that several options share."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

PAIRS = "pairs"  # the format of --pairs
FORMATS = (
    "chatml", "native", "swift", "metadata", "paired", "list", "csv", "flat", "table", "audiofolder", "libritts",
    "librispeech", "vctk", "kaldi", "lab", "webdataset", PAIRS,
)  # fmt: skip
FINETUNE = FULL, LORA, QLORA = ("full", "lora", "qlora")
LORA_TARGET_GROUPS = ("attention", "text_mlp", "audio_mlp")
EMBEDDINGS, HEADS = "embeddings", "heads"
TRAIN_GROUPS = (*LORA_TARGET_GROUPS, EMBEDDINGS, HEADS)
ALSO_TRAIN = (EMBEDDINGS, HEADS)
ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
LAYOUTS = NATIVE, ORIGINAL = ("native", "original")
BOTH_LAYOUTS = "both"
MERGE_DEQUANTIZED, MERGE_ORIGINAL = "dequantized", "original"
MEASURES = SIMILARITY, DNSMOS = ("similarity", "dnsmos")
RESEMBLYZER = "resemblyzer"
OBJECTIVES = SFT, DPO = ("sft", "dpo")
DPO_LOSSES = SIGMOID, IPO = ("sigmoid", "ipo")
RESUME_NEVER, RESUME_AUTO = "never", "auto"
RANDOM_REFERENCE = "random"
SPEAKER_PROMPTS = NO_SPEAKER_PROMPT, SPEAKER_TAG, SPEAKER_DESCRIPTION, SPEAKER_REFERENCE = (
    "none", "tag", "description", "reference",
)  # fmt: skip
TENSORBOARD, WANDB = "tensorboard", "wandb"
REQUIRED = dataclasses.MISSING  # the default of an option that must be given


def option(
    default: Any,
    help_text: str,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare a dataclass field that is also a command line option of the same name, or arguments without a name."""
    metadata = {"help": help_text, "choices": choices, "metavar": metavar, "positional": positional}
    return field(default=default, metadata=metadata)


EXPORT_HELP = (
    "layout of the merged or complete model: native (read by transformers), original (read by boson_multimodal), or "
    "both (a folder of each)"
)
SCALE_HELP = (
    "strength of the adapter: its change of each weight is multiplied by X; 1 is as trained, 0 the base, and values "
    "above 1 or below 0 are possible"
)
RECOGNIZER_HELP = (
    "with this speech recognizer: pocketsphinx, limited to the words of the manifest (English), or a speech recognizer "
    "of transformers, a folder or a hub id"
)
MEASURES_HELP = (
    "the similarity of the voices (similarity), or how listeners would rate the sound (dnsmos); each needs packages "
    "that its error message names"
)
SPEAKER_MODEL_HELP = (
    "model of the similarity: resemblyzer, or an x-vector model of transformers by folder or hub id, such as "
    "microsoft/wavlm-base-plus-sv"
)
