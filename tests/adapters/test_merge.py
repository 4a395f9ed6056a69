"""The streaming merge compared with PEFT's merge, and the input that it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, processor_in
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_ds.adapters.load import Adapter
from higgs_ds.adapters.merge import merge
from higgs_ds.common.errors import InputError, SaveError
from higgs_ds.model.lora import discover_targets
from higgs_ds.options.train import LoraOptions


def load(folder: Path, dtype: torch.dtype = torch.float32) -> HiggsAudioV2ForConditionalGeneration:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, dtype=dtype)


@pytest.fixture(scope="module")
def float_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random base in float32 and in several shards."""
    folder = tmp_path_factory.mktemp("float") / "base"
    load(base).save_pretrained(folder, max_shard_size="3MB")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def adapter(float_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on every target, with random factors, written by PEFT."""
    torch.manual_seed(3)
    model = load(float_base)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=discover_targets(model, LoraOptions().lora_targets))
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("adapter") / "lora_adapters"
    adapted.save_pretrained(folder)
    return folder


def test_equals_pefts_merge(float_base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(float_base, adapter, tmp_path / "merged")
    expected = PeftModel.from_pretrained(load(float_base), adapter).merge_and_unload().state_dict()
    found = load(tmp_path / "merged").state_dict()
    original = load(float_base).state_dict()
    assert found.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        changed += not tensor.equal(original[name])
    assert changed == 20
    assert [p.name for p in sorted((tmp_path / "merged").glob("model-*"))] == [
        p.name for p in sorted(float_base.glob("model-*"))
    ]


def random_adapter(base: Path, folder: Path, **options: object) -> Path:
    """An adapter on every target, with random numbers in every part, written by PEFT."""
    torch.manual_seed(4)
    model = load(base)
    targets = discover_targets(model, LoraOptions().lora_targets)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.2 * torch.rand(parameter.shape)
            elif parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return folder


def assert_as_peft_merges(base: Path, adapter: Path, merged: Path) -> None:
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    found = load(merged).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def biased_base(float_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose linear layers have biases, unlike the released bases."""
    folder = tmp_path_factory.mktemp("biased") / "base"
    shutil.copytree(float_base, folder, ignore=shutil.ignore_patterns("model*"))
    config = HiggsAudioV2Config.from_pretrained(float_base, attention_bias=True, mlp_bias=True)
    torch.manual_seed(5)
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}])
def test_other_kinds_of_lora(float_base: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    adapter = random_adapter(float_base, tmp_path / "adapter", **options)
    report = merge(float_base, adapter, tmp_path / "merged")
    assert_as_peft_merges(float_base, adapter, tmp_path / "merged")
    assert report.agreement.relative < 1e-5


# PEFT mistakes the biases for the empty shards of ZeRO-3.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 20 LoRA tensor:UserWarning")
def test_biases(biased_base: Path, float_base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(biased_base, tmp_path / "adapter", lora_bias=True)
    report = merge(biased_base, adapter, tmp_path / "merged")
    assert_as_peft_merges(biased_base, adapter, tmp_path / "merged")
    assert report.agreement.relative < 1e-5
    message = refusal(float_base, adapter, tmp_path / "out")
    assert message.startswith("20 problems:")
    assert "but the base's layer has none" in message


def test_self_check_sees_a_wrong_merge(
    float_base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Adapter.merged
    monkeypatch.setattr(Adapter, "merged", lambda self, name, weight: 2 * real(self, name, weight) - weight)
    with pytest.raises(SaveError, match="the merged model differs from what was trained"):
        merge(float_base, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    merge(float_base, adapter, tmp_path / "merged", verify=False)


def test_bf16_base_is_rounded_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The sum is computed in float32. Each weight is within one step of bf16 of PEFT's, which adds in another order."""
    merge(base, adapter, tmp_path / "merged")
    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].float(), tensor.bfloat16().float(), rtol=2**-7, atol=1e-6)


def test_merged_model_is_complete(base: Path, adapter: Path, tmp_path: Path) -> None:
    """It has tokenizer, template, codec and generation settings; it keeps the codec after the base's is deleted."""
    lost = tmp_path / "lost"
    codec = Path(
        json.loads((base / "processor_config.json").read_text())["audio_tokenizer"]["audio_tokenizer_name_or_path"]
    )
    shutil.copytree(base, lost / "base")
    shutil.copytree(codec, lost / "codec")
    config = json.loads((lost / "base" / "processor_config.json").read_text())
    config["audio_tokenizer"]["audio_tokenizer_name_or_path"] = str(lost / "codec")
    (lost / "base" / "processor_config.json").write_text(json.dumps(config))
    merge(lost / "base", adapter, tmp_path / "merged")
    shutil.rmtree(lost)
    processor = processor_in(tmp_path / "merged")
    assert processor.chat_template == AutoProcessor.from_pretrained(base).chat_template
    assert processor.audio_tokenizer.config.num_quantizers == 8
    assert processor.tokenizer.get_vocab() == AutoProcessor.from_pretrained(base).tokenizer.get_vocab()
    assert load(tmp_path / "merged").generation_config.max_new_tokens == 750
    again = tmp_path / "again"
    merge(tmp_path / "merged", adapter, again)  # a merged model is a base like any other
    merged_codec, codec_again = (
        load_file(where / "audio_tokenizer" / "model.safetensors") for where in (tmp_path / "merged", again)
    )
    assert all(codec_again[name].equal(tensor) for name, tensor in merged_codec.items())


def test_a_moved_model_brings_its_codec_along(base: Path, adapter: Path, tmp_path: Path) -> None:
    """In plain transformers, it gives the codes and the waveform of the base's codec."""
    merge(base, adapter, tmp_path / "merged")
    moved = tmp_path / "elsewhere" / "voice"
    moved.parent.mkdir()
    (tmp_path / "merged").rename(moved)
    assert not [path for path in moved.rglob("*.json") if str(tmp_path) in path.read_text()]
    codec, expected = processor_in(moved).audio_tokenizer, AutoProcessor.from_pretrained(base).audio_tokenizer
    waveform = torch.randn(1, 1, 24000, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        codes = expected.encode(waveform).audio_codes
        assert codec.encode(waveform).audio_codes.equal(codes)
        assert codec.decode(codes).audio_values.equal(expected.decode(codes).audio_values)
    assert load(moved).config.num_codebooks == 8


def test_no_path_of_this_machine_is_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Neither what other versions of transformers wrote, nor that of a codec that is gone; a codec's hub id stays."""
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    for name, keys in (("config.json", ["_name_or_path"]), ("tokenizer_config.json", ["name_or_path"])):
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(values | dict.fromkeys(keys, str(copy))))
    config = json.loads((copy / "processor_config.json").read_text())
    named = str(tmp_path / "gone")
    for name in (named, "owner/codec"):
        config["audio_tokenizer"]["audio_tokenizer_name_or_path"] = name
        (copy / "processor_config.json").write_text(json.dumps(config))
        if name == named:
            assert f"audio codec {named}: no such folder" in refusal(copy, adapter, tmp_path / "merged")
            merge(copy, adapter, tmp_path / "given", codec_folder=base.parent / "tiny-random-codec")
        else:
            merge(copy, adapter, tmp_path / "merged")
    written = [path for name in ("given", "merged") for path in (tmp_path / name).rglob("*.json")]
    assert not [path for path in written if str(tmp_path) in path.read_text()]
    assert processor_in(tmp_path / "given").audio_tokenizer.config.num_quantizers == 8
    of_hub = json.loads((tmp_path / "merged" / "processor_config.json").read_text())["audio_tokenizer"]
    assert of_hub["audio_tokenizer_name_or_path"] == "owner/codec"
    assert not (tmp_path / "merged" / "audio_tokenizer").exists()


def refusal(base: Path, adapter: Path, output: Path) -> str:
    with pytest.raises(InputError) as caught:
        merge(base, adapter, output)
    assert not output.exists() or not list(output.parent.glob(f".{output.name}*"))
    return str(caught.value)


def changed_adapter(adapter: Path, folder: Path, **values: object) -> Path:
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | values
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_refuses_what_is_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "checkpoint-10" / "lora_adapters")
    shutil.copytree(adapter, run / "lora_adapters")
    message = refusal(base, run / "checkpoint-10", tmp_path / "out")
    assert "is a checkpoint directory" in message
    assert str(run / "checkpoint-10" / "lora_adapters") in message
    assert str(run / "lora_adapters") in message
    assert "it holds no adapter_config.json; adapters nearby: " in refusal(base, run, tmp_path / "out")
    assert "it holds no adapter_config.json" in refusal(base, tmp_path / "none", tmp_path / "out")


def test_refuses_what_it_cannot_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = changed_adapter(adapter, tmp_path / "other", fan_in_fan_out=True, bias="all")
    message = refusal(base, other, tmp_path / "out")
    assert "fan_in_fan_out is True" in message
    assert "bias is 'all'" in message

    broken = changed_adapter(adapter, tmp_path / "broken")
    tensors = load_file(broken / "adapter_model.safetensors")
    first, second, third, *_ = [name for name in sorted(tensors) if "lora_A" in name]
    tensors[first][0, 0] = float("nan")
    tensors[second.replace("layers.0", "layers.9")] = tensors.pop(second)
    tensors[second.replace("layers.0", "layers.9").replace("_A", "_B")] = tensors.pop(second.replace("_A", "_B"))
    tensors[third] = tensors[third][:, :-1].contiguous()
    save_file(tensors, broken / "adapter_model.safetensors")
    assert f"{first} holds NaN" in refusal(base, broken, tmp_path / "out")
    tensors[first][0, 0] = 0
    save_file(tensors, broken / "adapter_model.safetensors")
    message = refusal(base, broken, tmp_path / "out")
    assert message.startswith("2 problems:")
    assert "layers.9" in message

    torn = changed_adapter(adapter, tmp_path / "torn")
    (torn / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:-100])
    assert "its adapter cannot be read" in refusal(base, torn, tmp_path / "out")


def test_refuses_bases_and_outputs(base: Path, adapter: Path, tmp_path: Path) -> None:
    codec = base.parent / "tiny-random-codec"
    assert "is an audio codec, which --codec_ckpt takes" in refusal(codec, adapter, tmp_path / "out")
    original = PROJECT / "tests" / "golden" / "released_flags"
    assert "adapts model.layers.0.self_attn.q_proj.weight as 256 x 256, but in the base it is (64, 64)" in refusal(
        original, adapter, tmp_path / "out"
    )
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").touch()
    assert "already exists" in refusal(base, adapter, occupied)
    assert "is a file, not a folder" in refusal(base, adapter, occupied / "file" / "out")


def test_failing_write_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("higgs_ds.bases.model_folder.shutil.copyfile", full)
    with pytest.raises(SaveError, match="No space left on device"):
        merge(base, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
