"""Held-out samples: what a model speaks for them is written to WAV files and measured against their references."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from higgs_ds.bases.bundle import Bundle
from higgs_ds.common import distributed
from higgs_ds.common.errors import InputError, collect_problems
from higgs_ds.common.files import check_folders, saving
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data.audio import write_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.preparation import Preparation
from higgs_ds.data.reference_choice import references_of
from higgs_ds.data.scratch import scratch_problems
from higgs_ds.options.commands import EvaluateOptions
from higgs_ds.options.train import DataOptions
from higgs_ds.speech.batched import BatchPrompt, sampling_of, seed_of, speak_batch
from higgs_ds.speech.evaluation_results import Item, summary
from higgs_ds.speech.generate import GenerationModel, Speech, generation_settings, speak, trained_speakers
from higgs_ds.speech.measures import agreement, median_pitch_hz, mel_distance_db, spoken_seconds, words_of
from higgs_ds.speech.prompts import Prompt, prompts_of
from higgs_ds.speech.scoring import Heard, Scorer, voice_similarities
from higgs_ds.speech.voices import with_trained_prompts

REFERENCE = "reference"
# An item, and the speaker embeddings of what was spoken and of its reference.
Measured = tuple[Item, torch.Tensor | None, torch.Tensor | None]


def cache_dir_of(options: EvaluateOptions) -> Path:
    return options.cache_dir or default_cache_dir()


def data_options(options: EvaluateOptions) -> DataOptions:
    """Return the options with which the manifest is read."""
    return DataOptions(train_manifest=(options.test_manifest,), format=options.format, cache_dir=cache_dir_of(options))


def input_problems(options: EvaluateOptions) -> list[str]:
    """Return the problems of options and folders that every evaluation has; those of samples come later."""
    problems = check_folders(output_dir=options.output_dir)
    problems += scratch_problems(data_options(options), cache_dir_of(options))
    if options.num_samples is not None and options.num_samples < 1:
        problems.append(f"--num_samples {options.num_samples}: must be 1 or more")
    if options.batch_size < 1:
        problems.append(f"--batch_size {options.batch_size}: must be 1 or more")
    if options.temperature < 0:
        problems.append(f"--temperature {options.temperature}: must be 0 or above")
    return problems


def foreign_files(output_dir: Path, folders: Iterable[Path], others: str) -> list[str]:
    """Return why an evaluation would overwrite files that are not its own; empty if it would not.

    Args:
        folders: those that get a WAV file for each sample.
        others: the file of results of the other kind of evaluation, whose references would be replaced.
    """
    if (output_dir / others).exists():
        return [f"--output_dir {output_dir}: has {others}, of another kind of evaluation; choose another folder"]
    found = [folder / "0.wav" for folder in folders if (folder / "0.wav").exists()]
    if not found or (output_dir / REFERENCE / "0.wav").exists():
        return []
    name = found[0].relative_to(output_dir)
    return [f"--output_dir {output_dir}: has {name}, which is not of an earlier evaluation; choose another folder"]


def read_prompts(options: EvaluateOptions, speaker: GenerationModel | None, problems: list[str]) -> list[Prompt]:
    """Check the manifest, encode its clips and return what is to be spoken. Every rank must call this.

    Args:
        speaker: a model that is to speak; None if it could not be opened.
        problems: those found before, which are raised together with those that are found here.

    Raises:
        InputError: lists all problems.
    """
    data, cache_dir = data_options(options), cache_dir_of(options)
    trained = collect_problems(problems, lambda: trained_speakers(speaker)) if speaker else None
    data = with_trained_prompts(data, trained) if trained else data
    coder = speaker.bundle.coder(cache_dir) if speaker else None
    with Preparation(data, coder, cache_dir) as preparation:
        checked = preparation.check(options.test_manifest)
        distributed.raise_problems(problems + preparation.problems([checked]))
        assert preparation.coder and checked.index  # noqa: PT018 - a missing one has raised a problem
        preparation.encode(checked)
        index = preparation.keep(checked)
    rows = torch.arange(len(index)).numpy()
    references = references_of(index, rows, rows, data, options.seed)
    prompts = prompts_of(Dataset(index, rows, preparation.coder, references), options.num_samples)
    if not prompts:
        raise InputError(f"--test_manifest {options.test_manifest}: no sample has audio to generate")
    return prompts


def vocabulary_of(prompts: Sequence[Prompt]) -> list[str]:
    return sorted({word for prompt in prompts for word in words_of(prompt.words)})


@dataclass(frozen=True)
class Reference:
    """A prompt's own recording after the codec, and what was measured in it."""

    waveform: torch.Tensor
    heard: Heard
    pitch_hz: float
    spoken_s: float


@dataclass(frozen=True)
class Decoding:
    """How prompts are spoken. `batch_size`: of them at once; `synced`: whether ranks compute with each other's weights.

    If they do, all of them must run the same layers equally often.
    """

    seed: int = 42
    temperature: float = 0.0
    batch_size: int = 1
    synced: bool = False

    @classmethod
    def of(cls, options: EvaluateOptions) -> Decoding:
        return cls(options.seed, options.temperature, options.batch_size)


class HeldOut:
    """Prompts that models speak, and their references, which are measured once. Every rank must call every method.

    Ranks share the prompts.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        bundle: Bundle,
        scorer: Scorer,
        decoding: Decoding,
        folder: Path,
        device: torch.device,
    ) -> None:
        """Decode this rank's references, write them to `folder` / REFERENCE and measure them.

        Args:
            device: of the codec.
        """
        self.prompts, self.bundle, self.scorer, self.decoding = prompts, bundle, scorer, decoding
        self.codec = Codec(bundle.codec.folder, device)
        self._references = {}
        for number in range(distributed.rank(), len(prompts), distributed.world_size()):
            waveform, language = self.codec.decode(prompts[number].target), prompts[number].sample.language
            self._write(folder / REFERENCE / f"{number}.wav", waveform)
            rate = self.codec.sample_rate
            self._references[number] = Reference(
                waveform,
                scorer.hear(waveform, rate, language),
                median_pitch_hz(waveform, rate),
                spoken_seconds(waveform, rate),
            )

    def spoken_by(self, model: Any, folder: Path) -> dict[str, Any]:
        """Speak all prompts with a model, write a WAV file for each into a folder, and return the results."""
        results = self.spoken_until(lambda: False, model, folder)
        assert results is not None
        return results

    def spoken_until(self, is_stopped: Callable[[], bool], model: Any, folder: Path) -> dict[str, Any] | None:
        """Do as `spoken_by`, but return None where `is_stopped` is true, which all ranks ask before each batch."""
        items = []
        for numbers in self._batches():
            if is_stopped():
                return None
            for number, speech in zip(numbers, self._speak(model, numbers), strict=True):
                if number in self._references:
                    items.append((number, self._heard(number, speech, folder)))
        gathered = dict(pair for of_rank in distributed.gather_objects(items) for pair in of_rank)
        speakers = [prompt.sample.speaker for prompt in self.prompts]
        return summary(_with_similarities([gathered[number] for number in sorted(gathered)], speakers))

    def _batches(self) -> list[list[int]]:
        """Return the numbers of the prompts of this rank's batches; every rank has as many batches.

        If ranks are synced, batches have the same size on all ranks: those with a prompt less than rank 0 get prompt 0
        as well, which is not theirs, so that what they speak for it is not measured.
        """
        ranks, size = distributed.world_size(), self.decoding.batch_size
        own = list(self._references)
        most = -(-len(self.prompts) // ranks)
        if self.decoding.synced:
            own += [0] * (most - len(own))
        return [own[start : start + size] for start in range(0, most, size)]

    def _speak(self, model: Any, numbers: Sequence[int]) -> list[Speech]:
        """Return what a model speaks for the prompts of a batch, which may be empty."""
        how = self.decoding
        if how.batch_size == 1:
            return [self._speak_alone(model, number) for number in numbers]
        asked = [
            BatchPrompt(prompt.before, prompt.given, prompt.max_new_tokens, seed_of(how.seed, number))
            for number in numbers
            for prompt in [self.prompts[number]]
        ]
        if not asked:
            return []
        return speak_batch(model, self.bundle, asked, sampling_of(model, how.temperature, None, None), how.synced)

    def _speak_alone(self, model: Any, number: int) -> Speech:
        prompt = self.prompts[number]
        settings = generation_settings(self.decoding.temperature) | {"max_new_tokens": prompt.max_new_tokens}
        settings |= {"synced_gpus": True} if self.decoding.synced else {}
        torch.manual_seed(self.decoding.seed + number)
        return speak(model, self.bundle, prompt.before, prompt.given, settings)

    def _heard(self, number: int, speech: Speech, folder: Path) -> Measured:
        """Decode what was spoken for a prompt, write it into a folder, and measure it."""
        speech.check()
        codes = speech.codes.clamp(max=self.bundle.stream.bos_id - 1)  # the stream's own tokens have no sound
        spoken = self.codec.decode(codes) if codes.shape[1] else torch.zeros(0)
        self._write(folder / f"{number}.wav", spoken)
        return self._measure(self.prompts[number], self._references[number], codes, speech.stopped, spoken)

    def _write(self, path: Path, waveform: torch.Tensor) -> None:
        """Write a waveform to a file; an empty one gets no file, and none of an earlier evaluation stays."""
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if len(waveform):
                write_audio(path, waveform, self.codec.sample_rate)
            else:
                path.unlink(missing_ok=True)

    def _measure(
        self, prompt: Prompt, reference: Reference, codes: torch.Tensor, stopped: bool, spoken: torch.Tensor
    ) -> Measured:
        rate, target = self.codec.sample_rate, prompt.target
        language, in_reference = prompt.sample.language, reference.heard
        heard = self.scorer.hear(spoken, rate, language)
        item = Item(
            source=prompt.sample.source,
            words=prompt.words,
            stopped=stopped,
            length_ratio=codes.shape[1] / target.shape[1],
            exact=codes.shape[1] == target.shape[1] and bool(codes[0].equal(target[0])),
            agreement=agreement(codes, target).tolist(),
            pitch_hz=median_pitch_hz(spoken, rate),
            reference_pitch_hz=reference.pitch_hz,
            mel_distance_db=mel_distance_db(spoken, reference.waveform, rate) if len(spoken) else math.nan,
            speaking_rate=reference.spoken_s / (spoken_seconds(spoken, rate) or math.nan),
            said=self.scorer.words_in(prompt.words, language),
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
