"""The notebook runs from top to bottom without a GPU, and its options for a T4 fit one."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
import soundfile
import torch
from conftest import PROJECT, read_metrics
from launcher import run_script
from nbclient import NotebookClient
from safetensors.torch import load_file

from higgs_ds.bases.builtin import ASSETS
from higgs_ds.speech.measures import median_pitch_hz

pytestmark = pytest.mark.slow

NOTEBOOK = PROJECT / "notebooks" / "first_voice.ipynb"
OLD_VOICE_HZ, NEW_VOICE_HZ = 100, 150  # of the built-in base, and of its samples


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> dict[str, Any]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The empty folder in which the notebook is run."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def executed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The code cells after a run without a GPU and without a network. A cell that fails is an error here."""
    notebook, settings = read_notebook(), tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "HF_HOME"):
            patch.setenv(name, str(settings / name))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return code_cells(notebook)


def outputs(cell: Any, kind: str) -> list[str]:
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_stored_without_outputs_and_with_named_cells() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook).values())
    assert all(re.fullmatch(r"[a-z]+(-text)?", cell.id) for cell in notebook.cells)


def test_options_for_a_t4_fit_one(tmp_path: Path) -> None:
    """With the geometry of the released base, and the precision that is chosen on a T4."""
    settings = code_cells(read_notebook())["settings"].source
    options = [re.search(rf'^{name} = "+(.*?)"+$', settings, re.MULTILINE | re.DOTALL) for name in ("QLORA", "ON_GPU")]
    given = [word for found in options if found for word in found[1].split()]
    assert {"--load_in_4bit", "--sample_steps"} < set(given)
    base = ["--base_ckpt", str(PROJECT / "benchmarks" / "3b"), "--precision", "fp16"]
    done = run_script("train", [*given, *base, "--dry_run", "--device_memory_gib", "15"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^fits: [\d.]+ GiB of 15.00 GiB$", done.stdout, re.MULTILINE)


def test_what_needs_a_gpu_says_so_and_is_skipped(executed: dict[str, Any]) -> None:
    assert "need one are skipped" in printed(executed["settings"])
    assert printed(executed["clips"]).startswith("Skipped: needs a GPU.")
    assert all(cell.execution_count for cell in executed.values())


def test_shows_the_plan_the_losses_and_players(executed: dict[str, Any]) -> None:
    assert "GiB of 15.00 GiB" in printed(executed["plan"])
    assert len(outputs(executed["losses"], "image/png")) == 1
    assert [len(outputs(executed[name], "text/html")) for name in ("listen", "speak")] == [8, 1]


def test_samples_are_in_the_new_voice_and_end(executed: dict[str, Any], folder: Path) -> None:
    samples = folder / "my_voice" / "samples"
    assert {path.name for path in samples.iterdir()} == {"prompts.json", "reference", "step-0", "step-30", "step-60"}
    assert read_metrics(folder / "my_voice")[-1]["sample/stop_rate"] == 1
    for path in (*samples.glob("step-60/*.wav"), folder / "speech.wav"):
        waveform, sample_rate = soundfile.read(path, dtype="float32")
        assert median_pitch_hz(torch.from_numpy(waveform), sample_rate) > (OLD_VOICE_HZ + NEW_VOICE_HZ) / 2


def test_merged_and_zipped(executed: dict[str, Any], folder: Path) -> None:
    merged = load_file(folder / "my_voice" / "merged_model" / "model.safetensors")
    assert merged.keys() == load_file(ASSETS / "speaking-base" / "model.safetensors").keys()
    with zipfile.ZipFile(folder / "my_voice_lora_adapters.zip") as archive:
        adapter = archive.read("lora_adapters/adapter_model.safetensors")
    assert adapter == (folder / "my_voice" / "lora_adapters" / "adapter_model.safetensors").read_bytes()
    with zipfile.ZipFile(folder / "my_voice_samples.zip") as archive:
        assert {"samples/reference/0.wav", "samples/step-60/0.wav"} < set(archive.namelist())
