"""Both layouts, read and written: the original runtime's numbers, round trips, and every form of model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from higgs_ds.adapters.convert import main as convert
from higgs_ds.adapters.load import read_adapter
from higgs_ds.adapters.merge import merge
from higgs_ds.bases import conversion
from higgs_ds.bases.bundle import open_bundle
from higgs_ds.bases.conversion import native_codec, native_folder, rewrite, stored_tensors
from higgs_ds.common import tensor_files as shards
from higgs_ds.common.errors import InputError
from higgs_ds.data.codec import Codec
from higgs_ds.data.codec_info import read_codec_info
from higgs_ds.model.config import read_config
from higgs_ds.model.loading import check_weights, load_base, load_base_in_4bit
from higgs_ds.model.lora import discover_targets
from higgs_ds.model.v2.layouts import DUPLICATE_HEADS, native_name, original_name
from higgs_ds.model.v2.stream import FramedStream
from higgs_ds.options.commands import ConvertOptions
from higgs_ds.options.train import LoraOptions

GOLDEN = PROJECT / "tests" / "golden"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {stored.name: stored.read() for stored in stored_tensors(folder)}


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    assert all(tensor.dtype == found[name].dtype and tensor.equal(found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["released_flags", "audio_attention", "whisper_tower"])
def test_logits_of_the_original_runtime(name: str, tmp_path: Path) -> None:
    original = GOLDEN / name
    folder = native_folder(original, "--base_ckpt", tmp_path)
    model = load_base(folder, torch.float32).eval()
    inputs, expected = load_file(original / "inputs.safetensors"), load_file(original / "expected.safetensors")
    config = read_config(original)
    stream = FramedStream(config.num_codebooks, config.audio_stream_bos_id, config.audio_stream_eos_id)
    rows = torch.cat([stream.delay(inputs[name]) for name in ("reference_codes", "target_codes")])
    there = expected["attention_mask"][0].bool()  # the original pads on the left
    ids = expected["expanded_input_ids"][:, there]
    is_target = expected["audio_out_mask"][:, there]
    ids[expected["audio_in_discrete_codes_mask"][:, there] | is_target] = config.audio_token_id
    mask = torch.ones(1, len(rows), dtype=torch.bool)
    heard = {}
    if name == "whisper_tower":
        model.model.audio_tower.config._attn_implementation = "eager"  # as for the golden numbers
        lengths = inputs["audio_feature_attention_mask"].sum(1)
        heard = {"audio_features": inputs["audio_features"], "feature_lengths": lengths}
    with torch.no_grad():
        outputs = model.model(input_ids=ids, audio_input_ids=rows[None], audio_input_ids_mask=mask, **heard)
        hidden = outputs.last_hidden_state
        audio = model.audio_lm_head(hidden)[is_target].view(-1, config.num_codebooks, 66)
        assert (model.text_lm_head(hidden) - expected["text_logits"][:, there]).abs().max() < 1e-4
        assert (audio - expected["audio_logits"]).abs().max() < 1e-4
    assert native_folder(original, "--base_ckpt", tmp_path) == folder  # written once
    assert native_folder(folder, "--base_ckpt", tmp_path) == folder


@pytest.mark.parametrize("name", ["released_flags", "audio_attention", "whisper_tower"])
def test_original_there_and_back(name: str, tmp_path: Path) -> None:
    """With the saved original configuration, and with one that is derived from the native one."""
    original = GOLDEN / name
    convert(ConvertOptions(original, tmp_path / "native", "native"))
    convert(ConvertOptions(tmp_path / "native", tmp_path / "back", "original"))
    (tmp_path / "native" / conversion.SAVED_ORIGINAL_CONFIG).unlink()
    convert(ConvertOptions(tmp_path / "native", tmp_path / "derived", "original"))
    for folder in ("back", "derived"):
        assert_same(load_file(original / "model.safetensors"), load_file(tmp_path / folder / "model.safetensors"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "back")]
    assert configs[0] == configs[1]
    assert read_config(tmp_path / "derived").to_dict() == read_config(tmp_path / "native").to_dict()


def test_native_there_and_back(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several files. Every configuration value that the model reads is unchanged after the round trip."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 3_000_000)
    convert(ConvertOptions(base, tmp_path / "original", "original"))
    assert len(list((tmp_path / "original").glob("model-*.safetensors"))) > 3
    assert not any(name.startswith("model.") for name in tensors_of(tmp_path / "original"))
    convert(ConvertOptions(tmp_path / "original", tmp_path / "back", "native"))
    assert_same(tensors_of(base), tensors_of(tmp_path / "back"))
    before, after = (read_config(folder).to_dict() for folder in (base, tmp_path / "back"))
    assert {key: value for key, value in before.items() if after.get(key) != value} == {}
    bundle = open_bundle(str(tmp_path / "original"), None, None, tmp_path / "cache")
    assert_same(tensors_of(base), tensors_of(bundle.folder))
    assert bundle.tokenizer.get_vocab() == open_bundle(str(base), None, None, tmp_path).tokenizer.get_vocab()


FORMS = ["bin", "old bin", "pth", "sharded bin"]


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        *(("native", form) for form in [*FORMS, "leftovers"]),
        *(("original", form) for form in [*FORMS, "parts", "buffers"]),
    ],
)
def test_forms_of_folders(base: Path, tmp_path: Path, layout: str, form: str) -> None:
    """Every form of folder gives the same tensors, and loads."""
    folder, expected = tmp_path / "folder", tensors_of(base)
    if layout == "native":
        shutil.copytree(base, folder)
    else:
        rewrite(base, folder, "original", "--base_ckpt")
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    if form in ("bin", "old bin"):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    elif form == "pth":
        torch.save(tensors, folder / "model.pth")
    elif form == "sharded bin":
        names = sorted(tensors)
        files = {name: f"pytorch_model-{1 + (i > 9):05d}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        if form == "leftovers":
            tensors |= {name: tensors[native_name(name)].clone() for name in DUPLICATE_HEADS}
        elif form == "parts":
            for name, kind in (("embed_tokens", "embedding"), ("audio_decoder_proj.text_lm_head", "linear")):
                weight = tensors.pop(f"{name}.weight")
                tensors[f"{name}.{kind}_trainable.weight"] = weight[200:].clone()
                tensors[f"{name}.{kind}_frozen.weight"] = weight[:200].clone()
        else:
            tensors["audio_codebook_weights"] = torch.ones(8)
            tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = native_folder(folder, "--base_ckpt", tmp_path / "cache")
    loaded = load_base(found, torch.bfloat16)
    assert_same(expected, {name: loaded.state_dict()[name] for name in expected})
    in_4bit, _ = load_base_in_4bit(found, torch.float32, torch.device("cpu"), torch.device("cpu"))
    assert in_4bit.text_lm_head.weight.equal(expected["text_lm_head.weight"].float())


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = load_base(base, torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=12, target_modules=discover_targets(model, LoraOptions().lora_targets))
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapter_in_original_names_has_the_same_effect(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Add the renamed factors to original weights by hand; compare with the native merge converted to that layout."""
    convert(ConvertOptions(adapter, tmp_path / "renamed", "original"))
    convert(ConvertOptions(base, tmp_path / "original", "original"))
    merge(base, adapter, tmp_path / "merged")
    convert(ConvertOptions(tmp_path / "merged", tmp_path / "expected", "original"))
    expected, weights = tensors_of(tmp_path / "expected"), tensors_of(tmp_path / "original")
    factors = load_file(tmp_path / "renamed" / "adapter_model.safetensors")
    changed = 0
    for name, weight in weights.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in factors:
            a, b = (factors.pop(f"{prefix}.lora_{side}.weight") for side in "AB")
            weight = (weight.float() + 3 * b @ a).to(weight.dtype)
            changed += 1
        torch.testing.assert_close(weight, expected[name], rtol=2**-7, atol=1e-6)  # one rounding to bf16, up or down
    assert changed == 20
    assert not factors
    convert(ConvertOptions(tmp_path / "renamed", tmp_path / "back", "native"))
    assert_same(*(load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back")))


def test_adapter_in_original_names_is_read(base: Path, adapter: Path, tmp_path: Path) -> None:
    """An adapter as other trainers write it merges to the same weights as the native one."""
    convert(ConvertOptions(adapter, tmp_path / "renamed", "original"))
    native, renamed = read_adapter(adapter), read_adapter(tmp_path / "renamed")
    assert native.factors.keys() == renamed.factors.keys()
    for folder in (adapter, tmp_path / "renamed"):
        merge(base, folder, tmp_path / f"merged-{folder.name}")
    assert_same(tensors_of(tmp_path / "merged-adapter"), tensors_of(tmp_path / "merged-renamed"))


def test_names_go_both_ways(base: Path) -> None:
    for name in tensors_of(base):
        assert native_name(original_name(name) or "") == name
    with pytest.raises(KeyError):
        native_name("audio_out_embed_projector.weight")
    with pytest.raises(KeyError):
        original_name("lm_head.weight")


def changed_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


FOREIGN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (lambda f: [path.unlink() for path in f.iterdir() if path.is_file()], ["has no config.json"]),
    "torn config": (lambda f: (f / "config.json").write_text("{"), ["its config.json is not a JSON object"]),
    "another family": (lambda f: changed_config(f, model_type="llama"), ["model_type is 'llama'", "higgs_audio_v2"]),
    "a codec": (
        lambda f: changed_config(f, model_type="higgs_audio_v2_tokenizer"), ["is an audio codec", "--codec_ckpt"],
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ["is an adapter; give the base"]),
    "a run": (
        lambda f: ((f / "config.json").unlink(), (f / "checkpoint-7").mkdir()), ["it holds checkpoints of a run"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["missing model.safetensors"]),
    "half of the shards": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
        ), ["missing model-2.safetensors"],
    ),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        ["not a safetensors file, or damaged"],
    ),
    "another codebook size": (
        lambda f: changed_config(f, codebook_size=514, audio_stream_bos_id=512, audio_stream_eos_id=513),
        ["codebook_size 514", "does not fit the codec's 1024 codes"],
    ),
    "another number of codebooks": (lambda f: changed_config(f, num_codebooks=4), ["has 8 codebooks", "uses 4"]),
    "no text head": (lambda f: without(f, "text_lm_head.weight"), ["holds no text_lm_head.weight"]),
    "no audio head": (lambda f: without(f, "audio_lm_head.weight"), ["missing keys in its weights: audio_lm_head"]),
    "original, another adapter": (
        lambda f: changed_config(f, model_type="higgs_audio", audio_adapter_type="stack"), ["is 'stack', not dual_ffn"],
    ),
    "original, no delay": (
        lambda f: changed_config(f, model_type="higgs_audio", use_delay_pattern=False),
        ["use_delay_pattern is False; this trainer supports only True"],
    ),
}  # fmt: skip


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_folders(base: Path, tmp_path: Path, kind: str) -> None:
    """The error names the folder and the problem, before any weight is loaded."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    spoil, words = FOREIGN[kind]
    spoil(folder)
    with pytest.raises(InputError) as caught:
        check_weights(open_bundle(str(folder), None, None, tmp_path).folder)
    assert str(folder) in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_original_codec(tmp_path: Path) -> None:
    """Converted from the original codec file, it gives the codes and the waveform of the original runtime."""
    original = GOLDEN / "original_codec"
    folder = native_codec(original, "--codec_ckpt", tmp_path)
    expected, codec = load_file(original / "expected.safetensors"), Codec(folder, torch.device("cpu"))
    assert codec.encode(expected["waveform"]).equal(expected["codes"])
    assert (codec.decode(expected["codes"]) - expected["decoded"][0, 0]).abs().max() < 1e-5
    assert read_codec_info(folder).num_frames(len(expected["waveform"])) == expected["codes"].shape[1]
    assert native_codec(original, "--codec_ckpt", tmp_path) == folder == native_codec(folder, "--codec_ckpt", tmp_path)


def without_tensor(path: Path, name: str) -> None:
    tensors = torch.load(path, weights_only=True)
    del tensors[name]
    torch.save(tensors, path)


BAD_CODECS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.pth").unlink(), "missing model.pth"),
    "cut off": (
        lambda f: (f / "model.pth").write_bytes((f / "model.pth").read_bytes()[:-99]), "is not a file of weights",
    ),
    "no quantizer": (
        lambda f: without_tensor(f / "model.pth", "quantizer.vq.layers.0._codebook.embed"), "missing 'quantizer.vq",
    ),
    "a codebook less": (
        lambda f: without_tensor(f / "model.pth", "quantizer.vq.layers.7._codebook.embed"),
        "contains 7 codebooks, but the target_bandwidths",
    ),
    "no decoder's end": (
        lambda f: without_tensor(f / "model.pth", "decoder_2.model.7.bias"),
        "missing tensors: acoustic_decoder.conv2.bias",
    ),
    "no ratios": (
        lambda f: (f / "config.json").write_text('{"semantic_techer": "hubert_base_general"}'),
        "config.json has no ratios, sample_rate, target_bandwidths, bins",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_CODECS)
def test_damaged_original_codecs(kind: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "original_codec", tmp_path / "codec"))
    spoil, words = BAD_CODECS[kind]
    spoil(folder)
    with pytest.raises(InputError) as caught:
        native_codec(folder, "--codec_ckpt", tmp_path)
    assert str(folder) in str(caught.value)
    assert words in str(caught.value), caught.value
    assert not list(tmp_path.glob("converted/*"))


def test_a_base_given_as_codec(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--codec_ckpt {base}: model_type is 'higgs_audio_v2'; an audio codec has"):
        open_bundle(str(base), None, str(base), tmp_path)


def test_a_checkpoint_given_as_adapter(base: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(InputError, match="is a checkpoint directory"):
        read_adapter(tmp_path / "checkpoint-4")


def test_refuses_what_is_there_or_needs_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is already in the native layout"):
        convert(ConvertOptions(base, tmp_path / "new", "native"))
    with pytest.raises(InputError, match="is already in the native layout"):
        convert(ConvertOptions(adapter, tmp_path / "new", "native"))
    with pytest.raises(InputError, match="already exists"):
        convert(ConvertOptions(base, adapter, "original"))
    assert not (tmp_path / "new").exists()
