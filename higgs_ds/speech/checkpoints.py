"""Evaluate every checkpoint of a run with LoRA adapters, and name the best: launch/evaluate.py --checkpoints RUN.

The base is loaded once, and gets one adapter after the other; the references are decoded and measured once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from higgs_ds.adapters.load import read_adapter
from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import collect_problems
from higgs_ds.common.files import saving
from higgs_ds.common.folder_lock import EVALUATION_LOCK, FolderLock
from higgs_ds.common.words import counted
from higgs_ds.model.sample import AudioClip
from higgs_ds.options.commands import EvaluateOptions
from higgs_ds.options.fields import SIMILARITY
from higgs_ds.speech.checkpoint_results import PAGE_FILE, Evaluated, write_comparison
from higgs_ds.speech.evaluation_results import CHECKPOINTS_FILE, IDENTITY, RESULTS_FILE, write_results
from higgs_ds.speech.generate import (
    GenerationModel,
    add_adapter,
    load_without_adapter,
    open_generation_model,
    remove_adapter,
)
from higgs_ds.speech.held_out import (
    REFERENCE,
    Decoding,
    HeldOut,
    cache_dir_of,
    foreign_files,
    input_problems,
    read_prompts,
    vocabulary_of,
)
from higgs_ds.speech.prompts import Prompt
from higgs_ds.speech.run_adapters import Candidate, RunAdapters, checkpoint_option_problems, find_run_adapters
from higgs_ds.speech.scoring import Scoring

VERSION = 1  # of the measures: another number makes evaluations of earlier versions out of date


def main(options: EvaluateOptions) -> None:
    """Evaluate, compare, write and print. Every rank must call this, in a process group; ranks share the samples.

    Raises:
        InputError: an input is invalid; raised before any weight of the model is loaded.
        SaveError: a result cannot be written.
    """
    with FolderLock(EVALUATION_LOCK) as lock:
        _evaluate(options, lock)


def _evaluate(options: EvaluateOptions, lock: FolderLock) -> None:
    run, output_dir = options.checkpoints, options.output_dir
    assert run is not None
    problems = input_problems(options) + checkpoint_option_problems(options)
    found = collect_problems(
        problems, lambda: distributed.on_main(lambda: find_run_adapters(run, options.strengths or (1.0,)))
    )
    candidates = found.candidates if found else ()
    folders = {candidate: output_dir / candidate.folder_name for candidate in candidates}
    problems += foreign_files(output_dir, folders.values(), RESULTS_FILE)
    collect_problems(problems, lambda: lock.acquire(output_dir))
    scoring = Scoring(options.measures, options.recognizer, options.speaker_model, distributed.device())
    encoder = collect_problems(problems, scoring.check)
    speaker = collect_problems(problems, lambda: _open(options, found)) if found else None
    prompts = read_prompts(options, speaker, problems)
    assert found and speaker  # noqa: PT018 - a missing one has raised a problem
    for line in (*found.skipped, *_other_base(options, found, speaker)):
        warn(line)
    settings = distributed.on_main(lambda: settings_digest(options, speaker, prompts))
    identities = {candidate: _identity(candidate, settings) for candidate in candidates}
    to_speak = distributed.on_main(
        lambda: [one for one in candidates if not _is_done(output_dir, folders[one], identities[one])]
    )
    for candidate in candidates:
        if candidate not in to_speak:
            say(f"{candidate.label}: was evaluated before on the same samples with the same settings")
    if to_speak:
        distributed.on_main(lambda: _remove_results(output_dir, [folders[one] for one in to_speak]))
        scorer = scoring.open(vocabulary_of(prompts), encoder)
        held_out = HeldOut(prompts, speaker.bundle, scorer, Decoding.of(options), output_dir, distributed.device())
        model = load_without_adapter(speaker, distributed.device())
        for number, candidate in enumerate(to_speak, 1):
            started = time.monotonic()
            adapter = read_adapter(candidate.adapter, candidate.strength)
            model = add_adapter(model, replace(speaker, adapter=adapter, adapter_folder=candidate.adapter))
            results = {"lora_scale": candidate.strength} | held_out.spoken_by(model, folders[candidate])
            results[IDENTITY] = identities[candidate]
            distributed.on_main(lambda: write_results(folders[candidate], results))  # noqa: B023 - called at once
            model = remove_adapter(model)
            took_s = time.monotonic() - started
            say(f"{candidate.label}: {counted(len(prompts), 'sample')} in {took_s:.0f} s ({number} of {len(to_speak)})")
    evaluated = [
        Evaluated(one.label, one.step, one.averaged, one.strength, one.adapter, one.folder_name) for one in candidates
    ]
    say(distributed.on_main(lambda: write_comparison(output_dir, run, evaluated, found.skipped)))
    say(f"checkpoints: {output_dir / CHECKPOINTS_FILE}, {output_dir / PAGE_FILE}")


def _open(options: EvaluateOptions, found: RunAdapters) -> GenerationModel:
    """Open the base with the first adapter. Raises InputError on all ranks."""
    first = found.candidates[0]
    return distributed.run_on_all_ranks(
        lambda: open_generation_model(
            options.base_model_path, first.adapter, options.codec_ckpt, cache_dir_of(options), first.strength
        )
    )


def _other_base(options: EvaluateOptions, found: RunAdapters, speaker: GenerationModel) -> list[str]:
    """Return a warning if the base has other weights than the one that the adapters were trained on."""
    if found.base_weights in (None, speaker.bundle.weights_digest):
        return []
    name = options.base_model_path or found.base
    return [f"warning: {name}: has other weights than the base that the checkpoints were trained on"]


def settings_digest(options: EvaluateOptions, speaker: GenerationModel, prompts: Sequence[Prompt]) -> str:
    """Return a digest of all that the results depend on, beside the adapter and its strength."""
    digest = hashlib.sha256()
    speaker_model = options.speaker_model if SIMILARITY in options.measures else None
    bundle = speaker.bundle
    settings = (
        VERSION, bundle.weights_digest, bundle.coder(cache_dir_of(options)).identity, options.seed, options.temperature,
        sorted(options.measures), options.recognizer, speaker_model, options.batch_size,
    )  # fmt: skip
    digest.update(repr(settings).encode())
    for prompt in prompts:
        messages = [
            (message.role, message.recipient, ["" if isinstance(part, AudioClip) else part for part in message.parts])
            for message in prompt.sample.messages
        ]
        digest.update(repr((prompt.sample.source, prompt.sample.speaker, prompt.turn, messages)).encode())
        for codes in (*prompt.given, prompt.target):
            digest.update(repr(codes.shape).encode() + codes.numpy().tobytes())
    return digest.hexdigest()


def _identity(candidate: Candidate, settings: str) -> str:
    parts = (settings, candidate.sha256, candidate.strength)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _is_done(output_dir: Path, folder: Path, identity: str) -> bool:
    """Return whether a folder has the results with this identity, and every WAV file of theirs."""
    try:
        results: Any = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
        if results[IDENTITY] != identity:
            return False
        spoken = [folder / f"{number}.wav" for number, item in enumerate(results["items"]) if item["length_ratio"] > 0]
        references = [output_dir / REFERENCE / f"{number}.wav" for number in range(len(results["items"]))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False  # there is none, or it was edited
    return all(path.is_file() for path in spoken + references)


def _remove_results(output_dir: Path, folders: Sequence[Path]) -> None:
    """Delete the results of an earlier evaluation before its WAV files are replaced, which they would not fit."""
    for path in (output_dir / CHECKPOINTS_FILE, output_dir / PAGE_FILE, *(folder / RESULTS_FILE for folder in folders)):
        with saving(path):
            path.unlink(missing_ok=True)
