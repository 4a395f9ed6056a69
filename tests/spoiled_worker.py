"""One rank of trainings in which values are not finite: python tests/spoiled_worker.py JSON.

JSON is a list of {argv, steps, rank, kind}: in these optimizer steps, counted in this process, that rank's first
micro-batch has hidden states ("loss") or gradients of them ("gradient") that are not finite. Rank 0 prints a JSON list:
each training's error, or null.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from typing import Any

from higgs_ds.common.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
from allow_fp16 import allow_fp16  # noqa: E402
from launcher import RANDOM, overriding  # noqa: E402

from higgs_ds.common import distributed  # noqa: E402
from higgs_ds.common.errors import NotFiniteError  # noqa: E402
from higgs_ds.common.folder_lock import FolderLock  # noqa: E402
from higgs_ds.common.process import run_command, run_ranks  # noqa: E402
from higgs_ds.data.collate import Batch  # noqa: E402
from higgs_ds.model.loss import StepResult  # noqa: E402
from higgs_ds.options.command_line import parse_train_options  # noqa: E402
from higgs_ds.training.engine import Engine  # noqa: E402
from higgs_ds.training.loop import train  # noqa: E402
from higgs_ds.training.startup import start  # noqa: E402


def train_spoiled(argv: list[str], steps: list[int], rank: int, kind: str) -> str | None:
    run = start(*parse_train_options(overriding([*RANDOM, *argv, "--quiet", "--no_report"])), FolderLock())
    engine, done = run.engine, []
    original, norm = engine.train_step, engine.engine.module.higgs.model.norm

    def spoil(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        handles.pop().remove()
        if kind == "loss":
            return output * torch.inf
        output.register_hook(lambda gradient: gradient * torch.nan)
        return output

    handles: list[Any] = []
    if engine.scaling is not None:
        check_overflows(engine)

    def train_step(batches: Sequence[Batch]) -> StepResult:
        done.append(1)
        if len(done) in steps and distributed.rank() == rank:
            handles.append(norm.register_forward_hook(spoil))
        return original(batches)

    engine.train_step = train_step  # type: ignore[method-assign]
    try:
        train(run)
    except NotFiniteError as error:
        return str(error)
    return None


def check_overflows(engine: Engine) -> None:
    """Fail where an overflow changes master weights, their averages, Adam's state or the schedule."""

    def learned() -> list[torch.Tensor]:
        states = [engine.state.optimizer.state.get(master, {}) for master in engine.state.masters()]
        tensors = [torch.as_tensor(value) for state in states for value in state.values()]
        return [tensor.clone() for tensor in (*engine.state.masters(), *tensors)]

    before: list[Any] = []
    run_window, update = engine._run_window, engine.scaling.update

    def remember(*arguments: Any) -> Any:
        before[:] = [learned(), engine.scheduler.last_epoch]
        return run_window(*arguments)

    def check(overflowed: bool) -> None:
        if overflowed:
            assert engine.scheduler.last_epoch == before[1]
            assert all(now.equal(then) for now, then in zip(learned(), before[0], strict=True))
        update(overflowed)

    engine._run_window, engine.scaling.update = remember, check  # type: ignore[method-assign]


def main() -> None:
    allow_fp16()
    gc.freeze()  # objects of the imports need not be scanned each time
    errors = [train_spoiled(**case) for case in json.loads(sys.argv[1])]
    if distributed.is_main():
        print("errors:", json.dumps(errors))


if __name__ == "__main__":
    run_command(lambda: run_ranks(main))
