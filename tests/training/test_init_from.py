"""--init_from: where a run stands before its first step, against plain PEFT, on any ranks; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import native_inputs, read_metrics, speech_sample, write_manifest
from launcher import RANDOM, overriding, run_code, run_script, train_runs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_ds.adapters.convert import convert_adapter
from higgs_ds.adapters.load import read_adapter
from higgs_ds.adapters.merge import merge
from higgs_ds.adapters.save import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from higgs_ds.adapters.starting_point import StartingPoint, compare_quantization
from higgs_ds.common.errors import InputError
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.data.dataset import Dataset
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.fields import NATIVE, ORIGINAL
from higgs_ds.planning import dry_run
from higgs_ds.planning.plan import plan
from higgs_ds.training.startup import _check_and_encode, start

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:::peft")]

STEPS, LR = 2, 2e-3
# Ranks, stage, accumulation.
LAYOUTS = {"alone": (1, 2, 2), "ZeRO-0": (2, 0, 1), "ZeRO-1": (2, 1, 1), "ZeRO-2": (2, 2, 1), "ZeRO-3": (2, 3, 1)}
STILL = "--precision bf16 --lr 1e-30 --max_steps 1"  # too small a rate to change any bit


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = [speech_sample(f"Clip {i}.", f"anna_0{i}.flac", duration=0.3 + i / 10) for i in range(4)]
    return write_manifest(tmp_path_factory.mktemp("clips") / "clips.jsonl", clips)


Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def options(manifest: Path, ds_file: Callable[[int], Path]) -> Options:
    def make(folder: Path, more: str = "", stage: int = 2, grad_accum: int = 2) -> list[str]:
        return (
            f"--deepspeed {ds_file(stage)} --output_dir {folder} --train_manifest {manifest} --val_manifest {manifest} "
            f"--precision fp32 --batch_size 1 --grad_accum {grad_accum} --max_steps {STEPS} --lr {LR} --lora_dropout 0 "
            f"--lr_scheduler_type constant --warmup_ratio 0 --max_grad_norm 0 --log_steps 1 --save_steps 1 {more}"
        ).split()

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, options: Options) -> Path:
    """Runs, those that start from them (from `first`: in LAYOUTS, and STILL), and one resumed without its adapter."""
    root = tmp_path_factory.mktemp("runs")
    four_bit = "--load_in_4bit"
    parts = "--audio_self_attention"
    train_runs(1, [options(root / "first"), options(root / "4-bits", four_bit), options(root / "parts", parts)])
    shutil.copytree(root / "first" / "lora_adapters", root / "gone")
    for ranks in (1, 2):
        train_runs(
            ranks,
            [
                options(root / f"{name}{kind}", f"--init_from {root}/first {more}", stage, accum)
                for name, (world_size, stage, accum) in LAYOUTS.items()
                for kind, more in (("", ""), ("-still", STILL))
                if world_size == ranks
            ],
        )
    dropout = "--lora_dropout 0.1 --early_stopping_patience 9 --keep_checkpoints 9"
    train_runs(
        1,
        [
            options(root / "4-bits-again", f"{four_bit} --init_from {root}/4-bits"),
            options(root / "parts-again", f"{parts} --init_from {root}/parts"),
            options(root / "whole", f"{dropout} --init_from {root}/gone"),
        ],
    )
    shutil.copytree(root / "whole", root / "resumed")
    shutil.rmtree(root / "resumed" / f"checkpoint-{STEPS}")
    shutil.rmtree(root / "gone")
    train_runs(1, [options(root / "resumed", f"{dropout} --init_from {root}/gone --resume auto")])
    return root


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lora_adapters" / ADAPTER_WEIGHTS)


def losses(run: Path) -> list[dict[str, Any]]:
    return [{key: v for key, v in line.items() if "loss" in key or key == "step"} for line in read_metrics(run)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_starts_where_the_adapter_stood(runs: Path, name: str) -> None:
    before, lines = losses(runs / "first")[-1], losses(runs / name)
    assert lines[0] == pytest.approx({**before, "step": 0}, abs=1e-6)
    for expected, found in zip(losses(runs / "alone"), lines, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert lines[-1]["val/loss"] < before["val/loss"] - 0.05  # it learns on
    assert json.loads((runs / name / "trainer_state.json").read_text())["val_losses"].keys() == set(
        map(str, range(1, STEPS + 1))
    )


@pytest.mark.parametrize("name", ["4-bits", "parts"])
def test_with_a_4_bit_base_and_with_trained_parts(runs: Path, name: str) -> None:
    before, after = losses(runs / name)[-1], losses(runs / f"{name}-again")[0]
    assert after == pytest.approx({**before, "step": 0}, abs=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_masters_are_the_adapter_to_the_bit(runs: Path, name: str) -> None:
    """In bf16, the model's own copies are rounded; what is trained and saved is not."""
    expected, found = adapter_of(runs / "first"), adapter_of(runs / f"{name}-still")
    assert expected.keys() == found.keys()
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())
    assert any(not tensor.bfloat16().float().equal(tensor) for tensor in expected.values())


@pytest.mark.parametrize("name", ["alone", "ZeRO-3"])
def test_moments_start_at_zero(runs: Path, name: str) -> None:
    """Adam's first step from zero moments changes each element by the learning rate, or not at all."""
    start, after = adapter_of(runs / "first"), load_file(runs / name / "checkpoint-1/lora_adapters" / ADAPTER_WEIGHTS)
    changes = torch.cat([(after[key] - tensor).abs().flatten() for key, tensor in start.items()])
    assert changes.max() <= LR * 1.001
    assert changes.median() == pytest.approx(LR, rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_averages_begin_with_the_adapter(runs: Path, options: Options, tmp_path: Path, stage: int) -> None:
    train_runs(2, [options(tmp_path / "run", f"--init_from {runs}/first --ema_decay 0.9 {STILL}", stage, 1)])
    start, averages = adapter_of(runs / "first"), load_file(tmp_path / "run" / "lora_adapters_ema" / ADAPTER_WEIGHTS)
    for key, tensor in start.items():
        torch.testing.assert_close(averages[key], tensor, rtol=1e-6, atol=1e-9)


def test_resumes_to_the_bit_without_the_adapter(runs: Path) -> None:
    """The checkpoint has everything; step 0's line is neither lost nor doubled."""
    assert losses(runs / "whole") == losses(runs / "resumed")
    expected, found = adapter_of(runs / "whole"), adapter_of(runs / "resumed")
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())


SIGNALLED = """
import os, signal
from higgs_ds.cli import train
from higgs_ds.training import loop

def signalled(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return validate(*args)

validate, loop.validate = loop.validate, signalled
assert train(OPTIONS) == 6
loop.validate = validate
assert train(OPTIONS) == 0
"""


def test_stopped_in_its_first_validation(runs: Path, options: Options, tmp_path: Path) -> None:
    """Nothing was trained, so nothing is saved; --resume auto starts, and validates, anew."""
    argv = [*RANDOM, *options(tmp_path / "run", f"--init_from {runs}/first --no_report --resume auto")]
    done = run_code(f"OPTIONS = {overriding(argv)}\n{SIGNALLED}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"stopped by SIGTERM at step 0 of {STEPS}; nothing was trained yet" in done.stderr
    assert losses(tmp_path / "run") == losses(runs / "alone")


def test_records_where_it_comes_from(runs: Path, options: Options, tmp_path: Path) -> None:
    """The card and the file name the adapter and what that one started from; no path of this machine is among it."""
    shutil.copytree(runs / "alone", tmp_path / "alone")
    train_runs(1, [options(tmp_path / "third", f"--init_from {tmp_path}/alone/checkpoint-1 --max_steps 1")])
    first, second = (read_adapter(folder / "lora_adapters").record.sha256[:12]
                     for folder in (runs / "first", runs / "alone" / "checkpoint-1"))  # fmt: skip
    card = (tmp_path / "third" / "lora_adapters" / "README.md").read_text()
    history = f"from the adapter `alone/checkpoint-1` (SHA-256 {second}), which started from `first` (SHA-256 {first})."
    assert history in card
    assert str(tmp_path) not in card
    convert_adapter(tmp_path / "third" / "lora_adapters", tmp_path / "original", ORIGINAL)
    assert len(read_adapter(tmp_path / "original").record.origins) == 2


# Plain PEFT


def load(folder: Path) -> HiggsAudioV2ForConditionalGeneration:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, dtype=torch.float32).eval()


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "attention": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "expression": {"target_modules": r"model\.layers\.1\.(self_attn\.q|audio_mlp\..*)_proj"},
    "layers": {"target_modules": ["q_proj", "v_proj", "up_proj"], "layers_to_transform": [1]},
    "ranks": {
        "target_modules": [*ATTENTION, "mlp.up_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 3},
        "alpha_pattern": {r".*\.1\.self_attn\.v_proj": 20, "k_proj": 3.5},
    },
}


def by_peft(base: Path, folder: Path, **values: Any) -> PeftModel:
    """An adapter of random values, as plain PEFT saves it."""
    torch.manual_seed(11)
    config = LoraConfig(**{"r": 8, "lora_alpha": 4, "target_modules": ATTENTION} | values)
    model = get_peft_model(load(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            if "magnitude" in name:
                parameter *= 1 + 0.2 * torch.rand(parameter.shape)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def loss_of(model: Any, samples: Dataset) -> dict[str, float]:
    """Validation losses from the logits of a model of transformers."""
    batch = samples.batch(range(len(samples)))
    higgs = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = higgs.model(**native_inputs(batch, higgs.config.audio_token_id)).last_hidden_state.flatten(0, 1)
    text, audio = (hidden[batch.positions[places]] for places in (batch.text_places, batch.audio_places))
    codes = higgs.audio_lm_head(audio).unflatten(-1, (8, -1))
    of_codes = [
        F.cross_entropy(codes[:, k], batch.audio_targets[:, k], ignore_index=IGNORE_INDEX).item() for k in range(8)
    ]
    of_text = F.cross_entropy(higgs.text_lm_head(text), batch.text_targets).item()
    by_codebook = {f"val/audio_loss/cb{k}": loss for k, loss in enumerate(of_codes)}
    return {"val/loss": of_text + sum(of_codes) / 8, "val/text_loss": of_text, **by_codebook}


@pytest.fixture(scope="module")
def from_peft(tmp_path_factory: pytest.TempPathFactory, base: Path, options: Options) -> Path:
    """Adapters of plain PEFT, the same in the original layout's names, and a run from each."""
    root = tmp_path_factory.mktemp("peft")
    started = []
    for kind, values in KINDS.items():
        by_peft(base, root / NATIVE / kind, **values)
        convert_adapter(root / NATIVE / kind, root / ORIGINAL / kind, ORIGINAL)
        for folder in (root / NATIVE / kind, root / ORIGINAL / kind):
            started.append(options(folder / "run", f"--init_from {folder} --max_steps 1"))
    train_runs(1, started)
    return root


@pytest.fixture
def samples(lone_rank: None, manifest: Path, options: Options, tmp_path: Path) -> Dataset:
    """The validation samples of all runs."""
    return _check_and_encode(*parse_train_options(overriding([*RANDOM, *options(tmp_path / "run")])), FolderLock()).val


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [NATIVE, ORIGINAL])
def test_starts_as_plain_peft(base: Path, from_peft: Path, samples: Dataset, kind: str, layout: str) -> None:
    model = PeftModel.from_pretrained(load(base), from_peft / NATIVE / kind).eval()
    expected = loss_of(model, samples)
    line = read_metrics(from_peft / layout / kind / "run")[0]
    assert line["step"] == 0
    assert {key: line[key] for key in expected} == pytest.approx(expected, abs=1e-5)
    of_base = loss_of(model.unload(), samples)
    assert max(abs(of_base[key] - loss) for key, loss in expected.items()) > 2e-2
    by_us = from_peft / layout / kind / "run" / "lora_adapters" / ADAPTER_WEIGHTS
    assert load_file(from_peft / NATIVE / kind / ADAPTER_WEIGHTS).keys() == load_file(by_us).keys()


def test_saved_as_it_was_started(base: Path, options: Options, tmp_path: Path) -> None:
    """Ranks and alphas of single layers survive training and saving: plain PEFT loads the result to the same losses."""
    by_peft(base, tmp_path / "adapter", **KINDS["ranks"])
    train_runs(2, [options(tmp_path / "run", f"--init_from {tmp_path}/adapter", 3, 1)])
    train_runs(1, [options(tmp_path / "again", f"--init_from {tmp_path}/run --max_steps 1")])
    assert losses(tmp_path / "again")[0]["val/loss"] == pytest.approx(
        losses(tmp_path / "run")[-1]["val/loss"], abs=1e-5
    )
    before, after = (read_adapter(tmp_path / name) for name in ("adapter", "run/lora_adapters"))
    assert before.scaling == after.scaling
    loaded = PeftModel.from_pretrained(load(base), tmp_path / "run" / "lora_adapters")
    assert {module.r["default"] for module in loaded.modules() if hasattr(module, "lora_A")} == {2, 3, 8}


# What is planned and printed


def test_plan_follows_the_adapter(base: Path, options: Options, tmp_path: Path) -> None:
    """The plan of the same options, given by hand; ranks that differ are planned as the largest of them."""
    by_peft(base, tmp_path / "plain")
    by_peft(base, tmp_path / "varied", rank_pattern={"layers.0": 2, "layers.1": 8}, lora_alpha=4)
    by_hand = "--lora_r 8 --lora_alpha 4 --lora_targets attention"
    plans = [
        plan(dry_run.make_setting(*parse_train_options(overriding([*RANDOM, *options(tmp_path / "run", more)]))))
        for more in (by_hand, f"--init_from {tmp_path}/plain", f"--init_from {tmp_path}/varied", "")
    ]
    assert plans[0] == plans[1] == plans[2]
    assert plans[3].trained > 4 * plans[0].trained
    line = [*RANDOM, *options(tmp_path / "run", f"--init_from {tmp_path}/plain --dry_run")]
    assert f"LoRA: rank 8 (as {tmp_path}/plain) on attention" in run_script("train", line, tmp_path).stdout


def test_table_at_the_start(runs: Path, base: Path, options: Options, tmp_path: Path) -> None:
    by_peft(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere/on/a/disk"}))
    shown = []
    for number, adapter in enumerate((runs / "first", tmp_path / "adapter")):
        line = options(tmp_path / f"run-{number}", f"--init_from {adapter} --no_report --max_steps 1")
        done = run_script("train", [*RANDOM, *line], tmp_path)
        assert done.returncode == 0, done.stderr
        shown.append(" ".join(done.stdout.split()))
    assert f"start {runs}/first: rank 16, alpha 32, trained on this base" in shown[0]
    assert "trained on elsewhere/on/a/disk, which could not be compared with this base; its layers fit" in shown[1]
    assert "step 0/1: validation: loss " in shown[0]


# What is refused


def refusal(argv: list[str]) -> str:
    with pytest.raises(InputError) as caught:
        start(*parse_train_options(overriding([*RANDOM, *argv])), FolderLock())
    return str(caught.value)


def changed(adapter: Path, folder: Path, **values: Any) -> Path:
    """A copy of an adapter with another configuration, and without its records, as if PEFT had written it."""
    from safetensors.torch import save_file

    shutil.copytree(adapter, folder)
    save_file(load_file(adapter / ADAPTER_WEIGHTS), folder / ADAPTER_WEIGHTS, {"format": "pt"})
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.usefixtures("lone_rank")
def test_given_values_must_be_the_adapters(runs: Path, options: Options, tmp_path: Path) -> None:
    given = "--lora_r 8 --lora_alpha 32 --lora_targets attention --use_rslora"
    message = refusal(options(tmp_path / "run", f"--init_from {runs}/first {given}"))
    where = f"--init_from {runs}/first: has"
    for problem in (
        f"{where} lora_r 16, but --lora_r 8 is given",
        f"{where} lora_targets attention text_mlp audio_mlp, but --lora_targets attention is given",
        f"{where} use_rslora False, but --use_rslora True is given",
    ):
        assert problem in message
    assert "lora_alpha" not in message
    settings = json.loads((runs / "alone" / "settings.json").read_text())
    assert settings["init_from"] == f"{runs}/first"
    again = ["--config", str(runs / "alone" / "settings.json"), "--output_dir", str(tmp_path / "again")]
    inputs = _check_and_encode(*parse_train_options(again), FolderLock())
    assert inputs.options.lora.lora_r == settings["lora_r"] == 16


@pytest.mark.usefixtures("lone_rank")
def test_another_base(runs: Path, base: Path, options: Options, tmp_path: Path) -> None:
    """Also a base of the same configuration and size: the one that the adapter was merged into."""
    merge(base, runs / "first" / "lora_adapters", tmp_path / "merged", verify=False)
    line = options(tmp_path / "run", f"--base_ckpt {tmp_path}/merged --init_from")
    another = f"was trained on {base}, but --base_ckpt {tmp_path}/merged is another base: its weights are others"
    assert f"--init_from {runs}/first: {another}" in refusal([*line, f"{runs}/first"])
    # By PEFT: the folder that it names holds other weights; or it names one that is known by its name.
    adapter = runs / "first" / "lora_adapters"
    assert another in refusal([*line, str(changed(adapter, tmp_path / "peft", base_model_name_or_path=str(base)))])
    named = changed(adapter, tmp_path / "hub", base_model_name_or_path="bosonai/higgs-audio-v2-generation-3B-base")
    message = refusal(options(tmp_path / "run", f"--init_from {named}"))
    assert "was trained on bosonai/higgs-audio-v2-generation-3B-base, but --base_ckpt" in message
    four_bit = f"--load_in_4bit --init_from {changed_4_bit(runs, tmp_path)} --base_ckpt {tmp_path}/merged"
    assert "of its weights have other values in 4 bits" in refusal(options(tmp_path / "run", four_bit))


def test_another_way_to_quantize_is_a_warning(runs: Path) -> None:
    """Of a base that is known to be the same, or if another device or version may be the reason."""
    adapter = read_adapter(runs / "4-bits" / "lora_adapters")
    here = adapter.quantization
    assert here
    first = next(iter(here.digests))
    there = replace(here, digests=here.digests | {first: "another"}, device="cpu", bitsandbytes="0.1")
    unknown = replace(adapter.record, base_weights=None)
    assert compare_quantization(StartingPoint(runs, adapter, ()), here) is None
    for trained in (
        replace(adapter, quantization=replace(there, bitsandbytes=here.bitsandbytes)),
        replace(adapter, quantization=there, record=unknown),
    ):
        warning = compare_quantization(StartingPoint(runs, trained, ()), here)
        assert warning
        assert f"1 of {len(here.digests)} weights quantize differently here" in warning


def changed_4_bit(runs: Path, root: Path) -> Path:
    """The adapter of the 4-bit run as an earlier version recorded it: without the base's digest and name."""
    from safetensors.torch import save_file

    source, folder = runs / "4-bits" / "lora_adapters", root / "4-bits"
    shutil.copytree(source, folder)
    with safe_open(source / ADAPTER_WEIGHTS, "pt") as file:
        metadata = file.metadata()
    del metadata["base_weights"]
    save_file(load_file(source / ADAPTER_WEIGHTS), folder / ADAPTER_WEIGHTS, metadata)
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "gone"}))
    return folder


@pytest.mark.usefixtures("lone_rank")
def test_refused(runs: Path, base: Path, small_base: Path, options: Options, tmp_path: Path) -> None:
    by_peft(base, tmp_path / "heads", target_modules="all-linear")
    by_peft(base, tmp_path / "dora", use_dora=True)
    cases = {
        f"--init_from {runs}/first --load_in_4bit": "was trained on a base that is not in 4 bits",
        f"--init_from {runs}/4-bits": "was trained on a base in 4 bits, whose weights are others; give --load_in_4bit",
        f"--init_from {tmp_path}/heads": "adapts audio_lm_head, text_lm_head, but only the linear layers of the",
        f"--init_from {tmp_path}/nothing": "is not an adapter: it holds no adapter_config.json",
        f"--init_from {base}": "is not an adapter",
        f"--init_from {runs}/first --base_ckpt {small_base}": "but in the base it is",
        f"--init_from {runs}/first --audio_self_attention": "does not hold the part that --audio_self_attention trains",
        f"--init_from {runs}/parts": "was trained with --audio_self_attention, and holds that part; give the option",
        f"--init_from {runs}/first --finetune full": "--finetune full trains no adapters; merge the adapter",
    }  # fmt: skip
    for more, words in cases.items():
        assert words in refusal(options(tmp_path / "run", more)), more
    message = refusal(options(tmp_path / "run", f"--init_from {tmp_path}/dora", stage=3))
    assert "--use_dora: not supported at ZeRO stage 3" in message
    shutil.copytree(runs / "first" / "lora_adapters", tmp_path / "own" / "lora_adapters")
    assert "this run would replace it" in refusal(options(tmp_path / "own", f"--init_from {tmp_path}/own"))


@pytest.mark.usefixtures("lone_rank")
def test_refused_on_resume(runs: Path, options: Options, tmp_path: Path) -> None:
    """Another adapter, none, and one for a run that had none."""
    for name in ("alone", "first"):
        shutil.copytree(runs / name, tmp_path / name)
    resumed = "--resume auto --max_steps 3"
    message = refusal(options(tmp_path / "alone", f"--init_from {runs}/ZeRO-2 {resumed}"))
    assert "is not, or no longer, the adapter first (SHA-256 " in message
    assert "was trained with init_from 'SHA-256 " in refusal(options(tmp_path / "alone", resumed))
    message = refusal(options(tmp_path / "first", f"--init_from {runs}/alone {resumed}"))
    assert "did not start from an adapter; omit this option" in message
