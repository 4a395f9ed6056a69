"""How often a run logs, validates, saves and speaks, where no option says so; whether its steps are few."""

from __future__ import annotations

from dataclasses import replace

from higgs_ds.common.resources import SAMPLES
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.options.train import TrainOptions

LOG_STEPS, VAL_STEPS, SAVE_STEPS = 10, 100, 1000  # at most, in a run of any length
PER_RUN = 10  # validations, checkpoints and samples, with a rounded interval
SAVES_OF_FULL = 2  # with --finetune full, whose checkpoints are three times as large as the model in float32
FEW_STEPS = 100  # below this, a run is unlikely to learn a voice; docs/first_voice.md says what this is based on


def with_intervals(options: TrainOptions, total_steps: int) -> TrainOptions:
    """Return the options with every interval set. Those that are given stay.

    They depend on nothing but the options and the number of steps, so that a resumed run has the same. A run that is
    made longer has those of its new length.
    """
    run = options.run
    tenth = max(1, round(total_steps / PER_RUN))
    val_steps = run.val_steps or min(VAL_STEPS, tenth)

    def at_validations(steps: int) -> int:
        """Lower an interval to a multiple of the validations', so that the best of these may have a checkpoint."""
        return steps - steps % val_steps if val_steps <= steps else steps

    save = -(-total_steps // SAVES_OF_FULL) if options.is_full_finetuning else tenth
    return options.replace(
        log_steps=run.log_steps or min(LOG_STEPS, tenth),
        val_steps=val_steps,
        save_steps=run.save_steps or at_validations(min(SAVE_STEPS, save)),
        sample_steps=run.sample_steps or (at_validations(min(SAVE_STEPS, tenth)) if run.samples else None),
    )


def is_due(step: int, every: int | None) -> bool:
    """Whether something that is done every N steps is due after this one; never without an N."""
    return every is not None and step % every == 0


def describe_intervals(options: TrainOptions) -> str:
    """Return the intervals, as a part of the table at the start."""
    run = options.run
    every = {"log line": run.log_steps, "validation": run.val_steps, "checkpoint": run.save_steps}
    every |= {"samples": run.sample_steps} if run.sample_steps else {}
    every |= {"evaluation": options.evaluation.evaluate_steps} if options.evaluation.evaluate_steps else {}
    return "every N steps: " + ", ".join(f"{what} {number}" for what, number in every.items())


def few_steps_warning(options: TrainOptions, sampler: WindowSampler, total_steps: int) -> str | None:
    """Return a warning with numbers and remedies if a run on a user's data has few steps; else None.

    --max_steps is not doubted: whoever gives it has chosen the number. Preferences take fewer steps than a voice.
    """
    optim = options.optim
    if optim.max_steps is not None or total_steps >= FEW_STEPS or options.objective.is_dpo:
        return None
    if all(path.resolve().is_relative_to(SAMPLES.resolve()) for path in options.data.train_manifests):
        return None
    per_epoch = max(1, sampler.num_steps(1))
    epochs = -(-FEW_STEPS // per_epoch)
    unit = "micro-batches" if sampler.max_tokens else "samples"
    remedies = [f"--epochs {epochs} makes about {epochs * per_epoch}"]
    smaller = replace(sampler, gradient_accumulation_steps=1)
    if optim.grad_accum > 1:
        remedies.append(f"--grad_accum 1 makes {smaller.num_steps(optim.epochs)}, of {smaller.window_size} {unit} each")
    return (
        f"warning: {total_steps} step{'s are' if total_steps > 1 else ' is'} few ({len(sampler.lengths):,} training "
        f"samples, {optim.epochs} epoch{'s' if optim.epochs > 1 else ''}, {sampler.window_size} {unit} per step); a "
        f"voice takes about {FEW_STEPS} or more (docs/first_voice.md): {', '.join(remedies)}"
    )
