"""--evaluate_steps: what the model in training speaks for held-out samples is measured, as by launch/evaluate.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from higgs_ds.common import distributed
from higgs_ds.common.console import say
from higgs_ds.common.errors import InputError
from higgs_ds.common.run_files import EVALUATION_FOLDER
from higgs_ds.common.words import counted
from higgs_ds.data.dataset import Dataset
from higgs_ds.options.evaluation import EvaluationOptions
from higgs_ds.speech.evaluation_results import measures_of, write_results
from higgs_ds.speech.held_out import Decoding, HeldOut, vocabulary_of
from higgs_ds.speech.prompts import prompts_of
from higgs_ds.speech.scoring import Scoring
from higgs_ds.speech.speaker_similarity import Encoder
from higgs_ds.training.intervals import is_due
from higgs_ds.training.run import Run, SpeechTest
from higgs_ds.training.signals import StopSignals

# Codec, recognizer and the models of the measures stay in host memory: that of the GPU is planned for the training.
DEVICE = torch.device("cpu")


def scoring_of(options: EvaluationOptions) -> Scoring:
    """Return which measures are asked for; none without --evaluate_steps."""
    return Scoring(options.measures, options.recognizer, options.speaker_model, DEVICE)


def open_speech_test(
    options: EvaluationOptions, val: Dataset, scoring: Scoring, encoder: Encoder | None
) -> SpeechTest | None:
    """Choose the prompts, and open what measures them, before the base is loaded; None without --evaluate_steps.

    Args:
        encoder: what `scoring.check` has returned.

    Raises:
        InputError: there is nothing to speak, or the recognizer cannot be opened.
    """
    if options.evaluate_steps is None:
        return None
    prompts = prompts_of(val, options.evaluate_samples)
    if not prompts:
        raise InputError(
            f"--evaluate_steps {options.evaluate_steps}: no validation sample has audio to generate; give held-out "
            "samples as --val_manifest, or hold back some of the others (--val_split)"
        )
    return SpeechTest(prompts, scoring.open(vocabulary_of(prompts), encoder))


class Evaluator:
    """Evaluates the model of a run, on the same prompts each time. Every rank must call its methods."""

    def __init__(self, run: Run) -> None:
        """Decode and measure the references, if there are evaluations."""
        options, test = run.options.evaluation, run.speech_test
        self.run, self.every, self.folder = run, options.evaluate_steps, run.output_dir / EVALUATION_FOLDER
        # At stage 3 the ranks share the weights: each layer's are gathered when it runs, on all of them at once.
        synced = run.engine.stage == 3
        decoding = Decoding(
            temperature=options.evaluate_temperature, batch_size=options.evaluate_batch_size, synced=synced
        )
        self.held_out: HeldOut | None = None
        if test is not None:
            say(f"evaluation: {counted(len(test.prompts), 'recording')} of validation samples are measured first")
            with distributed.kept_generators():  # loading a model draws from them
                self.held_out = HeldOut(test.prompts, run.bundle, test.scorer, decoding, self.folder, DEVICE)

    def is_due(self, last: bool) -> bool:
        return self.every is not None and (last or is_due(self.run.state.step, self.every))

    def evaluate(self, signals: StopSignals) -> dict[str, float] | None:
        """Speak and measure; write the WAV files and evaluation.json of this step. Return None if a signal interrupts.

        Returns:
            The measures as eval/..., and those of the averaged weights, if there are any, as eval_ema/....
        """
        name = f"step-{self.run.state.step}"
        values = self._evaluate(signals, self.folder / name, "eval")
        if values is None or not self.run.engine.keeps_average:
            return values
        with self.run.engine.averaged_weights():
            averaged = self._evaluate(signals, self.folder / f"{name}-ema", "eval_ema")
        return None if averaged is None else values | averaged

    def _evaluate(self, signals: StopSignals, folder: Path, kind: str) -> dict[str, float] | None:
        assert self.held_out is not None
        results: dict[str, Any] | None
        with distributed.kept_generators(), self.run.engine.generation_mode(self.run.bundle.folder) as model:
            results = self.held_out.spoken_until(lambda: signals.stop_reason() is not None, model, folder)
        if results is None:
            return None
        distributed.on_main(lambda: write_results(folder, results))
        return {f"{kind}/{name}": value for name, value in measures_of(results).items()}
