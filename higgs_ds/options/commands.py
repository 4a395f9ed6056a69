"""The options of the commands other than train."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from higgs_ds.common.errors import InputError
from higgs_ds.options.fields import (
    BOTH_LAYOUTS,
    EXPORT_HELP,
    FORMATS,
    LAYOUTS,
    MEASURES,
    MEASURES_HELP,
    MERGE_DEQUANTIZED,
    MERGE_ORIGINAL,
    NATIVE,
    RECOGNIZER_HELP,
    REQUIRED,
    RESEMBLYZER,
    SCALE_HELP,
    SPEAKER_MODEL_HELP,
    option,
)


@dataclass(frozen=True)
class PrepareOptions:
    """Preparation"""

    check_only: bool = option(False, "check all samples, but encode and write nothing")
    shard: str = option("0/1", "I/N: process only part I of N, counted from 0, for instance in a job array")
    flagged_list: Path | None = option(
        None, "list all flagged samples in this file, one per line: source, kind, figure, remark", metavar="FILE"
    )


@dataclass(frozen=True)
class MergeOptions:
    """Merging"""

    lora_adapter_path: Path = option(REQUIRED, "adapter to merge: lora_adapters/, not a checkpoint-N/", metavar="DIR")
    output_path: Path = option(REQUIRED, "new folder for the merged model", metavar="DIR")
    base_model_path: str | None = option(
        None,
        "base model, a folder or a hub id (default: the one that the adapter names, which must have the weights that "
        "the adapter was trained on)",
        metavar="BASE",
    )
    lora_scale: float = option(1.0, SCALE_HELP)
    merge_base: str | None = option(
        None,
        "weights to merge into: dequantized (those of the 4-bit base, which a QLoRA adapter was trained on) or "
        "original (default: those that the adapter was trained on)",
        (MERGE_DEQUANTIZED, MERGE_ORIGINAL),
    )
    export_layout: str = option(NATIVE, EXPORT_HELP, (*LAYOUTS, BOTH_LAYOUTS))
    codec_ckpt: str | None = option(
        None,
        "audio codec for the model, a folder or a hub id (default: named by the base model)",
        metavar="CODEC",
    )
    no_verify: bool = option(
        False, "do not compare the logits of the merged model with those of the adapter on its base model"
    )


@dataclass(frozen=True)
class BlendOptions:
    """Blending"""

    parts: tuple[str, ...] = option(
        REQUIRED,
        "adapters to blend and their weights, such as anna/lora_adapters=0.7 ben/lora_adapters=0.3; weights may be "
        "negative, and need not add up to 1",
        metavar="ADAPTER=WEIGHT",
        positional=True,
    )
    output_path: Path = option(REQUIRED, "new folder for the blended adapter", metavar="DIR")
    rank: int | None = option(
        None,
        "largest rank of a layer: larger ones are cut by truncated SVD, and the error is printed (default: the sum "
        "of the adapters' ranks, which is exact)",
    )
    to: str | None = option(
        None, "layout to write, native or original (default: that of the adapters; native if they differ)", LAYOUTS
    )
    base_model_path: str | None = option(
        None,
        "name of the base model, if the adapters name it differently or not at all; only recorded, not opened",
        metavar="BASE",
    )


@dataclass(frozen=True)
class ConvertOptions:
    """Conversion"""

    input_path: Path = option(REQUIRED, "base model, merged model or adapter to convert", metavar="DIR")
    output_path: Path = option(REQUIRED, "new folder for the result", metavar="DIR")
    to: str = option(
        REQUIRED, "layout to write: native (read by transformers) or original (read by boson_multimodal)", LAYOUTS
    )


@dataclass(frozen=True)
class ExportOptions:
    """Export"""

    checkpoint_path: Path = option(REQUIRED, "checkpoint-N/ folder of a run with --finetune full", metavar="DIR")
    output_path: Path = option(REQUIRED, "new folder for the complete model", metavar="DIR")
    base_model_path: str | None = option(
        None, "base model, a folder or a hub id (default: named by the checkpoint)", metavar="BASE"
    )
    export_layout: str = option(NATIVE, EXPORT_HELP, (*LAYOUTS, BOTH_LAYOUTS))
    codec_ckpt: str | None = option(
        None,
        "audio codec for the model, a folder or a hub id (default: named by the base model)",
        metavar="CODEC",
    )
    ema: bool = option(False, "export the averages of the trained weights, which --ema_decay saves beside them")


@dataclass(frozen=True)
class InspectOptions:
    """Inspection. `path` is the only positional argument."""

    path: Path
    base_model_path: str | None = None
    as_json: bool = False


@dataclass(frozen=True)
class GenerateOptions:
    """Generation"""

    text: str = option("", 'text to speak; texts of several speakers have tags: "[SPEAKER0] Hello. [SPEAKER1] Hi."')
    text_file: Path | None = option(
        None, "file with the text to speak, in UTF-8: one text, however many lines it has", metavar="FILE"
    )
    each_line: bool = option(
        False, "speak each line of --text_file on its own, into a file with the line's number: speech-1.wav, ..."
    )
    chunk_chars: int = option(
        300,
        "longest text in characters that is spoken at once; a longer text is cut into chunks at ends of sentences",
    )
    chunk_context: int = option(
        2, "how many chunks of a long text each chunk has before it in its prompt, so that the voice stays the same"
    )
    base_model_path: str | None = option(
        None,
        "base or merged model: a folder, a hub id or a built-in one (default: the adapter's base model, or "
        "speaking-base)",
        metavar="BASE",
    )
    lora_adapter_path: Path | None = option(None, "LoRA adapter to use with the base model", metavar="DIR")
    lora_scale: float = option(1.0, SCALE_HELP)
    codec_ckpt: str | None = option(None, "audio codec, a folder or a hub id (default: named by the base model)")
    output: Path = option(Path("speech.wav"), "WAV file to write", metavar="FILE")
    speaker: tuple[str, ...] | None = option(
        None,
        "speaker of the training data to speak as, by the prompt that --speaker_prompt trained; of several, the first "
        "is [SPEAKER0] in the text",
        metavar="NAME",
    )
    ref_audio: tuple[Path, ...] | None = option(
        None, "reference clip of the voice to clone; of several, the first is [SPEAKER0] in the text", metavar="FILE"
    )
    ref_text: tuple[str, ...] | None = option(None, "transcript of each --ref_audio")
    scene: str = option(
        "Audio is recorded from a quiet room.", "description of the scene in the prompt; empty for none"
    )
    max_new_tokens: int | None = option(
        None, "maximum length of the speech, or of each chunk of a long text, in rows of codes, 25 per second"
    )
    temperature: float | None = option(
        None, "0 for greedy decoding, above 0 for sampling (default: the model's own settings)"
    )
    top_k: int | None = option(None, "sample from the k most likely codes")
    top_p: float | None = option(None, "sample from the most likely codes whose probabilities add up to this value")
    seed: int = option(42, "random seed for sampling")


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluation"""

    test_manifest: Path = option(REQUIRED, "manifest of held-out samples, a file or a folder", metavar="PATH")
    format: str = option("auto", "format of the manifest; auto: detected from its content", ("auto", *FORMATS))
    base_model_path: str | None = option(
        None,
        "base or merged model: a folder, a hub id or a built-in one (default: the adapter's base model, or "
        "speaking-base)",
        metavar="BASE",
    )
    lora_adapter_path: Path | None = option(None, "LoRA adapter to use with the base model", metavar="DIR")
    lora_scale: float = option(1.0, SCALE_HELP)
    checkpoints: Path | None = option(
        None,
        "evaluate every checkpoint of this run with LoRA adapters, and name the best: of those whose stop rate is "
        "within 0.1 of the highest and whose error rate is within 0.05 of the lowest, the one with the highest speaker "
        "similarity, then the highest mos, then the lowest error rate",
        metavar="RUN",
    )
    strengths: tuple[float, ...] | None = option(
        None, "with --checkpoints: evaluate each checkpoint at each of these strengths, as of --lora_scale (default: 1)"
    )
    codec_ckpt: str | None = option(None, "audio codec, a folder or a hub id (default: named by the base model)")
    output_dir: Path = option(Path("evaluation"), "folder for the measures and the WAV files", metavar="DIR")
    num_samples: int | None = option(None, "use only the first N samples (default: all)")
    temperature: float = option(0.0, "0 for greedy decoding, above 0 for sampling")
    batch_size: int = option(
        1, "samples that are generated at once, which takes less time; rounding may then change a code here and there"
    )
    seed: int = option(42, "random seed for sampling")
    recognizer: str | None = option(None, f"also measure the word error rate, {RECOGNIZER_HELP}", metavar="RECOGNIZER")
    measures: tuple[str, ...] = option((), f"also measure {MEASURES_HELP}", MEASURES, "MEASURE")
    speaker_model: str = option(RESEMBLYZER, SPEAKER_MODEL_HELP, metavar="MODEL")
    compare_with: Path | None = option(
        None, "evaluation.json of another evaluation, to show its numbers beside the new ones", metavar="FILE"
    )
    cache_dir: Path | None = option(
        None, "cache folder for encoded audio (default: $HIGGS_DS_CACHE, or ~/.cache/higgs_ds)", metavar="DIR"
    )


@dataclass(frozen=True)
class PreferOptions:
    """Preference pairs"""

    manifest: Path = option(REQUIRED, "manifest whose texts are spoken, a file or a folder", metavar="PATH")
    format: str = option("auto", "format of the manifest; auto: detected from its content", ("auto", *FORMATS))
    base_model_path: str | None = option(
        None,
        "base or merged model: a folder, a hub id or a built-in one (default: the adapter's base model, or "
        "speaking-base)",
        metavar="BASE",
    )
    lora_adapter_path: Path | None = option(None, "LoRA adapter to use with the base model", metavar="DIR")
    lora_scale: float = option(1.0, SCALE_HELP)
    codec_ckpt: str | None = option(None, "audio codec, a folder or a hub id (default: named by the base model)")
    output_dir: Path = option(Path("preferences"), "folder for the pairs, their clips and codes", metavar="DIR")
    num_samples: int | None = option(None, "use only the first N samples (default: all)")
    renderings: int = option(8, "how often each text is spoken, 2 or more")
    temperature: float = option(1.0, "temperature of sampling, above 0")
    top_k: int | None = option(None, "sample from the k most likely codes (default: the model's own settings)")
    top_p: float | None = option(
        None,
        "sample from the most likely codes whose probabilities add up to this value (default: the model's own "
        "settings)",
    )
    batch_size: int = option(8, "how many clips each GPU generates at once")
    seed: int = option(42, "random seed for sampling")
    recognizer: str | None = option(
        None, f"compare what is heard with the text, {RECOGNIZER_HELP}", metavar="RECOGNIZER"
    )
    measures: tuple[str, ...] = option((), f"also score {MEASURES_HELP}", MEASURES, "MEASURE")
    speaker_model: str = option(RESEMBLYZER, SPEAKER_MODEL_HELP, metavar="MODEL")
    min_margin: float = option(0.1, "leave out a text whose best and worst score differ by less")
    cache_dir: Path | None = option(
        None, "cache folder for encoded audio (default: $HIGGS_DS_CACHE, or ~/.cache/higgs_ds)", metavar="DIR"
    )


def check_prefer_options(options: PreferOptions) -> list[str]:
    """Return the problems of the options; empty if there are none. Files are not opened."""
    problems = []

    def expect(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            problems.append(f"--{name} {getattr(options, name)}: must be {allowed}")

    expect("num_samples", options.num_samples is None or options.num_samples >= 1, "1 or more")
    expect("renderings", options.renderings >= 2, "2 or more: a pair has a better and a worse one")
    expect("temperature", 0 < options.temperature < math.inf, "above 0: without sampling, all renderings are the same")
    expect("top_k", options.top_k is None or options.top_k >= 1, "1 or more")
    expect("top_p", options.top_p is None or 0 < options.top_p <= 1, "above 0, up to 1")
    expect("batch_size", options.batch_size >= 1, "1 or more")
    expect("min_margin", 0 <= options.min_margin < math.inf, "0 or above")
    return problems + check_lora_scale(options.lora_scale, options.lora_adapter_path)


def check_lora_scale(lora_scale: float, lora_adapter_path: Path | None) -> list[str]:
    """Return the problems of --lora_scale; empty if there are none."""
    if not math.isfinite(lora_scale):
        return [f"--lora_scale {lora_scale}: must be a finite number, for instance 0.5"]
    if lora_scale != 1 and lora_adapter_path is None:
        return [f"--lora_scale {lora_scale}: needs --lora_adapter_path, the adapter whose change it multiplies"]
    return []


def parse_parts(parts: Sequence[str]) -> tuple[list[tuple[Path, float]], list[str]]:
    """Parse ADAPTER=WEIGHT, where a folder's name may contain "=", into pairs. Return them, and the problems."""
    parsed, problems = [], []
    for part in parts:
        folder, _, weight = part.rpartition("=")
        try:
            number = float(weight) if folder else math.nan
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            parsed.append((Path(folder), number))
        else:
            problems.append(f"{part}: must be ADAPTER=WEIGHT, a folder and a finite number, as in voice_a=0.7")
    return parsed, problems


def parse_shard(text: str) -> tuple[int, int]:
    """Parse I/N into (I, N). Raises InputError unless 0 <= I < N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard {text}: must be I/N, with I from 0 to N - 1, for instance 0/4")
    return int(match[1]), int(match[2])
