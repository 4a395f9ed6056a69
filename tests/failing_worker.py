"""One rank of trainings in which an optional output fails: python tests/failing_worker.py JSON.

JSON is a list of {argv, fault}; a fault is a name of FAULTS, or null. Before its N-th training, each rank prints
"run: N".
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

from higgs_ds.common.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
import wandb  # noqa: E402
from launcher import RANDOM, overriding  # noqa: E402

from higgs_ds.common.process import run_command, run_ranks  # noqa: E402
from higgs_ds.options.command_line import parse_train_options  # noqa: E402
from higgs_ds.reporting import report_page  # noqa: E402
from higgs_ds.reporting.metrics_log import MetricsLog  # noqa: E402
from higgs_ds.speech import prompts  # noqa: E402
from higgs_ds.training import samples  # noqa: E402
from higgs_ds.training.loop import main  # noqa: E402

os.environ["WANDB_MODE"] = "offline"  # which needs no login
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def second_call_fails(function: Callable[..., Any], error: Exception) -> Mock:
    mock = Mock(wraps=function)
    mock.side_effect = lambda *args, **kwargs: function(*args, **kwargs) if mock.call_count != 2 else raise_(error)
    return mock


def raise_(error: Exception) -> None:
    raise error


def generation_out_of_memory(folder: Path) -> Any:
    """The second of the first samples runs out of memory; all later ones are generated."""
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
    return patch.object(samples, "speak", second_call_fails(samples.speak, error))


@contextlib.contextmanager
def samples_without_space(folder: Path) -> Iterator[None]:
    """Short samples, as generation takes long at stage 3."""
    with patch.multiple(prompts, LONGEST=0, FRAMES_MORE=12), patch.object(samples, "write_audio", side_effect=NO_SPACE):
        yield


def page_once_without_space(folder: Path) -> Any:
    """The second page, the last of the run, does not fit on the disk."""
    return patch.object(report_page, "write_text", second_call_fails(report_page.write_text, NO_SPACE))


def page_never(folder: Path) -> Any:
    return patch.object(report_page, "curves_of", side_effect=AssertionError)


@contextlib.contextmanager
def tensorboard_folder_removed(folder: Path) -> Iterator[None]:
    def remove(log: MetricsLog) -> None:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)

    with patch.object(MetricsLog, "advance", remove):
        yield


def wandb_out_of_reach(folder: Path) -> Any:
    return patch.object(wandb, "init", side_effect=wandb.errors.CommError("No connection.\nTry again."))


def wandb_log_fails(folder: Path) -> Any:
    """What was logged before is still finished: finish() is called, and its failure is not reported as well."""
    run = Mock()
    run.log.side_effect = [None, wandb.Error("the service has ended"), None, None, None]
    run.finish.side_effect = lambda: (folder / "wandb_finished").write_text(str(run.log.call_count))
    return patch.object(wandb, "init", return_value=run)


FAULTS: dict[str, Callable[[Path], Any]] = {
    fault.__name__: fault
    for fault in (
        generation_out_of_memory, samples_without_space, page_once_without_space, page_never,
        tensorboard_folder_removed, wandb_out_of_reach, wandb_log_fails,
    )
}  # fmt: skip


def train_all() -> None:
    gc.freeze()  # objects of the imports need not be scanned each time
    for number, case in enumerate(json.loads(sys.argv[1])):
        print(f"run: {number}", flush=True)
        options, given = parse_train_options(overriding([*RANDOM, *case["argv"], "--quiet"]))
        assert options.run.output_dir is not None
        with FAULTS[case["fault"]](options.run.output_dir) if case["fault"] else contextlib.nullcontext():
            main(options, given)


if __name__ == "__main__":
    run_command(lambda: run_ranks(train_all))
