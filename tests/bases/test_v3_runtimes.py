"""Functions of vLLM-Omni and SGLang-Omni that need no GPU, run on a model of Higgs Audio v3 in our files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base

pytestmark = pytest.mark.slow  # downloads their wheels


def test_runtimes_accept_a_model(cache_dir: Path) -> None:
    script = PROJECT / "tests" / "v3_in_runtimes.py"
    model = builtin_base(f"{RANDOM_BASE}-v3", cache_dir)
    done = subprocess.run([sys.executable, script, model], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    prompts, vllm, sglang = done.stdout.splitlines()
    assert prompts == "prompts of vLLM-Omni, SGLang-Omni, higgs_ds are equal"
    assert vllm.endswith("none missing")
    assert sglang.startswith("SGLang-Omni's configuration (")
