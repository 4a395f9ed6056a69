"""Speak each text of a manifest several times, score what was spoken, and write pairs to learn preferences from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from higgs_ds.adapters.save import ADAPTER_WEIGHTS
from higgs_ds.bases.bundle import Bundle
from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import InputError, collect_problems
from higgs_ds.common.files import check_folders
from higgs_ds.common.folder_lock import PREFERENCE_LOCK, FolderLock
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.common.tensor_files import sampled_digest
from higgs_ds.common.words import counted
from higgs_ds.data.codec import Codec
from higgs_ds.data.codec_info import codec_digest
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.preparation import Preparation
from higgs_ds.data.reference_choice import references_of
from higgs_ds.data.scratch import scratch_problems
from higgs_ds.options.commands import PreferOptions, check_prefer_options
from higgs_ds.options.fields import SIMILARITY
from higgs_ds.options.train import DataOptions
from higgs_ds.speech.batched import BatchPrompt, Sampling, sampling_of, seed_of, speak_batch
from higgs_ds.speech.generate import GenerationModel, load_generation_model, open_generation_model, trained_speakers
from higgs_ds.speech.held_out import vocabulary_of
from higgs_ds.speech.measures import mel_distance_db
from higgs_ds.speech.preference_files import CLIPS, PAIRS_FILE, Place, PreferenceFolder, folder_problems
from higgs_ds.speech.preference_scores import Measures, Rendering, choose_pair, score_of
from higgs_ds.speech.prompts import Prompt, prompts_of
from higgs_ds.speech.scoring import Scorer, Scoring
from higgs_ds.speech.speaker_similarity import similarity
from higgs_ds.speech.voices import with_trained_prompts
from higgs_ds.speech.word_measures import WordErrors


def main(options: PreferOptions) -> None:
    """Generate, score, write and print. Every rank must call this; ranks share the batches.

    Raises:
        InputError: an input is invalid; raised before any weight is loaded.
        SaveError: a result cannot be written.
    """
    with FolderLock(PREFERENCE_LOCK) as lock:
        _prefer(options, lock)


def _prefer(options: PreferOptions, lock: FolderLock) -> None:
    cache_dir = options.cache_dir or default_cache_dir()
    data = DataOptions(train_manifest=(options.manifest,), format=options.format, cache_dir=cache_dir)
    problems = check_folders(output_dir=options.output_dir) + scratch_problems(data, cache_dir)
    problems += check_prefer_options(options)
    collect_problems(problems, lambda: lock.acquire(options.output_dir))
    scoring = Scoring(options.measures, options.recognizer, options.speaker_model, distributed.device())
    encoder = collect_problems(problems, scoring.check)
    speaker = collect_problems(
        problems,
        lambda: distributed.run_on_all_ranks(
            lambda: open_generation_model(
                options.base_model_path,
                options.lora_adapter_path,
                options.codec_ckpt,
                cache_dir,
                options.lora_scale,
            )
        ),
    )
    trained = collect_problems(problems, lambda: trained_speakers(speaker)) if speaker else None
    data = with_trained_prompts(data, trained) if trained else data
    coder = speaker.bundle.coder(cache_dir) if speaker else None
    identity = _identity(options) | (_identity_of_model(speaker) if speaker else {})
    with Preparation(data, coder, cache_dir) as preparation:
        checked = preparation.check(options.manifest)
        if checked.index is not None and coder is not None:
            rows = torch.arange(len(checked.index)).numpy()
            references = references_of(checked.index, rows, rows, data, options.seed)
            identity |= {"manifest": Dataset(checked.index, rows, coder, references).digest()}
        problems += folder_problems(options.output_dir, identity)
        distributed.raise_problems(problems + preparation.problems([checked]))
        assert speaker and coder and checked.index  # noqa: PT018 - a missing one has raised a problem
        preparation.encode(checked)
        index = preparation.keep(checked)
    rows = torch.arange(len(index)).numpy()
    references = references_of(index, rows, rows, data, options.seed)
    prompts = prompts_of(Dataset(index, rows, coder, references), options.num_samples)
    if not prompts:
        raise InputError(f"--manifest {options.manifest}: no sample has audio to generate")
    if options.recognizer is None:
        warn(
            "warning: no --recognizer is given, so that words are not compared with the text: a rendering that says "
            "something else may be chosen"
        )
    scorer = scoring.open(vocabulary_of(prompts), encoder)
    codec = Codec(speaker.bundle.codec.folder, distributed.device())
    folder = PreferenceFolder(options.output_dir, coder.cache.codec_digest, codec.sample_rate)
    described = {"manifest": str(options.manifest), "base_model": speaker.bundle.name}
    distributed.on_main(lambda: folder.start(identity, described))
    done = distributed.on_main(folder.read_renderings)
    todo = _batches_to_do(len(prompts), options, done)
    if todo:
        model = load_generation_model(speaker, distributed.device())
        sampling = sampling_of(model, options.temperature, options.top_k, options.top_p)
        studio = _Studio(model, speaker.bundle, codec, scorer, sampling, options.seed, prompts, folder, data.max_clip_s)
        done |= _render(studio, todo, folder, lock)
    renderings = [done[place] for place in sorted(done)]
    of_prompts = [[one for one in renderings if one.prompt == number] for number in range(len(prompts))]
    pairs = [pair for of_one in of_prompts if (pair := choose_pair(of_one, options.min_margin))]
    distributed.on_main(lambda: folder.finish(renderings, pairs, prompts, codec.decode))
    _report(options, of_prompts, len(pairs), speaker.bundle.name)


def _identity(options: PreferOptions) -> dict[str, Any]:
    """Return the options that renderings and scores depend on. The batch size is one of them because of rounding."""
    names = (
        "num_samples", "renderings", "temperature", "top_k", "top_p", "batch_size", "seed", "lora_scale", "recognizer",
    )  # fmt: skip
    speaker_model = options.speaker_model if SIMILARITY in options.measures else None
    return {name: getattr(options, name) for name in names} | {
        "measures": sorted(options.measures), "speaker_model": speaker_model,
    }  # fmt: skip


def _identity_of_model(speaker: GenerationModel) -> dict[str, Any]:
    adapter = speaker.adapter_folder
    return {
        "base_model": speaker.bundle.weights_digest,
        "codec": codec_digest(speaker.bundle.codec.folder),
        "lora_adapter": None if adapter is None else sampled_digest([adapter / ADAPTER_WEIGHTS]),
    }


def _batches_to_do(num_prompts: int, options: PreferOptions, done: dict[Place, Rendering]) -> list[list[Place]]:
    """Return the batches that are not complete: always the same ones, whatever the number of ranks."""
    places = [(prompt, rendering) for prompt in range(num_prompts) for rendering in range(options.renderings)]
    batches = [places[start : start + options.batch_size] for start in range(0, len(places), options.batch_size)]
    return [batch for batch in batches if not done.keys() >= set(batch)]


def _render(
    studio: _Studio, todo: Sequence[list[Place]], folder: PreferenceFolder, lock: FolderLock
) -> dict[Place, Rendering]:
    """Make the renderings, a batch on each rank at a time, and list them as soon as they are complete."""
    made: dict[Place, Rendering] = {}
    world_size, is_quiet = distributed.world_size(), None if distributed.is_main() else True
    with tqdm(total=sum(map(len, todo)), desc="speaking", unit="clip", disable=is_quiet, dynamic_ncols=True) as bar:
        for start in range(0, len(todo), world_size):
            own = start + distributed.rank()
            finished = studio.render(todo[own]) if own < len(todo) else []
            renderings = [one for of_rank in distributed.gather_objects(finished) for one in of_rank]
            lock.check()
            distributed.on_main(lambda new=renderings: folder.append(new))  # type: ignore[misc]
            made |= {(one.prompt, one.rendering): one for one in renderings}
            bar.update(len(renderings))
    return made


@dataclass
class _Studio:
    """Speaks and scores: the models, and the texts."""

    model: Any
    bundle: Bundle
    codec: Codec
    scorer: Scorer
    sampling: Sampling
    seed: int
    prompts: Sequence[Prompt]
    folder: PreferenceFolder
    max_clip_s: float
    _targets: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    def render(self, places: Sequence[Place]) -> list[Rendering]:
        """Return the renderings of one batch."""
        longest = int(self.max_clip_s * self.bundle.codec.sample_rate / self.bundle.codec.hop_length)
        asked = [
            BatchPrompt(
                prompt.before,
                prompt.given,
                min(prompt.max_new_tokens, longest),  # a longer clip could not be trained on
                seed_of(self.seed, number, rendering),
            )
            for number, rendering in places
            for prompt in [self.prompts[number]]
        ]
        spoken = speak_batch(self.model, self.bundle, asked, self.sampling)
        finished = []
        for place, speech in zip(places, spoken, strict=True):
            speech.check()
            # The stream's own tokens have no sound.
            finished.append(self._finish(place, speech.codes.clamp(max=self.bundle.stream.bos_id - 1), speech.stopped))
        return finished

    def _finish(self, place: Place, codes: torch.Tensor, stopped: bool) -> Rendering:
        """Store and score a rendering of codes (C, F). Without frames, it has no file."""
        number, prompt = place[0], self.prompts[place[0]]
        wav, key, waveform = None, None, torch.zeros(0)
        if codes.shape[1]:
            wav, waveform = f"{CLIPS}/{number}-{place[1]}.wav", self.codec.decode(codes)
            key = self.folder.store_clip(wav, waveform, codes)
        measures = self._measure(number, waveform, stopped)
        source = prompt.sample.source
        return Rendering(*place, source, wav, key, codes.shape[1], score_of(measures), measures)

    def _measure(self, number: int, waveform: torch.Tensor, stopped: bool) -> Measures:
        rate = self.codec.sample_rate
        target, voice = self._target(number)
        language = self.prompts[number].sample.language
        heard, said = (
            self.scorer.hear(waveform, rate, language),
            self.scorer.words_in(self.prompts[number].words, language),
        )
        if heard.reason is not None:
            return Measures(stopped, not_measured=heard.reason)
        error_rate = None
        if heard.words is not None and said is not None:
            errors = WordErrors.of(said, heard.words)
            error_rate = errors.word_errors / max(1, errors.words)
        return Measures(
            stopped,
            error_rate,
            similarity(heard.voice, voice) if heard.voice is not None and voice is not None else None,
            heard.mos if math.isfinite(heard.mos) else None,
            mel_distance_db(waveform, target, rate),
        )

    def _target(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the recording of a text as the codec decodes it, and its voice; the last one is kept."""
        if number not in self._targets:
            waveform = self.codec.decode(self.prompts[number].target)
            voice = Scorer(encode=self.scorer.encode).hear(waveform, self.codec.sample_rate).voice
            self._targets = {number: (waveform, voice)}
        return self._targets[number]


def _report(options: PreferOptions, of_prompts: Sequence[Sequence[Rendering]], num_pairs: int, base: str) -> None:
    """Print what was made, and what to do with it."""
    scores = [[one.score for one in of_one] for of_one in of_prompts]
    best, worst, mean = (
        sum(map(chosen, scores)) / len(scores) for chosen in (max, min, lambda of_one: sum(of_one) / len(of_one))
    )
    say(
        f"{counted(len(scores), 'text')}, {counted(sum(map(len, scores)), 'rendering')}; mean score of the best "
        f"{best:.3f}, of all {mean:.3f}, of the worst {worst:.3f}"
    )
    path, left_out = options.output_dir / PAIRS_FILE, len(scores) - num_pairs
    ties = f"; {counted(left_out, 'text')} left out, no two renderings differ by {options.min_margin:g} or more"
    say(f"pairs: {path} ({counted(num_pairs, 'pair')}{ties if left_out else ''})")
    if not num_pairs:
        warn("warning: there is no pair: give more --renderings, a higher --temperature or a lower --min_margin")
        return
    say(f"Check them by ear: python launch/review.py {path}")
    start = f" --init_from {options.lora_adapter_path}" if options.lora_adapter_path else ""
    say(f"Train on them:     python launch/train.py --objective dpo --pairs {path} --base_ckpt {base}{start}")
