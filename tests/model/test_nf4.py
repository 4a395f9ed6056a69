"""The 4-bit base: equality with transformers' own, what stays in 16 bits, its record, and the merge that uses it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, HiggsAudioV2ForConditionalGeneration

from higgs_ds.adapters.load import BaseWeights, read_adapter
from higgs_ds.adapters.merge import merge
from higgs_ds.adapters.save import AdapterFormat, write_adapter
from higgs_ds.common.errors import InputError
from higgs_ds.model import nf4
from higgs_ds.model.config import read_config
from higgs_ds.model.families import family_of
from higgs_ds.model.loading import load_base, load_base_in_4bit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quantized(base: Path) -> tuple[HiggsAudioV2ForConditionalGeneration, nf4.BaseQuantization]:
    return load_base_in_4bit(base, torch.bfloat16, CPU, CPU)


def test_equals_transformers(
    base: Path, quantized: tuple[HiggsAudioV2ForConditionalGeneration, nf4.BaseQuantization]
) -> None:
    """Every tensor and scale is bit-identical. transformers must be given the names of the heads, to skip them."""
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["audio_lm_head", "text_lm_head"],
    )
    expected = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        base, use_text_head=True, dtype=torch.bfloat16, quantization_config=options, device_map="cpu"
    ).state_dict()
    found = quantized[0].state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name
    four_bit = {name for name, module in quantized[0].named_modules() if isinstance(module, Linear4bit)}
    assert len(four_bit) == 20
    assert all(name.startswith("model.layers.") for name in four_bit)
    assert quantized[1].digests.keys() == {f"{name}.weight" for name in four_bit}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merger_rebuilds_what_the_layers_compute_with(base: Path, dtype: torch.dtype) -> None:
    model, record = load_base_in_4bit(base, dtype, CPU, CPU)
    weights = load_file(base / "model.safetensors")
    rebuilt = BaseWeights(record, dequantized=True)
    for name in record.digests:
        layer = model.get_submodule(name.removesuffix(".weight")).eval()
        seen = layer(torch.eye(layer.in_features, dtype=dtype)).T.float()  # the layer's weight, computed by its forward
        assert rebuilt.as_trained(name, weights[name]).equal(seen)
        assert not seen.equal(weights[name].float())
    assert (rebuilt.quantized, rebuilt.differing) == (20, [])
    head = weights["audio_lm_head.weight"]
    assert rebuilt.as_trained("audio_lm_head.weight", head).equal(head.float())


def test_record_notices_another_base(base: Path, tmp_path: Path) -> None:
    """The report of a merge names a changed weight. The merge completes, because another base may be intended."""
    _, record = load_base_in_4bit(base, torch.bfloat16, CPU, CPU)
    shape = (4, 256)
    factors = {
        f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{half}.weight": torch.randn(size)
        for layer in (0, 1)
        for half, size in (("A", shape), ("B", (512, 4)))
    }
    config = LoraConfig(r=4, target_modules=["mlp.up_proj"])
    write_adapter(tmp_path / "adapter", factors, AdapterFormat(config, record), must_have_moved=False)
    assert read_adapter(tmp_path / "adapter").quantization == record
    assert merge(base, tmp_path / "adapter", tmp_path / "same").differing == []

    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = 9.0
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    report = merge(other, tmp_path / "adapter", tmp_path / "else")
    assert report.differing == ["model.layers.1.self_attn.q_proj.weight"]
    assert any("1 of 20 weights quantize differently here than in training" in line for line in report.lines())

    unknown = tmp_path / "unknown"
    write_adapter(unknown, factors, AdapterFormat(config, replace(record, quant_type="fp4")), must_have_moved=False)
    with pytest.raises(InputError, match="fp4 in blocks of 64 is not supported"):
        merge(base, unknown, tmp_path / "out")


def test_base_without_a_tensor_or_with_other_shapes(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.7.mlp.up_proj.weight"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_base_in_4bit(tmp_path / "base", torch.bfloat16, CPU, CPU)
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "missing keys in its weights: model.layers.0.mlp.up_proj.weight",
        "unexpected keys in its weights: model.layers.7.mlp.up_proj.weight",
        "mismatched keys in its weights: model.norm.weight",
    ]


def test_quantized_base_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    text = (base / "config.json").read_text().replace("{", '{"quantization_config": {},', 1)
    (tmp_path / "base" / "config.json").write_text(text)
    with pytest.raises(InputError, match="its weights are quantized; give the unquantized base"):
        read_config(tmp_path / "base")


def test_offloaded_embeddings_are_looked_up_alike(base: Path) -> None:
    """They are also hidden from everything that moves, partitions or counts a model's parameters."""
    model = load_base(base, torch.float32).eval()
    ids = torch.cat([torch.arange(12), torch.full((6,), model.config.audio_token_id)])[None]
    codes = torch.randint(1024, (1, 6, 8), generator=torch.Generator().manual_seed(0))
    before = model.model(input_ids=ids, audio_input_ids=codes).last_hidden_state
    parameters = dict(model.named_parameters())
    family_of(model.config.model_type).offload_embeddings(model)
    assert model.model(input_ids=ids, audio_input_ids=codes).last_hidden_state.equal(before)
    gone = parameters.keys() - dict(model.named_parameters()).keys()
    assert gone == {"model.embed_tokens.weight", "model.embed_audio_tokens.embed_audio_tokens.weight"}
    assert not any("embed" in name for name in model.state_dict())
    moved = model.to("meta").model.embed_tokens(ids)
    assert (moved.device, moved.shape) == (CPU, (1, 18, 256))  # the table itself is not moved
