"""Evaluate what a model speaks for samples that it has not seen, against their references: metrics and WAV files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import InputError, collect_problems
from higgs_ds.common.files import check_folders, saving
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
from higgs_ds.speech.evaluation_results import RESULTS_FILE, Item, read_results, summary, table, write_results
from higgs_ds.speech.generate import (
    generation_settings,
    load_generation_model,
    open_generation_model,
    speak,
    trained_speakers,
)
from higgs_ds.speech.measures import (
    agreement,
    median_pitch_hz,
    mel_distance_db,
    spoken_seconds,
    stop_warning,
    words_of,
)
from higgs_ds.speech.prompts import Prompt, prompts_of
from higgs_ds.speech.scoring import Scorer, Scoring, voice_similarities
from higgs_ds.speech.voices import with_trained_prompts

REFERENCE = "reference"
# An item, and the speaker embeddings of what was spoken and of its reference.
Measured = tuple[Item, torch.Tensor | None, torch.Tensor | None]


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
    scoring = Scoring(options.measures, options.recognizer, options.speaker_model, distributed.device())
    collect_problems(problems, scoring.check)
    earlier = collect_problems(problems, lambda: read_results(options.compare_with))
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
    scorer = scoring.open(sorted({word for prompt in prompts for word in words_of(prompt.words)}))
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
        items.append((number, _measure(prompt, codes, speech.stopped, sounds, codec.sample_rate, scorer)))
    gathered = dict(pair for of_rank in distributed.gather_objects(items) for pair in of_rank)
    used = {} if options.lora_adapter_path is None else {"lora_scale": options.lora_scale}
    speakers = [prompt.sample.speaker for prompt in prompts]
    results = used | summary(_with_similarities([gathered[number] for number in sorted(gathered)], speakers))
    distributed.on_main(lambda: write_results(options.output_dir, results))
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
    scorer: Scorer,
) -> Measured:
    spoken, target = sounds
    heard, in_reference = scorer.hear(spoken, rate), scorer.hear(target, rate)
    item = Item(
        source=prompt.sample.source,
        words=prompt.words,
        stopped=stopped,
        length_ratio=codes.shape[1] / prompt.target.shape[1],
        exact=codes.shape[1] == prompt.target.shape[1] and bool(codes[0].equal(prompt.target[0])),
        agreement=agreement(codes, prompt.target).tolist(),
        pitch_hz=median_pitch_hz(spoken, rate),
        reference_pitch_hz=median_pitch_hz(target, rate),
        mel_distance_db=mel_distance_db(spoken, target, rate) if len(spoken) else math.nan,
        speaking_rate=spoken_seconds(target, rate) / (spoken_seconds(spoken, rate) or math.nan),
        heard=heard.words,
        heard_in_reference=in_reference.words,
        mos=heard.mos,
        mos_voice=heard.mos_voice,
        mos_background=heard.mos_background,
        mos_p808=heard.mos_p808,
        reference_mos=in_reference.mos,
        not_measured=heard.reason,
    )
    return item, heard.voice, in_reference.voice


def _with_similarities(measured: list[Measured], speakers: list[str | None]) -> list[Item]:
    """Return the items with the similarity of their voices, which needs the voices of all of them."""
    items, spoken, references = zip(*measured, strict=True)
    to_own, to_speaker = voice_similarities(spoken, references, speakers)
    return [
        replace(item, similarity=own, similarity_to_speaker=of_speaker)
        for item, own, of_speaker in zip(items, to_own, to_speaker, strict=True)
    ]
