"""Evaluate what a model speaks for samples that it has not seen, against their references: metrics and WAV files."""

from __future__ import annotations

from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.errors import collect_problems
from higgs_ds.common.folder_lock import EVALUATION_LOCK, FolderLock
from higgs_ds.options.commands import EvaluateOptions, check_lora_scale
from higgs_ds.speech.evaluation_results import (
    CHECKPOINTS_FILE,
    RESULTS_FILE,
    read_results,
    table,
    write_results,
)
from higgs_ds.speech.generate import load_generation_model, open_generation_model
from higgs_ds.speech.held_out import (
    Decoding,
    HeldOut,
    cache_dir_of,
    foreign_files,
    input_problems,
    read_prompts,
    vocabulary_of,
)
from higgs_ds.speech.measures import stop_warning
from higgs_ds.speech.scoring import Scoring


def main(options: EvaluateOptions) -> None:
    """Generate, measure, write and print. Every rank must call this, in a process group; ranks share the samples.

    Raises:
        InputError: an input is invalid; raised before any weight of the model is loaded.
        SaveError: a result cannot be written.
    """
    with FolderLock(EVALUATION_LOCK) as lock:
        _evaluate(options, lock)


def _evaluate(options: EvaluateOptions, lock: FolderLock) -> None:
    output_dir = options.output_dir
    problems = input_problems(options) + check_lora_scale(options.lora_scale, options.lora_adapter_path)
    problems += foreign_files(output_dir, [output_dir], CHECKPOINTS_FILE)
    if options.strengths is not None:
        problems.append("--strengths: needs --checkpoints; for one adapter, give --lora_scale")
    collect_problems(problems, lambda: lock.acquire(output_dir))
    scoring = Scoring(options.measures, options.recognizer, options.speaker_model, distributed.device())
    encoder = collect_problems(problems, scoring.check)
    earlier = collect_problems(problems, lambda: read_results(options.compare_with))
    speaker = collect_problems(
        problems,
        lambda: distributed.run_on_all_ranks(
            lambda: open_generation_model(
                options.base_model_path,
                options.lora_adapter_path,
                options.codec_ckpt,
                cache_dir_of(options),
                options.lora_scale,
            )
        ),
    )
    prompts = read_prompts(options, speaker, problems)
    assert speaker  # a missing one has raised a problem
    scorer = scoring.open(vocabulary_of(prompts), encoder)
    held_out = HeldOut(prompts, speaker.bundle, scorer, Decoding.of(options), output_dir, distributed.device())
    model = load_generation_model(speaker, distributed.device())
    used = {} if options.lora_adapter_path is None else {"lora_scale": options.lora_scale}
    results = used | held_out.spoken_by(model, output_dir)
    distributed.on_main(lambda: write_results(output_dir, results))
    say(table(results, earlier))
    if warning := stop_warning(results["stop_rate"]):
        warn(warning)
    say(f"evaluation: {output_dir / RESULTS_FILE}")
