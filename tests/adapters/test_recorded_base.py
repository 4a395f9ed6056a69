"""launch/merge.py without --base_model_path: the base that the adapter names, if it is the one of its training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_ds import cli
from higgs_ds.adapters.save import AdapterFormat, trained_parameters, write_adapter
from higgs_ds.common.tensor_files import sampled_digest, weight_files


def load(folder: Path) -> HiggsAudioV2ForConditionalGeneration:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def own_base(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(small_base, tmp_path_factory.mktemp("own") / "base"))


@pytest.fixture(scope="module")
def adapter(own_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(own_base, tmp_path_factory.mktemp("adapter") / "lora_adapters", str(own_base))


def written(base: Path, folder: Path, name: str | None, is_recorded: bool = True) -> Path:
    """Write an adapter as a run does, for a base of that name."""
    torch.manual_seed(6)
    model = get_peft_model(load(base), LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    config = model.peft_config["default"]
    config.base_model_name_or_path = name
    digest = sampled_digest(weight_files(base)) if is_recorded else None
    tensors = {key: parameter.detach() for key, parameter in trained_parameters(model).items()}
    write_adapter(folder, tensors, AdapterFormat(config, base_weights=digest), must_have_moved=True)
    return folder


def merge(adapter: Path, output: Path, *more: str) -> int:
    return cli.merge(["--lora_adapter_path", str(adapter), "--output_path", str(output), *more])


def test_the_named_base(own_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are those of PEFT's merge into that base."""
    assert merge(adapter, tmp_path / "merged") == 0
    assert capsys.readouterr().out.startswith(
        f"Base: {own_base}, named by the adapter; its weights are those of the training\n"
    )
    expected = PeftModel.from_pretrained(load(own_base), adapter).merge_and_unload().state_dict()
    found = load(tmp_path / "merged").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-6)  # rounded to the base's bf16
    unknown = written(own_base, tmp_path / "unknown", str(own_base), is_recorded=False)
    assert merge(unknown, tmp_path / "also") == 0
    assert "the adapter has no record of its weights, so that they could not be compared" in capsys.readouterr().out


def test_a_base_that_has_changed(
    own_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused, unless it is given: an adapter may be merged into another base of the same shape."""
    changed = Path(shutil.copytree(own_base, tmp_path / "base"))
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    moved = Path(shutil.copytree(adapter, tmp_path / "lora_adapters"))
    rename_base(moved, str(changed))
    assert merge(moved, tmp_path / "merged") == 2
    error = capsys.readouterr().err
    assert f"{moved}: was trained on other weights than those that its base, {changed}, has now" in error
    assert "as --base_model_path" in error
    assert not (tmp_path / "merged").exists()
    assert merge(moved, tmp_path / "merged", "--base_model_path", str(changed)) == 0


def rename_base(adapter: Path, name: str | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/gone/base", "base /gone/base: no such folder (a hub id has the form OWNER/NAME)"),
        ("nobody/has-this", "base nobody/has-this: not a local folder, and not available on the hub"),
        (str(PROJECT / "docs"), "is not a model folder"),
        (None, "its adapter_config.json names no base"),
    ],
)
def test_a_base_that_cannot_be_reached(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    name: str | None, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    copy = Path(shutil.copytree(adapter, tmp_path / "lora_adapters"))
    rename_base(copy, name)
    assert merge(copy, tmp_path / "merged") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith(f"error: {copy}: ")
    assert "give the base, a folder or a hub id, as --base_model_path" in error
