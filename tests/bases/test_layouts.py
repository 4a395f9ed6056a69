"""A base in the original layout trains like the native one, and the output has the requested layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import PROJECT, processor_in
from launcher import train_runs
from safetensors.torch import load_file
from transformers import AutoProcessor

from higgs_ds.adapters.merge import merge
from higgs_ds.bases.conversion import rewrite, stored_tensors
from higgs_ds.data.codec_info import find_codec
from higgs_ds.model.v2.layouts import original_name

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, base: Path) -> Path:
    """Runs from the native base, and from the original base on one rank and on two."""
    root = tmp_path_factory.mktemp("layouts")
    rewrite(base, root / "base", "original", "--base_ckpt")
    (root / "base" / "processor_config.json").unlink()  # original folders do not have it
    options = (
        f"--deepspeed {PROJECT}/ds_configs/zero2.json --precision fp32 --train_manifest {mixed_manifest} --lr 1e-3 "
        "--allow_text_targets --batch_size 1 --max_steps 2 --lora_dropout 0 --merge_adapter_with_base "
        f"--codec_ckpt {find_codec(base, None)}"
    ).split()
    native = [*options, "--base_ckpt", str(base), "--grad_accum", "2", "--output_dir"]
    original = [*options, "--base_ckpt", str(root / "base"), "--output_dir"]
    train_runs(
        1,
        [
            [*native, str(root / "native"), "--export_layout", "both"],
            [*original, str(root / "original"), "--grad_accum", "2", "--export_layout", "both"],
        ],
    )
    train_runs(2, [[*original, str(root / "two"), "--grad_accum", "1", "--cache_dir", str(root / "cache")]])
    return root


def test_same_adapters(runs: Path) -> None:
    name = "lora_adapters/adapter_model.safetensors"
    expected, found, two = (load_file(runs / run / name) for run in ("native", "original", "two"))
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    assert all((two[name] - tensor).abs().max() < 1e-5 for name, tensor in expected.items())
    assert len(list((runs / "cache" / "converted").iterdir())) == 1


def test_merged_in_each_layout(runs: Path) -> None:
    native = load_file(runs / "native" / "merged_model" / "native" / "model.safetensors")
    for folder in (runs / run / "merged_model" / "original" for run in ("native", "original")):
        assert json.loads((folder / "config.json").read_text())["model_type"] == "higgs_audio"
        found = {stored.name: stored.read() for stored in stored_tensors(folder)}
        assert {original_name(name) for name in native} == found.keys()
        assert all(tensor.equal(found[original_name(name) or ""]) for name, tensor in native.items())
        assert (folder / "tokenizer.json").is_file()


def test_merged_of_an_original_base_is_complete(runs: Path, base: Path) -> None:
    """It has a processor, which original folders do not have: that of the native base, with the training's codec."""
    folder = runs / "original" / "merged_model" / "native"
    expected, found = AutoProcessor.from_pretrained(base), processor_in(folder)
    assert found.audio_tokenizer.config.num_quantizers == 8
    values, others = expected.to_dict(), found.to_dict()
    values.pop("audio_tokenizer"), others.pop("audio_tokenizer")
    assert values == others
    chat = [{"role": "system", "content": "Speak."}, {"role": "user", "content": "Hello."}]
    assert (
        len({p.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for p in (expected, found)}) == 1
    )


def test_original_layout_alone(runs: Path, tmp_path: Path) -> None:
    merge(runs / "base", runs / "original" / "lora_adapters", tmp_path / "merged", export_layout="original")
    assert not (tmp_path / "merged" / "native").exists()
    expected = runs / "original" / "merged_model" / "original" / "model.safetensors"
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == expected.read_bytes()
