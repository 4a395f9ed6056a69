"""--also_train: heads and embeddings that are fully trained beside adapters, and stored with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import speech_sample, text_sample, write_manifest
from launcher import train_runs
from peft import PeftModel
from safetensors.torch import load_file
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_ds.adapters.convert import convert_adapter
from higgs_ds.adapters.load import check_fit, read_adapter
from higgs_ds.adapters.merge import merge
from higgs_ds.adapters.starting_point import starting_point
from higgs_ds.checkpoints.trained_weights import read_trained
from higgs_ds.common.errors import InputError
from higgs_ds.common.tensor_files import weight_shapes
from higgs_ds.model.loading import empty_model
from higgs_ds.model.lora import add_lora
from higgs_ds.options.checks import check_options
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.commands import GenerateOptions
from higgs_ds.options.train import LoraOptions
from higgs_ds.speech.generate import main as generate

WEIGHTS, MODEL = "adapter_model.safetensors", "model.safetensors"
HEADS = ["audio_lm_head.weight", "text_lm_head.weight"]
OWN = [*HEADS, "model.embed_audio_tokens.embed_audio_tokens.weight", "model.embed_tokens.weight"]
BOTH = "--also_train heads embeddings"


def load(folder: Path) -> HiggsAudioV2ForConditionalGeneration:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def float_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random base in float32, so that merged weights are not rounded."""
    folder = tmp_path_factory.mktemp("float") / "base"
    shutil.copytree(base, folder)
    load(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, float_base: Path, ds_file: Callable[[int], Path]) -> Path:
    """One training on one rank, resumed, on two ranks at each stage, in 4 bits; and one step of several kinds."""
    root = tmp_path_factory.mktemp("also")
    clips = [speech_sample(f"Clip {i}.", f"anna_0{i}.flac", duration=0.3 + i / 10) for i in range(3)]
    manifest = write_manifest(root / "m.jsonl", [*clips, text_sample("Who?", "Me.")])

    def run(name: str, stage: int, accumulated: int, more: str) -> list[str]:
        line = (
            f"--precision fp32 --base_ckpt {float_base} --train_manifest {manifest} --allow_text_targets --val_split 0 "
            f"--batch_size 1 --bucket_size 1 --lr 1e-3 --save_steps 2 --grad_accum {accumulated} "
            f"--deepspeed {ds_file(stage)} --output_dir {root / name} {more}"
        )
        return line.split()

    steps = f"--max_steps 4 --lora_dropout 0 --lora_targets attention {BOTH}"
    one_step = "--max_steps 1 --warmup_ratio 0 --max_grad_norm 0"
    still = "--max_steps 1 --lr 1e-30"  # too small a rate to change any bit
    train_runs(
        1,
        [
            run("alone", 0, 2, f"{steps} --merge_adapter_with_base"),
            run("resumed", 0, 2, f"{steps} --resume {root}/alone/checkpoint-2"),
            run("four_bit", 2, 2, f"{steps} --load_in_4bit --merge_adapter_with_base"),
            run("beside", 1, 2, f"{one_step} {BOTH}"),
            run("heads", 1, 2, f"{one_step} --also_train heads"),
            run("full", 1, 2, f"{one_step} --finetune full --train_groups heads embeddings"),
            run("further", 2, 2, f"{still} --init_from {root}/heads"),
            run("more", 0, 2, f"{still} --init_from {root}/heads {BOTH}"),
        ],
    )
    train_runs(2, [run(f"stage_{stage}", stage, 1, steps) for stage in range(4)])
    return root


@pytest.mark.slow
def test_first_step_is_that_of_full_fine_tuning(runs: Path) -> None:
    """Adapters do not change the outputs before the first step, so both have the same gradients."""
    masters, _ = read_trained(runs / "full" / "checkpoint-1")
    trained = read_adapter(runs / "beside" / "lora_adapters").full_weights
    assert sorted(trained) == sorted(OWN)
    for name, weight in trained.items():
        torch.testing.assert_close(weight, masters[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_heads_alone(runs: Path, float_base: Path) -> None:
    adapter = read_adapter(runs / "heads" / "lora_adapters")
    assert (str(adapter.full), sorted(adapter.full_weights)) == ("heads", HEADS)
    weights = load_file(float_base / MODEL)
    assert all(not tensor.equal(weights[name]) for name, tensor in adapter.full_weights.items())


@pytest.mark.slow
def test_from_an_adapter_with_heads(runs: Path, float_base: Path) -> None:
    """They are trained further without being named; embeddings that are trained as well begin with the base's."""
    expected, further, more = (read_adapter(runs / run / "lora_adapters") for run in ("heads", "further", "more"))
    assert expected.tensors().keys() == further.tensors().keys()
    assert all(tensor.equal(further.tensors()[name]) for name, tensor in expected.tensors().items())
    weights = load_file(float_base / MODEL)
    assert sorted(more.full_weights) == sorted(OWN)
    for name, tensor in more.full_weights.items():
        assert tensor.equal(expected.full_weights.get(name, weights[name]))


@pytest.mark.slow
def test_heads_of_an_adapter_must_not_be_left_out(runs: Path) -> None:
    options, given = parse_train_options(f"--init_from {runs}/heads --also_train embeddings".split())
    with pytest.raises(InputError, match="holds trained heads, but --also_train embeddings is given; name them, too"):
        starting_point(options, given)


@pytest.mark.slow
def test_resumed_to_the_last_bit(runs: Path) -> None:
    expected, found = (load_file(runs / run / "lora_adapters" / WEIGHTS) for run in ("alone", "resumed"))
    assert expected.keys() == found.keys()
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_the_same_on_two_ranks(runs: Path, stage: int) -> None:
    expected, found = (load_file(runs / run / "lora_adapters" / WEIGHTS) for run in ("alone", f"stage_{stage}"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_plain_peft_loads_what_is_merged(runs: Path, float_base: Path) -> None:
    adapter = runs / "alone" / "lora_adapters"
    expected = PeftModel.from_pretrained(load(float_base), adapter).merge_and_unload().state_dict()
    for name, tensor in load_file(runs / "alone" / "merged_model" / MODEL).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_beside_a_base_in_4_bits(runs: Path) -> None:
    adapter = read_adapter(runs / "four_bit" / "lora_adapters")
    assert adapter.quantization
    merged = load_file(runs / "four_bit" / "merged_model" / MODEL)
    assert sorted(adapter.full_weights) == sorted(OWN)
    assert all(merged[name].equal(tensor) for name, tensor in adapter.full_weights.items())


@pytest.mark.slow
def test_in_the_original_layout(runs: Path, float_base: Path, tmp_path: Path) -> None:
    """There and back nothing changes, and the names in the configuration are those that PEFT looks for."""
    native = runs / "alone" / "lora_adapters"
    convert_adapter(native, tmp_path / "original", "original")
    convert_adapter(tmp_path / "original", tmp_path / "native", "native")
    config = json.loads((tmp_path / "original" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == [
        "audio_codebook_embeddings", "audio_decoder_proj.audio_lm_head", "audio_decoder_proj.text_lm_head",
        "embed_tokens",
    ]  # fmt: skip
    expected, found = (load_file(folder / WEIGHTS) for folder in (native, tmp_path / "native"))
    assert expected.keys() == found.keys()
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    merge(float_base, tmp_path / "original", tmp_path / "merged")
    expected, found = (load_file(folder / MODEL) for folder in (runs / "alone" / "merged_model", tmp_path / "merged"))
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_speaks_as_the_merged_model(runs: Path, float_base: Path, tmp_path: Path) -> None:
    codec = json.loads((float_base / "processor_config.json").read_text())["audio_tokenizer"][
        "audio_tokenizer_name_or_path"
    ]
    for name, model, adapter in (
        ("adapter", float_base, runs / "alone" / "lora_adapters"),
        ("merged", runs / "alone" / "merged_model", None),
    ):
        generate(
            GenerateOptions(
                text="Hello.", base_model_path=str(model), lora_adapter_path=adapter, output=tmp_path / f"{name}.wav",
                codec_ckpt=codec, max_new_tokens=24, temperature=0.0,
            )
        )  # fmt: skip
    assert (tmp_path / "adapter.wav").read_bytes() == (tmp_path / "merged.wav").read_bytes()


@pytest.mark.slow
def test_card(runs: Path) -> None:
    card = (runs / "alone" / "lora_adapters" / "README.md").read_text()
    assert "; fully fine-tuned: heads, embeddings." in card


@pytest.mark.slow
def test_another_base_is_refused(runs: Path, float_base: Path) -> None:
    folder = runs / "heads" / "lora_adapters"
    shapes = weight_shapes([float_base / MODEL])
    rows, width = shapes["text_lm_head.weight"]
    with pytest.raises(InputError) as caught:
        check_fit(read_adapter(folder), shapes | {"text_lm_head.weight": (rows + 1, width)}, folder, float_base)
    assert f"holds text_lm_head.weight as {(rows, width)}, but in the base it is {(rows + 1, width)}" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--also_train embeddings --offload_embeddings", "trained embeddings cannot be in host memory"),
        ("--also_train heads --finetune full", "--also_train: only applies to adapters"),
    ],
)
def test_what_does_not_go_together(options: str, problem: str) -> None:
    (found,) = check_options(parse_train_options(options.split())[0])
    assert problem in found


def test_a_weight_of_two_groups_needs_both(base: Path) -> None:
    """No released model shares the head's weight with the embeddings, but a model of this class can."""
    model = empty_model(HiggsAudioV2Config.from_pretrained(base), torch.float32)
    model.text_lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(InputError, match="--also_train: the base shares one weight between two groups"):
        add_lora(model, LoraOptions(also_train=("heads",)), "", torch.float32)
