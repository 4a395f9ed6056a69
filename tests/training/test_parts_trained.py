"""Fully fine-tuned optional parts: changed, saved, gathered at ZeRO-3, resumed, loaded by plain PEFT, merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, VOICES, speech_sample, text_sample, whisper_folder, write_manifest
from launcher import train_runs
from peft import PeftModel
from safetensors.torch import load_file, save_file

from higgs_ds.adapters.convert import main as convert
from higgs_ds.adapters.load import read_adapter
from higgs_ds.adapters.merge import merge
from higgs_ds.bases.conversion import native_folder
from higgs_ds.common.errors import InputError
from higgs_ds.data.codec_info import find_codec
from higgs_ds.model.config import read_config
from higgs_ds.model.loading import load_base
from higgs_ds.model.parts import parts_of
from higgs_ds.model.v2.probe import all_logits
from higgs_ds.options.commands import ConvertOptions, GenerateOptions
from higgs_ds.speech.generate import main as generate

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"


def heard_sample(text: str, reference: str, clip: str) -> dict[str, object]:
    """Return a sample whose user turn has a reference clip, which the tower encodes, before the text."""
    sample = speech_sample(text, clip)
    audio = {"type": "audio", "audio_url": str(VOICES / reference)}
    sample["messages"][1]["content"] = [audio, {"type": "text", "text": text}]
    return sample


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """One training: on one rank, on two at ZeRO-3 (one of which starts without tower input), and resumed."""
    root = tmp_path_factory.mktemp("parts")
    names = ["anna_00", "anna_01", "ben_00", "ben_01", "carla_00", "carla_01", "ben_02"]
    samples = [heard_sample(name, f"{names[i - 1]}.flac", f"{name}.flac") for i, name in enumerate(names[:3])]
    samples += [speech_sample(name, f"{name}.flac") for name in names[3:]] + [text_sample("Who?", "Me.")]
    manifest = write_manifest(root / "m.jsonl", samples)
    (root / "base").mkdir()
    for path in base.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (root / "base" / path.name).write_bytes(path.read_bytes())
    # In float32, so that merged weights are not rounded.
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, root / "base" / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (root / "base" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    options = (
        f"--precision fp32 --train_manifest {manifest} --allow_text_targets --val_split 0 --batch_size 1 --lr 1e-3 "
        f"--max_steps 4 --save_steps 2 --lora_dropout 0 --base_ckpt {root}/base --codec_ckpt {find_codec(base, None)} "
        f"--bucket_size 1 --audio_self_attention --whisper_conditioning --whisper_ckpt {root}/whisper"
    ).split()
    whisper_folder(root / "whisper")

    def run(name: str, stage: int, accumulated: int, *more: str) -> list[str]:
        ds_config = f"{PROJECT}/ds_configs/zero{stage}.json"
        return [
            *options,
            "--deepspeed",
            ds_config,
            "--output_dir",
            str(root / name),
            "--grad_accum",
            str(accumulated),
            *more,
        ]

    merged = ("--merge_adapter_with_base", "--export_layout", "original")
    train_runs(
        1,
        [
            run("one", 2, 2, *merged),
            run("resumed", 0, 2, "--resume", str(root / "one" / "checkpoint-2")),
            run("in 4 bits", 2, 2, "--load_in_4bit", *merged),
        ],
    )
    train_runs(2, [run("two", 3, 1, "--activation_checkpointing", "every_layer")])
    return root


def test_parts_are_in_the_adapter_and_have_moved(runs: Path) -> None:
    tensors = load_file(runs / "one" / "lora_adapters" / WEIGHTS)
    adapter = read_adapter(runs / "one" / "lora_adapters")
    assert len(adapter.full_weights) == 2 * 5 + 39
    assert not any(".audio_attn." in name or ".audio_tower." in name for name in tensors if "lora" in name)
    whisper = load_file(runs / "whisper" / "model.safetensors")
    for name, tensor in adapter.full_weights.items():
        assert tensor.isfinite().all()
        start = whisper.get(name.replace("model.audio_tower.", "model.encoder."))
        if start is not None:
            assert not start.equal(tensor), name
        elif "o_proj" in name or "audio_encoder_proj" in name:
            assert tensor.any(), name
    earlier = load_file(runs / "one" / "checkpoint-2" / "lora_adapters" / WEIGHTS)
    assert not any(tensor.equal(earlier[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("other", ["two", "resumed"])
def test_gathered_and_resumed(runs: Path, other: str) -> None:
    expected, found = (load_file(runs / run / "lora_adapters" / WEIGHTS) for run in ("one", other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (tensor - found[name]).abs().max() < 2e-5, name


def logits(model: object, root: Path) -> torch.Tensor:
    config = read_config(root / "base")
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(200, (20,), generator=generator)
    text[2:8] = config.audio_token_id - 1
    ids = torch.cat([text, torch.full((9,), config.audio_token_id)])[None]
    codes = torch.randint(1024, (1, 9, 8), generator=generator)
    heard = {"audio_features": torch.randn(1, 16, 28, generator=generator), "feature_lengths": torch.tensor([25])}
    return all_logits(model, ids, codes, **heard)  # type: ignore[arg-type]


def test_plain_peft_and_the_merged_model_agree(runs: Path, tmp_path: Path) -> None:
    """PEFT's own loader on the extended model; the merged model, converted to the original layout and back."""
    folder = runs / "one" / "lora_adapters"
    adapter = read_adapter(folder)
    model = load_base(runs / "base", torch.float32, adapter.full.parts)
    model.make_parts(adapter.full.parts)
    loaded = PeftModel.from_pretrained(model, folder).eval().get_base_model()
    merged_folder = runs / "one" / "merged_model"
    assert json.loads((merged_folder / "config.json").read_text())["use_audio_out_self_attention"] is True
    merged = load_base(native_folder(merged_folder, "--base_ckpt", tmp_path), torch.float32).eval()
    assert parts_of(merged.config) == adapter.full.parts
    assert (logits(loaded, runs) - logits(merged, runs)).abs().max() < 1e-4


def test_parts_that_the_base_has_are_merged_into_it(runs: Path, tmp_path: Path) -> None:
    """The merged model as a base: its own parts get the adapter's values."""
    once = runs / "one" / "merged_model"
    merge(once, runs / "two" / "lora_adapters", tmp_path / "twice", export_layout="original")
    found = load_file(tmp_path / "twice" / "model.safetensors")
    for name, tensor in read_adapter(runs / "two" / "lora_adapters").full_weights.items():
        assert found[name.removeprefix("model.")].equal(tensor)


def test_parts_with_a_4_bit_base(runs: Path) -> None:
    """The parts themselves are not quantized: the merged model has the trained values."""
    adapter = read_adapter(runs / "in 4 bits" / "lora_adapters")
    assert adapter.quantization
    assert not any("audio_attn" in name or "tower" in name for name in adapter.quantization.digests)
    found = load_file(runs / "in 4 bits" / "merged_model" / "model.safetensors")
    assert all(found[name.removeprefix("model.")].equal(tensor) for name, tensor in adapter.full_weights.items())


def test_adapter_in_original_names(runs: Path, tmp_path: Path) -> None:
    convert(ConvertOptions(runs / "one" / "lora_adapters", tmp_path / "original", "original"))
    renamed, native = read_adapter(tmp_path / "original"), read_adapter(runs / "one" / "lora_adapters")
    assert renamed.in_original_names
    assert renamed.full == native.full
    assert renamed.full_weights.keys() == native.full_weights.keys()
    assert all(tensor.equal(renamed.full_weights[name]) for name, tensor in native.full_weights.items())


def test_native_layout_cannot_hold_the_parts(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no place for the model's audio self-attention, Whisper tower; give"):
        merge(runs / "base", runs / "one" / "lora_adapters", tmp_path / "merged")


def test_generates_with_the_parts(runs: Path, tmp_path: Path) -> None:
    """The adapter on its base and the merged model generate the same speech."""
    generated = []
    for name, model in {"adapter": runs / "base", "merged": runs / "one" / "merged_model"}.items():
        adapter = runs / "one" / "lora_adapters" if name == "adapter" else None
        generate(
            GenerateOptions(
                text="Hello.", base_model_path=str(model), lora_adapter_path=adapter, output=tmp_path / f"{name}.wav",
                codec_ckpt=str(find_codec(runs / "base", None)), max_new_tokens=24, temperature=0.0,
            )
        )  # fmt: skip
        generated.append((tmp_path / f"{name}.wav").read_bytes())
    assert generated[0] == generated[1]
