"""Files of Higgs Audio v3: several, untied heads, a codec in the same files; read, merged, and written back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT
from plain_v3 import PlainModel
from safetensors.torch import load_file, save_file

from higgs_ds.adapters.load import read_adapter
from higgs_ds.adapters.merge import merge
from higgs_ds.adapters.save import AdapterFormat, trained_parameters, write_adapter
from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base
from higgs_ds.bases.bundle import open_bundle
from higgs_ds.bases.conversion import bundled_codec, native_codec
from higgs_ds.common.errors import InputError
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data import codec_layout
from higgs_ds.data.audio import read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.model.families import native_name
from higgs_ds.model.loading import check_weights, load_base, load_base_in_4bit
from higgs_ds.model.lora import add_lora
from higgs_ds.model.sample import AudioClip
from higgs_ds.model.v3.layout import AUDIO_HEAD, CODEC_PREFIX, TEXT_HEAD
from higgs_ds.options.train import LoraOptions

NAME = f"{RANDOM_BASE}-v3"
ORIGINAL_CODEC = PROJECT / "tests" / "golden" / "original_codec"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def v3_base() -> Path:
    return builtin_base(NAME, default_cache_dir())


def released(base: Path, folder: Path, original_names: bool = False, untied: bool = False) -> Path:
    """Write the base in the form of the released one: two files with an index, in which its codec is, too."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, folder)
    tensors = load_file(base / "model.safetensors")
    of_codec = load_file(base / "audio_tokenizer" / "model.safetensors")
    if original_names:
        of_codec = torch.load(ORIGINAL_CODEC / "model.pth", weights_only=True)
    tensors |= {f"{CODEC_PREFIX}{name}": tensor.clone() for name, tensor in of_codec.items()}
    if untied:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["audio_encoder_config"]["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        draw = torch.Generator().manual_seed(5)
        tensors[f"{AUDIO_HEAD}.weight"] = torch.randn(8 * 1026, 256, generator=draw).bfloat16() / 16
        tensors[f"{TEXT_HEAD}.weight"] = torch.zeros(300, 256, dtype=torch.bfloat16)
    names = sorted(tensors)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name].contiguous() for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8"
    )
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(autouse=True)
def geometry_of_the_tiny_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values that a codec's tensors do not show, of the codec of the random base instead of the released one."""
    monkeypatch.setattr(codec_layout, "RELEASED", codec_layout.RELEASED | {"semantic_heads": 2})


@pytest.mark.parametrize("original_names", [False, True])
def test_a_bundled_codec(v3_base: Path, tmp_path: Path, original_names: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In transformers' names and in those of the first release; it gives the codes of the codec in a folder."""
    if original_names:
        config = json.loads((ORIGINAL_CODEC / "config.json").read_text(encoding="utf-8"))
        monkeypatch.setattr(codec_layout, "RELEASED", codec_layout.RELEASED | config)
    folder = released(v3_base, tmp_path / "released", original_names)
    check_weights(folder)
    found = bundled_codec(folder, CODEC_PREFIX, "--base_ckpt", tmp_path / "cache")
    assert found is not None
    assert bundled_codec(folder, CODEC_PREFIX, "--base_ckpt", tmp_path / "cache") == found  # written once
    there = native_codec(ORIGINAL_CODEC, "", tmp_path / "cache") if original_names else v3_base / "audio_tokenizer"
    waveform = read_audio(AudioClip(PROJECT / "samples" / "voices" / "anna_00.flac"), 24000)
    codes = [Codec(where, CPU).encode(waveform) for where in (found, there)]
    assert codes[0].equal(codes[1])
    if not original_names:
        assert open_bundle(str(folder), None, None, tmp_path / "cache").codec.folder == found


def test_a_damaged_bundled_codec(v3_base: Path, tmp_path: Path) -> None:
    folder = released(v3_base, tmp_path / "released")
    file = next(iter(folder.glob("model-*.safetensors")))
    tensors = {name: t for name, t in load_file(file).items() if "quantizer" not in name}
    save_file(tensors, file)
    with pytest.raises(InputError, match="its audio codec: "):
        bundled_codec(folder, CODEC_PREFIX, "--base_ckpt", tmp_path / "cache")


def test_untied_heads(v3_base: Path, tmp_path: Path) -> None:
    """The head of its own is used, the table is not; a text head, which nothing needs, is left in the files."""
    folder = released(v3_base, tmp_path / "released", untied=True)
    check_weights(folder)
    model = load_base(folder, torch.float32)
    hidden = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    head = tensors_in(folder)[f"{AUDIO_HEAD}.weight"].float()
    assert model.audio_logits(hidden).flatten(1).equal(hidden @ head.t())
    assert not any("text_head" in name for name, _ in model.named_parameters())
    in_4bit, record = load_base_in_4bit(folder, torch.float32, CPU, CPU)
    assert in_4bit.audio_logits(hidden).flatten(1).equal(hidden @ head.t())
    assert len(record.digests) == 2 * 7


def adapter_on(base: Path, folder: Path, change: float) -> Path:
    """Write an adapter of this project whose B factors are random numbers of size `change`."""
    model = add_lora(load_base(base, torch.float32), LoraOptions(), str(base), torch.float32)
    draw = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randn(p.shape, generator=draw) * (change if "lora_B" in name else 0.1)
        for name, p in trained_parameters(model).items()
    }
    write_adapter(folder, tensors, AdapterFormat(model.peft_config["default"]), must_have_moved=False)
    return folder


@pytest.mark.parametrize("untied", [False, True])
def test_there_and_back(v3_base: Path, tmp_path: Path, untied: bool) -> None:
    """A merge that changes nothing writes every tensor as it was, the codec's among them, in the same files."""
    folder = released(v3_base, tmp_path / "released", untied=untied)
    adapter = adapter_on(folder, tmp_path / "adapter", change=0.0)
    merge(folder, adapter, tmp_path / "merged")
    for path in folder.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "merged" / path.name)
        assert before.keys() == after.keys()
        assert all(t.dtype == after[name].dtype and t.equal(after[name]) for name, t in before.items())
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert open_bundle(str(tmp_path / "merged"), None, None, tmp_path / "cache").codec.num_codebooks == 8


def test_merged_as_plain_peft_adapts(v3_base: Path, tmp_path: Path) -> None:
    """Hidden states of the merged files by Qwen3Model, and of the base with the adapter by this project's model."""
    adapter = adapter_on(v3_base, tmp_path / "adapter", change=0.05)
    report = merge(v3_base, adapter, tmp_path / "merged")
    assert report.agreement is not None
    assert report.agreement.relative < 0.01
    # The names in the file are those of the modules: plain PEFT finds them in a model with released names.
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert {name.split(".layers.")[0] for name in names} == {"base_model.model.body"}
    expected = PlainModel(v3_base)
    found = PlainModel(tmp_path / "merged")
    loaded = read_adapter(adapter)
    state: dict[str, Any] = dict(expected.trunk.named_parameters())
    with torch.no_grad():
        for name in loaded.factors:
            weight = state[name.removeprefix("body.")]
            weight.copy_(loaded.merged(name, weight).bfloat16())
        ids = list(range(20))
        assert found.hidden(ids, torch.zeros(0, 8), []).equal(expected.hidden(ids, torch.zeros(0, 8), []))


def test_other_layouts_are_refused(v3_base: Path, tmp_path: Path) -> None:
    adapter = adapter_on(v3_base, tmp_path / "adapter", change=0.05)
    with pytest.raises(InputError, match="--export_layout original: Higgs Audio v3 has one layout, native"):
        merge(v3_base, adapter, tmp_path / "merged", export_layout="original")
    assert not (tmp_path / "merged").exists()
    assert native_name("body.norm.weight") == "body.norm.weight"
    with pytest.raises(KeyError):
        native_name("trunk.norm.weight")
