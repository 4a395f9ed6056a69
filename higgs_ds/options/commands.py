"""The options of the other commands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from higgs_ds.common.errors import InputError
from higgs_ds.options.fields import (
    BOTH_LAYOUTS,
    EXPORT_HELP,
    FORMATS,
    LAYOUTS,
    MERGE_DEQUANTIZED,
    MERGE_ORIGINAL,
    NATIVE,
    REQUIRED,
    option,
)


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


def parse_shard(text: str) -> tuple[int, int]:
    """I and N of I/N. Raises InputError for anything but 0 <= I < N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard {text}: must be I/N, with I from 0 to N - 1, for instance 0/4")
    return int(match[1]), int(match[2])
