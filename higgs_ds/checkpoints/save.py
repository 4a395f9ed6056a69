"""Write a checkpoint from an engine, and load it into one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from higgs_ds.adapters.save import AdapterFormat, write_adapter
from higgs_ds.checkpoints.folder import (
    MANIFEST_FILE,
    OPTIMIZER_STEM,
    RNG_FILE,
    adapter_folder,
    checkpoint_folder,
    checkpoints_to_delete,
    manifest_of,
    masters_in,
    moments_in,
    trained_folder,
)
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.checkpoints.trained_weights import FullFormat, write_trained
from higgs_ds.common.distributed import gather_objects, on_main_consuming, rank
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import remove_folder, replaced_folder, saving, write_json
from higgs_ds.common.run_files import ADAPTER_FOLDER, AVERAGE, AVERAGED_ADAPTER_FOLDER, MOMENTS, STATE_FILE
from higgs_ds.common.tensor_files import write_shards


class TrainedState(Protocol):
    """What a checkpoint saves and restores of an `Engine`: weights, averages, moments, schedule and loss scale."""

    scheduler: Any
    scaling: Any  # the loss scale of fp16, otherwise None

    @property
    def keeps_average(self) -> bool: ...

    @property
    def master_bytes(self) -> dict[str, int]: ...

    def gather(self, *moments: str | None) -> Iterator[torch.Tensor]: ...

    def restore(
        self, masters: Mapping[str, torch.Tensor], moments: Mapping[str, Mapping[str, torch.Tensor]], step: int
    ) -> None: ...

    def restore_schedule(self, state: dict[str, Any]) -> None: ...


def save_checkpoint(
    output_dir: Path,
    engine: TrainedState,
    state: TrainerState,
    meter_state: dict[str, Any],
    form: AdapterFormat | FullFormat,
    keep: int | None = None,
) -> None:
    """Write `checkpoint-N/`, and update `lora_adapters/` and `trainer_state.json` beside it. Every rank must call this.

    Fully fine-tuned weights are gathered and written one after another, about a gigabyte at a time. Errors are raised
    on every rank; what was saved before stays unchanged.

    Args:
        meter_state: `Meter.state` of this rank.
        keep: how many of the newest checkpoints to keep, besides the best; None keeps all.

    Raises:
        SaveError: writing fails.
        NotFiniteError: a trained tensor holds NaN or infinity.
    """
    state.scheduler = engine.scheduler.state_dict()
    state.loss_scaling = engine.scaling.state_dict() if engine.scaling else {}
    state.meters = gather_objects(meter_state)
    rng_states = gather_objects(_rng_state())
    target = checkpoint_folder(output_dir, state.step)
    sizes = engine.master_bytes

    def write(tensors: Iterator[torch.Tensor]) -> None:
        with saving(target), replaced_folder(target) as folder:
            for averaged in [False, True] if engine.keeps_average else [False]:
                weights = islice(tensors, len(sizes))
                if isinstance(form, FullFormat):
                    write_trained(trained_folder(folder, averaged), sizes, weights, form)
                else:
                    named = dict(zip(sizes, weights, strict=True))
                    written_as = replace(form, averaged=averaged)
                    write_adapter(adapter_folder(folder, averaged), named, written_as, state.has_learned)
            of_moments = {f"{moment}.{name}": size for moment in MOMENTS for name, size in sizes.items()}
            write_shards(of_moments, tensors, folder, OPTIMIZER_STEM)
            by_rank = {f"{r}.{kind}": tensor for r, states in enumerate(rng_states) for kind, tensor in states.items()}
            save_file(by_rank, folder / RNG_FILE)
            write_json(folder / STATE_FILE, state.to_json())
            write_json(folder / MANIFEST_FILE, manifest_of(folder))
        publish(target, output_dir, state, keep)

    averages = (AVERAGE,) if engine.keeps_average else ()
    on_main_consuming(engine.gather(None, *averages, *MOMENTS), write)


def publish(checkpoint: Path, output_dir: Path, state: TrainerState, keep: int | None) -> None:
    """Update adapters and state beside the checkpoints from one of them, and delete those that are not kept.

    Raises:
        SaveError: writing or deleting fails.
    """
    for name in (ADAPTER_FOLDER, AVERAGED_ADAPTER_FOLDER):
        if (checkpoint / name).is_dir():
            with saving(output_dir / name), replaced_folder(output_dir / name) as folder:
                shutil.copytree(checkpoint / name, folder, dirs_exist_ok=True)
    with saving(output_dir / STATE_FILE):
        write_json(output_dir / STATE_FILE, state.to_json())
    for folder in checkpoints_to_delete(output_dir, state, keep) if keep is not None else ():
        with saving(folder):
            remove_folder(folder)


def load_masters_into(masters: Mapping[str, torch.Tensor], parameters: dict[str, torch.nn.Parameter]) -> None:
    """Copy master weights into a model's trained parameters, before an engine is built from it."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(masters[name])


def load_into_engine(folder: Path, engine: TrainedState, state: TrainerState) -> None:
    """Restore weights, averages, moments, schedule and random state of a checkpoint. Every rank must call this."""
    moments = {moment: moments_in(folder, moment) for moment in MOMENTS}
    if engine.keeps_average:
        moments[AVERAGE] = masters_in(folder, averaged=True)
    missing = [name for name in masters_in(folder) if not all(name in tensors for tensors in moments.values())]
    if missing:
        raise InputError(f"{folder}: its optimizer has no state of {len(missing)} tensors, for instance {missing[0]}")
    engine.restore(masters_in(folder), moments, state.step - len(state.skipped))
    engine.restore_schedule(state.scheduler)
    if engine.scaling:
        engine.scaling.load_state_dict(state.loss_scaling)
    states = load_file(folder / RNG_FILE)
    if f"{rank()}.cpu" in states:
        torch.set_rng_state(states[f"{rank()}.cpu"])
    if torch.cuda.is_available() and f"{rank()}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{rank()}.cuda"])


def _rng_state() -> dict[str, torch.Tensor]:
    """Return the state of this rank's random generators, which dropout uses."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
