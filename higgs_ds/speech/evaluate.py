"""Evaluate what a model speaks for samples that it has not seen, against their references: metrics and WAV files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import InputError, collect_problems
from higgs_ds.common.files import check_folders, saving, write_json
from higgs_ds.common.folder_lock import EVALUATION_LOCK, FolderLock
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data.audio import write_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.preparation import Preparation
from higgs_ds.data.reference_choice import references_of
from higgs_ds.data.scratch import scratch_problems
from higgs_ds.options.commands import EvaluateOptions, check_lora_scale
from higgs_ds.options.train import DataOptions
from higgs_ds.speech.generate import (
    generation_settings,
    load_generation_model,
    open_generation_model,
    speak,
    trained_speakers,
)
from higgs_ds.speech.measures import agreement, median_pitch_hz, mel_distance_db, stop_warning, word_errors, words_of
from higgs_ds.speech.prompts import Prompt, prompts_of
from higgs_ds.speech.recognizers import Recognizer, check_recognizer, open_recognizer
from higgs_ds.speech.voices import with_trained_prompts

RESULTS_FILE = "evaluation.json"
REFERENCE = "reference"


@dataclass(frozen=True)
class Item:
    """The measurements of one sample; NaN where one is not possible."""

    source: str
    words: str
    stopped: bool
    length_ratio: float
    exact: bool  # the first codebook equals the reference's, from the first frame to the last
    agreement: list[float]  # per codebook
    pitch_hz: float
    reference_pitch_hz: float
    mel_distance_db: float
    heard: list[str] | None = None
    heard_in_reference: list[str] | None = None


def main(options: EvaluateOptions) -> None:
    """Generate, measure, write and print. Every rank must call this, in a process group; ranks share the samples.

    Raises:
        InputError: an input is invalid; raised before any weight is loaded.
        SaveError: a result cannot be written.
    """
    with FolderLock(EVALUATION_LOCK) as lock:
        _evaluate(options, lock)


def _evaluate(options: EvaluateOptions, lock: FolderLock) -> None:
    cache_dir = options.cache_dir or default_cache_dir()
    data = DataOptions(train_manifest=(options.test_manifest,), format=options.format, cache_dir=cache_dir)
    problems = (
        check_folders(output_dir=options.output_dir) + scratch_problems(data, cache_dir) + _option_problems(options)
    )
    problems += _foreign_files(options.output_dir)
    collect_problems(problems, lambda: lock.acquire(options.output_dir))
    collect_problems(problems, lambda: check_recognizer(options.recognizer))
    earlier = collect_problems(problems, lambda: _read_results(options.compare_with))
    speaker = collect_problems(
        problems,
        lambda: distributed.run_on_all_ranks(
            lambda: open_generation_model(
                options.base_model_path, options.lora_adapter_path, options.codec_ckpt, cache_dir, options.lora_scale
            )
        ),
    )
    trained = collect_problems(problems, lambda: trained_speakers(speaker)) if speaker else None
    data = with_trained_prompts(data, trained) if trained else data
    coder = speaker.bundle.coder(cache_dir) if speaker else None
    with Preparation(data, coder, cache_dir) as preparation:
        checked = preparation.check(options.test_manifest)
        distributed.raise_problems(problems + preparation.problems([checked]))
        assert speaker and preparation.coder and checked.index  # noqa: PT018 - a missing one has raised a problem
        preparation.encode(checked)
        index = preparation.keep(checked)
    rows = torch.arange(len(index)).numpy()
    references = references_of(index, rows, rows, data, options.seed)
    prompts = prompts_of(Dataset(index, rows, preparation.coder, references), options.num_samples)
    if not prompts:
        raise InputError(f"--test_manifest {options.test_manifest}: no sample has audio to generate")
    recognize = None
    if options.recognizer is not None:
        vocabulary = sorted({word for prompt in prompts for word in words_of(prompt.words)})
        recognize = open_recognizer(options.recognizer, vocabulary)
    here = distributed.device()
    bundle, model, codec = (
        speaker.bundle,
        load_generation_model(speaker, here),
        Codec(speaker.bundle.codec.folder, here),
    )
    items = []
    for number in range(distributed.rank(), len(prompts), distributed.world_size()):
        prompt = prompts[number]
        settings = generation_settings(options.temperature) | {"max_new_tokens": prompt.max_new_tokens}
        torch.manual_seed(options.seed + number)
        messages = list(prompt.sample.messages[: prompt.turn])
        speech = speak(model, bundle, messages, prompt.given, settings)
        speech.check()
        codes = speech.codes.clamp(max=bundle.stream.bos_id - 1)  # the stream's own tokens have no sound
        sounds = _decode_and_write(codec, codes, prompt, options.output_dir, number)
        items.append((number, _measure(prompt, codes, speech.stopped, sounds, codec.sample_rate, recognize)))
    gathered = dict(pair for of_rank in distributed.gather_objects(items) for pair in of_rank)
    used = {} if options.lora_adapter_path is None else {"lora_scale": options.lora_scale}
    results = used | summary([gathered[number] for number in sorted(gathered)])
    distributed.on_main(lambda: _write_results(options.output_dir, results))
    say(table(results, earlier))
    if warning := stop_warning(results["stop_rate"]):
        warn(warning)
    say(f"evaluation: {options.output_dir / RESULTS_FILE}")


def _foreign_files(folder: Path) -> list[str]:
    """Return a problem if a folder has a file that an evaluation would overwrite, but no evaluation has written."""
    first = folder / "0.wav"
    if not first.exists() or (folder / REFERENCE / "0.wav").exists():
        return []
    return [f"--output_dir {folder}: has 0.wav, which is not of an earlier evaluation; choose another folder"]


def _option_problems(options: EvaluateOptions) -> list[str]:
    problems = []
    if options.num_samples is not None and options.num_samples < 1:
        problems.append(f"--num_samples {options.num_samples}: must be 1 or more")
    if options.temperature < 0:
        problems.append(f"--temperature {options.temperature}: must be 0 or above")
    return problems + check_lora_scale(options.lora_scale, options.lora_adapter_path)


def _decode_and_write(
    codec: Codec, codes: torch.Tensor, prompt: Prompt, folder: Path, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the waveforms of generated and reference codes, and write them to files; an empty one gets no file."""
    spoken = codec.decode(codes) if codes.shape[1] else torch.zeros(0)
    target = codec.decode(prompt.target)
    for path, waveform in ((folder / f"{number}.wav", spoken), (folder / REFERENCE / f"{number}.wav", target)):
        if len(waveform):
            with saving(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_audio(path, waveform, codec.sample_rate)
    return spoken, target


def _measure(
    prompt: Prompt,
    codes: torch.Tensor,
    stopped: bool,
    sounds: tuple[torch.Tensor, torch.Tensor],
    rate: int,
    recognize: Recognizer | None,
) -> Item:
    spoken, target = sounds
    said = len(spoken) > 0
    return Item(
        source=prompt.sample.source,
        words=prompt.words,
        stopped=stopped,
        length_ratio=codes.shape[1] / prompt.target.shape[1],
        exact=codes.shape[1] == prompt.target.shape[1] and bool(codes[0].equal(prompt.target[0])),
        agreement=agreement(codes, prompt.target).tolist(),
        pitch_hz=median_pitch_hz(spoken, rate),
        reference_pitch_hz=median_pitch_hz(target, rate),
        mel_distance_db=mel_distance_db(spoken, target, rate) if said else math.nan,
        heard=(recognize(spoken, rate) if said else []) if recognize else None,
        heard_in_reference=recognize(target, rate) if recognize else None,
    )


def summary(items: list[Item]) -> dict[str, Any]:
    """Return means over all samples, medians of pitch, and word error rates; single samples are under `items`."""
    results: dict[str, Any] = {
        "samples": len(items),
        "stop_rate": _mean([item.stopped for item in items]),
        "length_ratio": _mean([item.length_ratio for item in items]),
        "exact_first_codebook": _mean([item.exact for item in items]),
        "code_agreement": [_mean(list(values)) for values in zip(*(item.agreement for item in items), strict=True)],
        "median_pitch_hz": _median([item.pitch_hz for item in items]),
        "reference_median_pitch_hz": _median([item.reference_pitch_hz for item in items]),
        "mel_distance_db": _mean([item.mel_distance_db for item in items]),
    }
    said = [words_of(item.words) for item in items]
    for name, heard in (
        ("word_error_rate", [item.heard for item in items]),
        ("reference_word_error_rate", [item.heard_in_reference for item in items]),
    ):
        pairs = [
            (words, words_heard) for words, words_heard in zip(said, heard, strict=True) if words_heard is not None
        ]
        if pairs:
            results[name] = sum(word_errors(*pair) for pair in pairs) / max(1, sum(len(words) for words, _ in pairs))
    return results | {"items": [vars(item) for item in items]}


def _mean(values: list[Any]) -> float | None:
    known = [float(value) for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _median(values: list[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return float(torch.tensor(known).median()) if known else None


def table(results: dict[str, Any], earlier: dict[str, Any] | None = None) -> str:
    """Return the results, without single samples, as lines; those of another evaluation are in a second column."""
    names = [name for name in results if name != "items"]
    columns = [["", *(_format(results[name]) for name in names)]]
    if earlier is not None:
        columns[0][0] = "current"
        columns.append(["compared with", *(_format(earlier.get(name)) for name in names)])
    width = max(map(len, columns[0])) + 3
    titles = ["", *(name.replace("_", " ") for name in names)]
    rows = zip(titles, *columns, strict=True)
    lines = [f"{title:<28}" + "".join(f"{value:<{width}}" for value in values).rstrip() for title, *values in rows]
    return "\n".join(lines if earlier is not None else lines[1:])


def _format(value: Any) -> str:
    return " ".join(
        "-" if number is None else f"{number:.4g}" for number in (value if isinstance(value, list) else [value])
    )


def _read_results(path: Path | None) -> dict[str, Any] | None:
    """Return the results of another evaluation. Raises InputError if the file has none."""
    if path is None:
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--compare_with {path}: cannot be read: {error}") from error
    if not isinstance(results, dict) or "stop_rate" not in results:
        raise InputError(f"--compare_with {path}: is not an {RESULTS_FILE} of launch/evaluate.py")
    return results


def _write_results(folder: Path, results: dict[str, Any]) -> None:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULTS_FILE, clean(results))
