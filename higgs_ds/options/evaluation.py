"""The options of launch/train.py for evaluations during the run: the model speaks held-out samples, as it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

from higgs_ds.options.fields import (
    MEASURES,
    MEASURES_HELP,
    RECOGNIZER_HELP,
    RESEMBLYZER,
    SPEAKER_MODEL_HELP,
    option,
)
from higgs_ds.options.metrics import METRICS, RECOGNIZER, VAL_LOSS


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation during the run"""

    evaluate_steps: int | None = option(
        None,
        "optimizer steps between evaluations: before the first step, every N and at the end, the model speaks "
        "validation samples, which are measured as by launch/evaluate.py (default: none)",
    )
    evaluate_samples: int = option(20, "for --evaluate_steps: number of validation samples to speak")
    evaluate_batch_size: int = option(
        1, "for --evaluate_steps: how many samples each GPU generates at once, as --batch_size of launch/evaluate.py"
    )
    evaluate_temperature: float = option(
        0.0, "for --evaluate_steps: 0 for greedy decoding, above 0 for sampling, with the same seeds each time"
    )
    recognizer: str | None = option(
        None, f"for --evaluate_steps: also measure the word error rate, {RECOGNIZER_HELP}", metavar="RECOGNIZER"
    )
    measures: tuple[str, ...] = option((), f"for --evaluate_steps: also measure {MEASURES_HELP}", MEASURES, "MEASURE")
    speaker_model: str = option(RESEMBLYZER, f"for --measures: {SPEAKER_MODEL_HELP}", metavar="MODEL")
    metric_for_best_model: str = option(
        VAL_LOSS,
        "metric by which checkpoints are compared, for early stopping and for the one that is kept as the best; each "
        f"new best by a metric eval/... saves a checkpoint. One of {', '.join(METRICS)}",
        tuple(METRICS),
        "METRIC",
    )


def check_evaluation(options: EvaluationOptions) -> list[str]:
    """Return the problems of these options on their own; empty if there are none."""
    defaults, metric = EvaluationOptions(), options.metric_for_best_model
    if options.evaluate_steps is None:
        given = [name for name, value in vars(options).items() if value != getattr(defaults, name)]
        return [
            f"--{name}{f' {metric}' if name == 'metric_for_best_model' else ''}: needs --evaluate_steps N"
            for name in given
        ]
    problems = [
        f"--{name} {getattr(options, name)}: must be 1 or more"
        for name in ("evaluate_steps", "evaluate_samples", "evaluate_batch_size")
        if getattr(options, name) < 1
    ]
    if not 0 <= options.evaluate_temperature < math.inf:
        problems.append(f"--evaluate_temperature {options.evaluate_temperature}: must be 0 or above")
    needs = METRICS[metric].needs
    if needs == RECOGNIZER and options.recognizer is None:
        problems.append(f"--metric_for_best_model {metric}: needs --recognizer, which hears the words")
    if needs in MEASURES and needs not in options.measures:
        problems.append(f"--metric_for_best_model {metric}: needs --measures {needs}")
    return problems
