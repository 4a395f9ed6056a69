"""Which adapter of a run to take, and why."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from higgs_ds.checkpoints.folder import adapter_folder, checkpoint_folder, read_state, step_of
from higgs_ds.common.errors import InputError
from higgs_ds.common.run_files import ADAPTER_COPY, ADAPTER_FOLDER, AVERAGED_ADAPTER_FOLDER, FINAL_MODEL, STATE_FILE

_IN_RUN = (ADAPTER_FOLDER, AVERAGED_ADAPTER_FOLDER, FINAL_MODEL, ADAPTER_COPY)


def run_of(adapter: Path) -> Path | None:
    """Return the folder of the run that an adapter is in, by the name of its folder; None if it is not in a run."""
    if adapter.name not in _IN_RUN:
        return None
    run = adapter.parent.parent if step_of(adapter.parent) is not None else adapter.parent
    return run if (run / STATE_FILE).is_file() else None


def recommend(searched: Path, usable: Collection[Path]) -> dict[Path, str]:
    """Return, for each run in the folder `searched`, which of its usable adapters to take, and why."""
    runs = {run for run in map(run_of, usable) if run is not None and (run == searched or searched in run.parents)}
    chosen = [_choose(run, usable) for run in sorted(runs)]
    return dict(choice for choice in chosen if choice is not None)


def _choose(run: Path, usable: Collection[Path]) -> tuple[Path, str] | None:
    try:
        state = read_state(run)
    except InputError:  # of another version
        return None
    last, best = run / ADAPTER_FOLDER, state.best_step
    metric, of_best = state.compared_by.words, state.compared_by.best
    value = f"its {metric}, {state.best_value:.4g}, is the {of_best}" if best is not None else ""
    if best is not None and best != state.step:
        at_best = adapter_folder(checkpoint_folder(run, best))
        if at_best in usable:
            return at_best, f"{value}; {last} is of step {state.step}"
        value = f"the {metric} was {of_best} at step {best}, of which there is no adapter"
    if last not in usable:
        return None
    is_finished = state.step >= state.total_steps or state.stopped_early
    step = f"it is of the last {'step' if is_finished else 'checkpoint'}, {state.step}"
    return last, f"{step}; {value or 'nothing was validated, which would show whether an earlier one is better'}"
