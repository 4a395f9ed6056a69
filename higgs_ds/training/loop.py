"""The training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from higgs_ds.checkpoints.folder import checkpoint_folder
from higgs_ds.checkpoints.save import save_checkpoint
from higgs_ds.common.console import say, set_quiet, warn
from higgs_ds.common.distributed import sum_over_ranks, world_size
from higgs_ds.common.errors import NotFiniteError, StoppedError
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.common.interrupts import waiting
from higgs_ds.common.precision import FP16
from higgs_ds.data.collate import Batch
from higgs_ds.data.prefetch import prefetched
from higgs_ds.data.sampler import Window
from higgs_ds.model.loss import StepResult, mean_losses
from higgs_ds.options.metrics import VAL_LOSS
from higgs_ds.options.train import TrainOptions
from higgs_ds.reporting.meter import Meter
from higgs_ds.reporting.metrics_log import MetricsLog
from higgs_ds.reporting.trackers import Tracker, open_trackers
from higgs_ds.speech.measures import stop_warning
from higgs_ds.training.evaluation import Evaluator
from higgs_ds.training.finish import finish
from higgs_ds.training.intervals import is_due
from higgs_ds.training.loss_checks import (
    describe_first_module,
    describe_skipped_step,
    implausible_losses,
    may_skip_step,
)
from higgs_ds.training.preflight import seconds_left
from higgs_ds.training.run import Run
from higgs_ds.training.samples import SampleWriter
from higgs_ds.training.signals import StopSignals
from higgs_ds.training.startup import start
from higgs_ds.training.validation import validate


def main(options: TrainOptions, given: set[str]) -> None:
    """Train as the options say. Every rank must call this, in a process group."""
    set_quiet(options.run.quiet)
    with FolderLock() as lock:
        run = start(options, given, lock)
        try:
            train(run)
            finish(run)
        except NotFiniteError as error:
            if error.on_all_ranks:
                run.reporter.write(at_end=True, reason=str(error).splitlines()[0])
            raise
        finally:
            _free_memory(run)


def _free_memory(run: Run) -> None:
    """Free the model for the next training of a process on its own, such as a notebook's.

    DeepSpeed's gradient hooks would keep it. One of several ranks ends now, and must not wait for a GPU first: a
    collective there may never end.
    """
    if world_size() == 1:
        run.engine.engine.destroy()


def train(run: Run) -> None:
    """Fetch, step, log, validate, evaluate, write samples, save; all but the first two also at the last step.

    Evaluations and samples begin before the first step.

    Raises:
        StoppedError: a signal has stopped the run; a checkpoint is saved first.
    """
    state, engine, options = run.state, run.engine, run.options
    meter = Meter(engine.objective, run.bundle.stream.num_codebooks, engine.device)
    meter.restore(state.meters)
    log, writer, evaluator = _open_log(run), SampleWriter(run), Evaluator(run)
    with contextlib.closing(log), StopSignals() as signals:
        if state.validation_due or state.evaluation_due:
            _catch_up(run, log, meter, evaluator, signals)
        if writer.is_due_at_start():
            with meter.paused():
                _write_samples(run, log, writer)
        state.stopped_early = _is_out_of_patience(run)
        windows = run.sampler.windows(state.step, state.step if state.stopped_early else state.total_steps)
        for window, batches in prefetched(windows, lambda w: run.train.batches(w.micro_batches, w.epoch_number)):
            rates = engine.learning_rates
            result = engine.train_step(batches)
            if result.overflows:
                _record_overflows(run, result)
            if not result.applied:
                _record_skipped_step(run, meter, window, batches, result)
            meter.add(result, batches)
            if state.step == 0:
                _check_first_losses(run, result)
            state.step, state.epoch = state.step + 1, window.epoch
            state.has_learned |= rates["lr"] > 0 and result.applied
            log.advance()
            last = state.step == state.total_steps
            is_logged = last or is_due(state.step, options.run.log_steps)
            is_validated = bool(len(run.val)) and (last or is_due(state.step, options.run.val_steps))
            is_evaluated = evaluator.is_due(last)
            if is_logged:
                _log(run, log, meter, rates)
            with meter.paused():
                if is_validated:
                    _validate(run, log, signals)
                if is_evaluated:
                    _evaluate(run, log, evaluator, signals)
                if (is_logged or is_validated or is_evaluated) and not last:
                    _draw(run)
                if writer.is_due(last):
                    _write_samples(run, log, writer)
                stopped_by, state.stopped_early = signals.stop_reason(), _is_out_of_patience(run)
                if state.stopped_early and meter.steps:
                    _log(run, log, meter, rates)
                last |= state.stopped_early
                if last or stopped_by or is_due(state.step, options.run.save_steps) or _is_best_step(run):
                    _save(run, meter)
                    stopped_by = stopped_by or signals.stop_reason()
                if last or stopped_by:
                    _draw(run, at_end=True)
                    stopped_by = stopped_by or signals.stop_reason()
            if stopped_by:
                raise _stopped_error(run, stopped_by)
            if last:
                break


def _open_log(run: Run) -> MetricsLog:
    state, options = run.state, run.options

    def trackers() -> list[Tracker]:
        return open_trackers(options.run.report_to, run.output_dir, state.step, options.flat())

    due = {"val/loss": state.validation_due, "eval/stop_rate": state.evaluation_due}
    again = [metric for metric, is_due_again in due.items() if is_due_again]
    return MetricsLog(run.output_dir, state.step, state.total_steps, again, seconds_left(), trackers)


def _log(run: Run, log: MetricsLog, meter: Meter, rates: dict[str, float]) -> None:
    run.lock.check()
    values = meter.read() | rates | {"grad_norm": run.engine.grad_norm}
    if run.engine.scaling is not None:
        values |= {"loss_scale": run.engine.scaling.scale, "overflows": run.state.overflows}
    values |= run.codebooks.losses_of_others(values)
    log.write(run.state.step, run.state.epoch, values | run.state.skips())
    run.codebooks.report_once(run.state.step, values)
    meter.reset()


@waiting("at the next batch of this validation, and saves a checkpoint")
def _validate(run: Run, log: MetricsLog, signals: StopSignals) -> None:
    """Validate and log the result; if a signal interrupts this, the resumed run validates."""
    state = run.state
    state.validation_due = True
    values = validate(run.engine, run.val, run.options.rows_per_batch, signals)
    if values is not None:
        log.write(state.step, state.epoch, values | run.codebooks.losses_of_others(values))
        if state.step:  # there is no checkpoint of step 0 to keep or to return to
            state.val_losses[str(state.step)] = values["val/loss"]
        state.validation_due = False


def _catch_up(run: Run, log: MetricsLog, meter: Meter, evaluator: Evaluator, signals: StopSignals) -> None:
    """Validate and evaluate before the first step, or what a signal interrupted at the step of the checkpoint.

    Raises:
        StoppedError: a signal came, or came again.
    """
    state = run.state
    with meter.paused():
        if state.validation_due:
            _validate(run, log, signals)
        if state.evaluation_due:
            _evaluate(run, log, evaluator, signals)
    if state.validation_due or state.evaluation_due:
        raise _stopped_error(run, signals.stop_reason())
    state.stopped_early = _is_out_of_patience(run)
    if state.step and (state.stopped_early or state.step == state.total_steps):  # no step follows that would save
        _save(run, meter)
        _draw(run, at_end=True)


@waiting("at the next samples of this evaluation, and saves a checkpoint")
def _evaluate(run: Run, log: MetricsLog, evaluator: Evaluator, signals: StopSignals) -> None:
    """Evaluate what the model speaks; if a signal interrupts this, the resumed run evaluates."""
    state = run.state
    state.evaluation_due = True
    values = evaluator.evaluate(signals)
    if values is not None:
        log.write(state.step, state.epoch, values)
        asked_for = {} if state.metric == VAL_LOSS else {state.metric: None}
        state.evaluations[str(state.step)] = asked_for | values
        state.evaluation_due = False


@waiting("after the samples, and saves a checkpoint")
def _write_samples(run: Run, log: MetricsLog, writer: SampleWriter) -> None:
    values = writer.write_samples()
    if values:
        log.write(run.state.step, run.state.epoch, values)
        log.write_sounds(run.state.step, writer.written)
        if warning := stop_warning(values["sample/stop_rate"]):
            warn(warning)


@waiting("after the report, with a checkpoint")
def _draw(run: Run, at_end: bool = False) -> None:
    run.reporter.write(at_end)


def _is_out_of_patience(run: Run) -> bool:
    options = run.options.run
    return run.state.is_out_of_patience(options.early_stopping_patience, options.early_stopping_min_delta)


def _is_best_step(run: Run) -> bool:
    """Whether this step's checkpoint must be kept as the best: for early stopping, or by a metric of evaluations."""
    wanted = run.options.run.early_stopping_patience is not None or run.state.metric != VAL_LOSS
    return wanted and run.state.best_step == run.state.step


@waiting("as soon as this checkpoint is saved")
def _save(run: Run, meter: Meter) -> None:
    run.lock.check()
    keep = run.options.run.keep_checkpoints
    save_checkpoint(run.output_dir, run.engine, run.state, meter.state(), run.form, keep)


def _check_first_losses(run: Run, result: StepResult) -> None:
    config, sums = run.bundle.config, sum_over_ranks(result.sums.sum(0))
    losses = mean_losses(sums, result.counts, run.engine.weights)
    for doubt in implausible_losses(losses.text, losses.audio, config.vocab_size, config.codebook_size):
        warn(f"warning: {doubt}")


def _record_overflows(run: Run, result: StepResult) -> None:
    run.state.overflows += result.overflows
    times = f" {result.overflows} times" if result.overflows > 1 else ""
    scale = run.engine.scaling.scale if run.engine.scaling else 1
    say(f"step {run.state.step + 1}: gradients overflowed in fp16{times}; the loss scale is {scale:g} now")


def _record_skipped_step(run: Run, meter: Meter, window: Window, batches: Sequence[Batch], result: StepResult) -> None:
    """Record and report a skipped step; if no more may be skipped, save a checkpoint and end the run."""
    state = run.state
    why = describe_skipped_step(state.step + 1, result, window.micro_batches, run.train)
    in_fp16 = run.options.model.precision == FP16
    if in_fp16 and not result.at_minimum:
        why += describe_first_module(run.engine, batches)
    skips = run.options.optim.on_nonfinite == "skip" and not result.at_minimum
    if skips and may_skip_step(len(state.skipped), state.step):
        state.skipped.append(state.step + 1)
        warn(f"warning: {why}")
        return
    if state.step and not checkpoint_folder(run.output_dir, state.step).exists():
        _save(run, meter)
    advice = f"steps skipped earlier: {len(state.skipped)}" if skips else "or resume with --on_nonfinite skip"
    if in_fp16:
        other = "fp16 holds nothing above 65,504: use --precision bf16 on a GPU that computes in it, or fp32"
        advice = other if result.at_minimum else f"{advice}. {other}"
    error = NotFiniteError(f"{why}\nCheck these samples, or start a new run with a lower --lr; {advice}")
    error.on_all_ranks = True
    raise error


def _stopped_error(run: Run, signal_name: str | None) -> StoppedError:
    saved = f"a checkpoint is saved in {run.output_dir}. Resume with --resume auto"
    error = StoppedError(
        f"stopped by {signal_name} at step {run.state.step} of {run.state.total_steps}; "
        f"{saved if run.state.step else 'nothing was trained yet'}"
    )
    error.on_all_ranks = True
    return error
