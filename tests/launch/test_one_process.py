"""Several trainings in one process, as in the cells of a notebook: none leaves anything to the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launcher import RANDOM, run_code
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

OPTIONS = [*RANDOM, *"--precision fp32 --max_steps 2 --grad_accum 1 --batch_size 2 --no_report --quiet".split()]
STAGES = ("zero2", "zero3", "none")
CELLS = """
import gc, os, signal, sys, weakref
from launcher import overriding
from higgs_ds.cli import train
from higgs_ds.training import loop
from higgs_ds.training.engine import Engine

engines, models = [], []
start = Engine.__init__

def watched(self, *args):
    start(self, *args)
    engines.append(weakref.ref(self.engine))
    models.append(weakref.ref(next(iter(self.engine.module.parameters()))))

def cell(folder, stage, *more):
    ds_json = [] if stage == "none" else ["--deepspeed", stage + ".json"]
    return train(overriding([*OPTIONS, *ds_json, "--output_dir", folder, *more]))

def alive():
    for _ in range(3):  # an object that C++ code has held is found one collection later
        gc.collect()
    return sum(ref() is not None for ref in engines), sum(ref() is not None for ref in models)

Engine.__init__ = watched
"""
# A cell fails in each of these ways before the trainings whose results are compared.
FAILURES = """
assert cell("refused", "zero2", "--lr", "0") == 2
assert cell("refused", "zero2", "--base_ckpt", "no-such-base") == 2

step = Engine.train_step

def failing(self, batches):
    step(self, batches)
    raise ValueError("planned")

def interrupted(self, batches):
    step(self, batches)
    raise KeyboardInterrupt

def signalled(self, batches):
    os.kill(os.getpid(), signal.SIGINT)
    return step(self, batches)

def raised(stage, error):
    try:
        cell(f"failed-{stage}-{error.__name__}", stage)
    except error:
        return True

for stage in STAGES:
    Engine.train_step = failing
    assert raised(stage, ValueError)
    Engine.train_step = interrupted
    assert raised(stage, KeyboardInterrupt)
    Engine.train_step = signalled
    assert cell(f"stopped-{stage}", stage) == 6
Engine.train_step = step
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""


def run_cells(code: str, folder: Path) -> list[str]:
    """Run code after CELLS in one new process. Return the lines that it prints."""
    done = run_code(f"OPTIONS = {OPTIONS}\nSTAGES = {STAGES}\n{CELLS}\n{code}", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Of the adapter. Files are not compared: safetensors writes the keys of their metadata in any order."""
    return load_file(run / "lora_adapters" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Adapters of each kind of training in a process of its own."""
    folder = tmp_path_factory.mktemp("fresh")
    for stage in STAGES:
        run_cells(f"assert cell('{stage}', '{stage}') == 0", folder)
    return {stage: tensors(folder / stage) for stage in STAGES}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in found.items() if "lora_B" in name)  # it has learned


def test_after_each_kind_of_failure_a_training_equals_one_of_its_own_process(
    fresh: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    run_cells(FAILURES + "for stage in STAGES:\n    assert cell(stage, stage) == 0", tmp_path)
    for stage in STAGES:
        assert_equal(tensors(tmp_path / stage), fresh[stage])
    assert not (tmp_path / "refused").exists()
    assert not list(tmp_path.rglob(".lock"))


def test_after_other_trainings_a_training_equals_one_of_its_own_process(
    fresh: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    order = ["zero3", "zero2", "none", "zero2", "zero3"]
    run_cells(f"for i, stage in enumerate({order}):\n    assert cell(str(i), stage) == 0", tmp_path)
    for i, stage in enumerate(order):
        assert_equal(tensors(tmp_path / str(i)), fresh[stage])


def test_a_stopped_training_resumes_in_the_same_process(
    fresh: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    stop = FAILURES.replace("for stage in STAGES:", "for stage in ():") + (
        "Engine.train_step = signalled\nassert cell('run', 'zero2') == 6\nEngine.train_step = step\n"
        "assert cell('run', 'zero2', '--resume', 'auto') == 0\n"
    )
    run_cells(stop, tmp_path)
    assert_equal(tensors(tmp_path / "run"), fresh["zero2"])
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["finished"] is True


@pytest.mark.parametrize("failures", ["", FAILURES], ids=["complete", "failed"])
def test_no_engine_and_no_weight_outlives_its_training(failures: str, tmp_path: Path) -> None:
    """A second cell with a model that fills half of a GPU must have room."""
    code = f"STAGES = ('zero2', 'none')\n{failures}\nfor stage in STAGES:\n    assert cell(stage, stage) == 0\n"
    *_, line = run_cells(f"{code}\nprint(len(engines), *alive())", tmp_path)
    assert line == ("8 0 0" if failures else "2 0 0")
