"""Full fine-tuning: against a plain torch loop, over ranks and stages, after a resume, and as a saved model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import processor_in, read_metrics, speech_sample, text_sample, write_manifest
from launcher import TRAIN, kill_after_step, start_ranks, train_runs
from plain_training import load, plain_steps, windows_of
from safetensors.torch import load_file

from higgs_ds.bases.bundle import open_bundle
from higgs_ds.checkpoints.complete import main as export
from higgs_ds.checkpoints.inspection import find_adapters, validate_checkpoint
from higgs_ds.common.errors import InputError
from higgs_ds.data.codec import Codec
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.model.full import group_of
from higgs_ds.model.v2.layouts import original_name
from higgs_ds.options.commands import ExportOptions, InspectOptions
from higgs_ds.options.fields import TRAIN_GROUPS
from higgs_ds.options.train import DataOptions
from higgs_ds.speech.generate import generation_settings, speak

pytestmark = pytest.mark.slow

STEPS, LR, DECAY = 4, 3e-5, 0.1
MASTERS = "trained_weights/model.safetensors"
# Ranks, DeepSpeed file, batch size, accumulation; the others are compared with the first one.
SPREAD = {
    "alone": (1, "zero0", 1, 4),
    "stage 0": (2, "zero0", 1, 2),
    "stage 1": (2, "zero1", 2, 1),
    "stage 2": (2, "zero2", 1, 2),
    "stage 3": (2, "zero3", 1, 2),
    "stage 2, offloaded": (2, "zero2_offload", 1, 2),
    "stage 3, offloaded": (2, "zero3_offload", 1, 2),
}
MORE = {
    "stage 3": "--activation_checkpointing every_layer --offload_checkpoints",
    "alone": "--sample_steps 4 --num_samples 3 --export_layout both",
}


@pytest.fixture(scope="module")
def float_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random base with float32 weights, in two files."""
    folder = tmp_path_factory.mktemp("float") / "base"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    load(base).save_pretrained(folder, max_shard_size="10MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def options(float_base: Path, ds_files: Path, mixed_manifest: Path) -> Options:
    def make(folder: Path, ds_name: str, batch_size: int, grad_accum: int, more: str = "") -> list[str]:
        return (
            f"--finetune full --deepspeed {ds_files}/{ds_name}.json --output_dir {folder} --precision fp32 "
            f"--base_ckpt {float_base} --train_manifest {mixed_manifest} --val_manifest {mixed_manifest} "
            f"--allow_text_targets --batch_size {batch_size} --grad_accum {grad_accum} --max_steps {STEPS} --lr {LR} "
            f"--lr_scheduler_type constant --weight_decay {DECAY} --log_steps 1 --val_steps 2 --save_steps 2 {more}"
        ).split()

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, options: Options) -> Path:
    """Finished runs, named as in SPREAD."""
    root = tmp_path_factory.mktemp("full")
    for ranks in (1, 2):
        train_runs(
            ranks,
            [
                options(root / name.replace(" ", "-"), ds_name, size, accum, MORE.get(name, ""))
                for name, (here, ds_name, size, accum) in SPREAD.items()
                if here == ranks
            ],
        )
    return root


def folder_of(runs: Path, name: str) -> Path:
    return runs / name.replace(" ", "-")


def losses_of(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


@pytest.mark.parametrize("name", [name for name in SPREAD if name != "alone"])
def test_same_losses_and_weights(runs: Path, name: str) -> None:
    reference, other = folder_of(runs, "alone"), folder_of(runs, name)
    expected = [line for line in read_metrics(reference) if "sample/stop_rate" not in line]
    found = read_metrics(other)
    assert [line["step"] for line in expected] == [1, 2, 2, 3, 4, 4]
    for expected_line, found_line in zip(expected, found, strict=True):
        losses = [key for key in expected_line if "loss" in key]
        assert len(losses) == 11
        for key in losses:
            assert found_line[key] == pytest.approx(expected_line[key], abs=1e-5), (expected_line["step"], key)
        if "grad_norm" in expected_line:
            assert found_line["grad_norm"] == pytest.approx(expected_line["grad_norm"], rel=1e-4)
    assert_close(load_file(reference / f"checkpoint-4/{MASTERS}"), load_file(other / f"checkpoint-4/{MASTERS}"))


def assert_close(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-5, name


@pytest.mark.usefixtures("lone_rank")
def test_a_loop_of_plain_torch(runs: Path, float_base: Path, mixed_manifest: Path, cache_dir: Path) -> None:
    """transformers' model, torch's AdamW and cross entropy: within a part, all targets of a step weigh the same."""
    model = load(float_base).train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    losses = plain_steps(model, windows_of(float_base, mixed_manifest, cache_dir, STEPS), optimizer, [1.0] * STEPS)
    run = folder_of(runs, "alone")
    assert losses_of(run) == pytest.approx(losses, abs=1e-5)
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert all((expected[name] - tensor).abs().max() > 1e-5 for name, tensor in start.items())
    found = {}
    for path in (run / "final_model" / "native").glob("*.safetensors"):
        found |= load_file(path)
    assert_close(expected, found)


def test_saved_model_says_the_same(runs: Path, mixed_manifest: Path, tmp_path: Path) -> None:
    """Plain transformers, greedy, from the prompts of the model in training."""
    run = folder_of(runs, "alone")
    folder = run / "final_model" / "native"
    model = load(folder)
    processor = processor_in(folder)
    assert processor.tokenizer.chat_template or processor.chat_template
    assert (folder / "audio_tokenizer" / "config.json").is_file()
    assert model.generation_config.max_new_tokens == 750
    words = json.loads((run / "samples" / "prompts.json").read_text())
    samples = [e.sample for e in read_entries(mixed_manifest, DataOptions(allow_text_targets=True)) if e.sample]
    bundle = open_bundle(str(folder), None, None, tmp_path)
    codec = Codec(bundle.codec.folder, torch.device("cpu"))
    compared = 0
    for number, text in enumerate(words):
        (sample,) = [s for s in samples if s.messages[-2].parts == (text,) and len(s.clips) == 1]
        frames = soundfile.info(run / "samples" / "reference" / f"{number}.wav").frames // 960
        settings = generation_settings(0.0) | {"max_new_tokens": 2 * frames + 25}
        speech = speak(model, bundle, list(sample.messages[:-1]), [], settings)
        path = run / "samples" / "step-4" / f"{number}.wav"
        assert path.is_file() == bool(speech.codes.shape[1])
        if speech.codes.shape[1]:
            found = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            expected = codec.decode(speech.codes.clamp(max=1023)).clamp(-1, 1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            compared += 1
    assert compared


def test_in_the_original_layout(runs: Path) -> None:
    final = folder_of(runs, "alone") / "final_model"
    native, original = (
        {name: tensor for path in (final / layout).glob("*.safetensors") for name, tensor in load_file(path).items()}
        for layout in ("native", "original")
    )
    assert {original_name(name) for name in native} == original.keys()
    assert all(tensor.equal(original[original_name(name) or ""]) for name, tensor in native.items())
    assert json.loads((final / "original" / "config.json").read_text())["model_type"] == "higgs_audio"


def test_exported_by_hand(runs: Path, float_base: Path, tmp_path: Path) -> None:
    """The last checkpoint exports to the model that the run wrote; another base, or folder, is refused."""
    run = folder_of(runs, "stage 3")
    export(ExportOptions(run / "checkpoint-4", tmp_path / "model"))
    for path in (run / "final_model").glob("*.safetensors"):
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()
    export(ExportOptions(run / "checkpoint-2", tmp_path / "earlier", str(float_base), "original"))
    assert json.loads((tmp_path / "earlier" / "config.json").read_text())["model_type"] == "higgs_audio"
    for options, words in (
        (ExportOptions(run / "checkpoint-4", tmp_path / "other", "tiny-random-base"), "is not the base that"),
        (ExportOptions(run, tmp_path / "other"), "holds no trained_weights/; give a checkpoint-N/"),
        (ExportOptions(run / "checkpoint-4", tmp_path / "model"), "already exists"),
    ):
        with pytest.raises(InputError, match=words):
            export(options)
    assert not (tmp_path / "other").exists()
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    data = bytearray((tmp_path / "checkpoint-4" / MASTERS).read_bytes())
    data[-7] ^= 1
    (tmp_path / "checkpoint-4" / MASTERS).write_bytes(data)
    with pytest.raises(InputError, match="has changed since it was written"):
        export(ExportOptions(tmp_path / "checkpoint-4", tmp_path / "other"))


def test_inspection_commands(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder_of(runs, "stage 2")
    assert not (run / "lora_adapters").exists()
    find_adapters(InspectOptions(run))
    assert "runs with --finetune full train no adapter" in capsys.readouterr().out
    validate_checkpoint(InspectOptions(run / "checkpoint-4"))
    shown = capsys.readouterr().out
    assert "BAD" not in shown
    groups = "attention, text_mlp, audio_mlp, embeddings, heads"
    assert f"33 weights fully fine-tuned ({groups}; optional parts: none)" in shown
    shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-4" / "trained_weights")
    with pytest.raises(InputError, match="failed checks: files, as written, weights"):
        validate_checkpoint(InspectOptions(tmp_path / "checkpoint-4"))


AGAIN = {  # DeepSpeed file, options
    "zero1": "--precision bf16",
    "zero3": "--precision bf16",
    "zero2_offload": "",
    "zero2": "--optim adamw_8bit",
}


def copy_without_the_end(whole: Path, folder: Path) -> None:
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "final_model")


def assert_same_end(expected_run: Path, found_run: Path) -> None:
    """Bit-identical: every loss, norm and rate, master weights, Adam's moments, the saved model."""
    expected, found = (
        [{key: value for key, value in line.items() if "loss" in key or key in ("step", "lr", "grad_norm")} for line in
         read_metrics(run)] for run in (expected_run, found_run)
    )  # fmt: skip
    assert [line["step"] for line in expected] == [1, 2, 2, 3, 4, 4]
    assert found == expected
    names = [f"checkpoint-4/{MASTERS}", "checkpoint-4/optimizer.safetensors"]
    names += [f"final_model/{path.name}" for path in (expected_run / "final_model").glob("*.safetensors")]
    for name in names:
        expected_tensors, found_tensors = load_file(expected_run / name), load_file(found_run / name)
        assert expected_tensors.keys() == found_tensors.keys()
        assert all(tensor.equal(found_tensors[key]) for key, tensor in expected_tensors.items()), name


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, options: Options) -> Path:
    """On two ranks: for some DeepSpeed files an uninterrupted run, and one resumed from its middle checkpoint."""
    root = tmp_path_factory.mktemp("resumed")
    train_runs(2, [options(root / name, name, 1, 2, more) for name, more in AGAIN.items()])
    for name in AGAIN:
        copy_without_the_end(root / name, root / f"{name}-again")
    train_runs(
        2, [options(root / f"{name}-again", name, 1, 2, f"{more} --resume auto") for name, more in AGAIN.items()]
    )
    return root


@pytest.mark.parametrize("name", [name for name, more in AGAIN.items() if "8bit" not in more])
def test_resumed_to_the_last_bit(resumed: Path, name: str) -> None:
    assert_same_end(resumed / name, resumed / f"{name}-again")


def test_resumed_with_state_in_8_bits(resumed: Path, runs: Path) -> None:
    """A resumed run rounds the state once more."""
    expected, whole, again = map(losses_of, (folder_of(runs, "alone"), resumed / "zero2", resumed / "zero2-again"))
    assert whole == pytest.approx(expected, abs=0.01)
    assert again == pytest.approx(whole, abs=1e-3)


def test_bf16(resumed: Path, runs: Path) -> None:
    """The stages agree, and start like float32; later, bf16 copies cannot take changes as small as these."""
    expected, *found = map(losses_of, (folder_of(runs, "alone"), resumed / "zero1", resumed / "zero3"))
    assert found[1] == pytest.approx(found[0], abs=0.02)
    assert found[0][0] == pytest.approx(expected[0], abs=0.02)
    validations = [line["val/loss"] for line in read_metrics(resumed / "zero1") if "val/loss" in line]
    assert validations[1] < validations[0] - 0.1


ELSEWHERE = {"stage 3": (1, "zero2", 2, 2), "alone": (2, "zero3", 2, 1), "stage 0": (2, "zero3_offload", 1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_on_other_ranks_and_stages(runs: Path, options: Options, tmp_path: Path, ranks: int) -> None:
    moved = {name: layout for name, layout in ELSEWHERE.items() if layout[0] == ranks}
    for name in moved:
        copy_without_the_end(folder_of(runs, name), tmp_path / name.replace(" ", "-"))
    train_runs(
        ranks,
        [
            options(tmp_path / name.replace(" ", "-"), ds_name, size, accum, "--resume auto")
            for name, (_, ds_name, size, accum) in moved.items()
        ],
    )
    for name in moved:
        expected, found = folder_of(runs, name), tmp_path / name.replace(" ", "-")
        losses = [
            [line["train/loss"] for line in read_metrics(run) if "train/loss" in line] for run in (expected, found)
        ]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
        for kind in (MASTERS, "optimizer.safetensors"):
            assert_close(load_file(expected / "checkpoint-4" / kind), load_file(found / "checkpoint-4" / kind))


def test_killed_and_resumed(tmp_path: Path, runs: Path, options: Options) -> None:
    """At stage 3 on two ranks, after a checkpoint and one more step."""
    line = options(tmp_path / "broken", "zero3", 1, 2, MORE["stage 3"])
    kill_after_step(start_ranks(2, [*TRAIN, *line]), tmp_path / "broken", step=2)
    assert not (tmp_path / "broken" / "final_model").exists()
    train_runs(2, [[*line, "--resume", "auto"]])
    assert_same_end(folder_of(runs, "stage 3"), tmp_path / "broken")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, options: Options) -> Path:
    """Runs of one step on two ranks; each run trains one group."""
    root = tmp_path_factory.mktemp("grouped")
    stages = ("zero1", "zero2", "zero3", "zero3", "zero2")
    lines = [
        options(root / group, name, 1, 1, f"--train_groups {group} --max_steps 1 --save_steps 1")
        for group, name in zip(TRAIN_GROUPS, stages, strict=True)
    ]
    train_runs(2, lines)
    return root


@pytest.mark.parametrize("group", TRAIN_GROUPS)
def test_what_is_not_in_a_group_has_not_moved_by_a_bit(grouped: Path, float_base: Path, group: str) -> None:
    before, after = (load(folder).state_dict() for folder in (float_base, grouped / group / "final_model"))
    for name, tensor in before.items():
        assert tensor.equal(after[name]) == (group_of(name) != group), name
    masters = load_file(grouped / group / "checkpoint-1" / MASTERS)
    assert masters.keys() == {name for name in before if group_of(name) == group}


def test_with_audio_self_attention(tmp_path: Path, options: Options, float_base: Path) -> None:
    """An added part is trained with the rest, and is in the complete model; only the original layout can hold it."""
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [speech_sample("One.", "anna_00.flac", duration=0.4), speech_sample("Two.", "ben_00.flac", duration=0.5),
         text_sample("Who?", "Me.")],
    )  # fmt: skip
    more = f"--audio_self_attention --export_layout original --train_manifest {manifest} --val_split 0"
    lines = [
        options(tmp_path / name, ds_name, 1, accum, more)
        for name, ds_name, accum in (("one", "zero2", 2), ("two", "zero3", 1))
    ]
    for line in lines:
        at = line.index("--val_manifest")
        del line[at : at + 2]
    train_runs(1, lines[:1])
    train_runs(2, lines[1:])
    one, two = (load_file(tmp_path / name / f"checkpoint-4/{MASTERS}") for name in ("one", "two"))
    assert_close(one, two)
    added = {name for name in one if "audio_attn" in name or "audio_post_audio" in name}
    assert len(added) == 2 * 5
    assert len(one) == 33 + len(added)
    final = load_file(tmp_path / "two" / "final_model" / "model.safetensors")
    assert json.loads((tmp_path / "two" / "final_model" / "config.json").read_text())["use_audio_out_self_attention"]
    assert all(two[name].equal(final[original_name(name) or ""]) for name in two)
