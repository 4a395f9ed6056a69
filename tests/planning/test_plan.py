"""The memory plan of a training run: activations compared with counted bytes, printed lines, proposed changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, kept_bytes, speech_batch
from launcher import overriding
from transformers import HiggsAudioV2Config

from higgs_ds import cli
from higgs_ds.common.errors import InputError
from higgs_ds.common.rank_variables import Ranks
from higgs_ds.model import nf4
from higgs_ds.model.config import read_config, with_parts
from higgs_ds.model.full import make_trainable
from higgs_ds.model.loading import empty_model
from higgs_ds.model.lora import add_lora
from higgs_ds.model.parts import Parts
from higgs_ds.model.recomputation import checkpoint_layers
from higgs_ds.model.v2.loss_model import DualLossModel
from higgs_ds.model.v2.part_modules import model_class
from higgs_ds.options.checks import check_options
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.fields import ALSO_TRAIN, FULL
from higgs_ds.options.train import LoraOptions, TuneOptions
from higgs_ds.planning import dry_run
from higgs_ds.planning.activations import PassSettings, measure_pass
from higgs_ds.planning.plan import AUTO_CHECKPOINTING, CONTEXT_BYTES, plan, with_checkpointing
from higgs_ds.planning.weights import GROUPS, LORA, model_weights

BIG = PROJECT / "benchmarks" / "3b"
TOLERANCE = 0.15


def small_config() -> HiggsAudioV2Config:
    """Five layers of width 128. The plan measures with two and three layers."""
    return HiggsAudioV2Config(
        hidden_size=128, intermediate_size=320, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=300, codebook_size=66, num_codebooks=8, pad_token_id=0, audio_token_id=270,
        audio_delay_token_id=268,
    )  # fmt: skip


TOWER = {"num_mel_bins": 16, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
         "max_source_positions": 50}  # fmt: skip


def config_with(settings: PassSettings) -> HiggsAudioV2Config:
    return with_parts(small_config(), settings.full_parts)


def real_model(settings: PassSettings) -> DualLossModel:
    config = config_with(settings)
    higgs = model_class(config)(config, use_text_head=True).to(settings.dtype)
    higgs.requires_grad_(False)
    if settings.four_bit:
        weights = {name: p.data for name, p in higgs.named_parameters() if nf4.is_quantized_weight(name)}
        nf4.replace_linears(higgs, settings.dtype)
        for name, weight in weights.items():
            nf4.fill(higgs.get_submodule(name.rpartition(".")[0]), nf4.quantize(weight, settings.dtype))
    if settings.recompute_every is not None:
        checkpoint_layers(higgs, settings.recompute_every)
    return DualLossModel(
        make_trainable(higgs, settings.tune, settings.lora, "", settings.dtype, settings.full_parts)
    ).train()


def real_batch(settings: PassSettings) -> dict[str, torch.Tensor]:
    batch = speech_batch(settings.batch_size, settings.length, settings.text_positions, 8, 64)
    heard = {}
    if settings.full_parts:  # per sample, a clip of the longest length that a tower encodes
        count = min(25, settings.text_positions)
        at = torch.arange(settings.batch_size * count)
        places = (at // count) * settings.text_positions + at % count
        heard = {"features": torch.randn(2, 16, 100), "feature_lengths": torch.tensor([100, 100]), "feature_rows": at}
        heard |= {"feature_places": places}
    return batch.tensors(torch.device("cpu")) | {"target_weights": torch.ones(9)} | heard


def settings_of(kind: str, recompute: int | None, length: int) -> PassSettings:
    return PassSettings(
        dtype={"bf16": torch.bfloat16, "nf4": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32),
        four_bit=kind == "nf4",
        recompute_every=recompute,
        lora=LoraOptions(lora_r=4, also_train=ALSO_TRAIN if kind == "also" else ()),
        batch_size=2,
        length=length,
        on_gpu=False,
        keeps_inputs=False,
        full_parts=Parts(True, TOWER) if "parts" in kind else Parts(),
        tune=TuneOptions(FULL) if "full" in kind else TuneOptions(),
    )


@pytest.mark.parametrize("length", [30, 90])
@pytest.mark.parametrize("recompute", [None, 1, 2])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "nf4", "parts", "also", "full", "full parts"])
def test_activations_against_a_real_forward(kind: str, recompute: int | None, length: int) -> None:
    settings = settings_of(kind, recompute, length)
    model, batch = real_model(settings), real_batch(settings)
    kept = kept_bytes(lambda: model(**batch), [*model.parameters(), *model.buffers(), *batch.values()])
    planned = measure_pass(config_with(settings), settings)
    print(planned.activations + planned.logits, kept)
    assert planned.activations + planned.logits == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.parametrize("recompute", [None, 1, 2])
@pytest.mark.parametrize("kind", ["fp32", "also", "full"])
def test_peak_against_torchs_allocator(kind: str, recompute: int | None) -> None:
    settings = settings_of(kind, recompute, 90)
    model, batch = real_model(settings), real_batch(settings)
    model(**batch)[0].sum().backward()  # allocates the gradients and everything that is allocated once
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        model(**batch)[0].sum().backward()
    events = profile.profiler.kineto_results.events()
    alive = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        alive += size
        peak = max(peak, alive)
    planned = measure_pass(small_config(), settings)
    total = planned.activations + planned.logits + planned.working
    print(total, peak)
    assert total == pytest.approx(peak, rel=TOLERANCE)


def test_released_geometry_has_the_released_size() -> None:
    options = parse_train_options(f"--dry_run --base_ckpt {BIG} --deepspeed {PROJECT}/ds_configs/zero0.json".split())
    setting = dry_run.make_setting(*options)
    weights = model_weights(setting)
    assert sum(weight.numel * weight.count for weight in weights if weight.group != LORA) == 5_771_283_456
    assert sum(weight.numel * weight.count for weight in weights if weight.group == LORA) == 39_452_672
    assert {weight.group for weight in weights} == {*GROUPS, LORA} - {"Whisper tower"}
    assert read_config(BIG).codebook_size == 1026


def test_full_fine_tuning_counts_every_weight() -> None:
    """Each weight is trained or frozen, none belongs to an adapter. Only the embeddings are frozen here."""
    line = f"--dry_run --base_ckpt {BIG} --finetune full --train_groups attention text_mlp audio_mlp heads"
    weights = model_weights(dry_run.make_setting(*parse_train_options(line.split())))
    trained = sum(weight.numel * weight.count for weight in weights if weight.trained)
    frozen = sum(weight.numel * weight.count for weight in weights if not weight.trained)
    assert trained + frozen == 5_771_283_456
    assert frozen == (128256 + 8 * 1026) * 3072
    assert {weight.group for weight in weights} == {*GROUPS} - {"Whisper tower"}


def test_full_fine_tuning_is_planned_and_advised(capsys: pytest.CaptureFixture[str]) -> None:
    """The advice leaves out options that are not available with it."""
    lines = printed(capsys, f"--base_ckpt {BIG} --finetune full --device_memory_gib 80 --plan_ranks 1 --batch_size 1")
    assert any(
        line.startswith("full fine-tuning: attention, text_mlp, audio_mlp, embeddings, heads; optimizer adamw")
        for line in lines
    )
    by_name = {
        line[:36].strip(): float(line.split()[-2]) for line in lines if line.endswith(" GiB") and line[:1] != " "
    }
    assert by_name["trained weights"] == pytest.approx(5_771_283_456 * 2 / 2**30, abs=0.01)
    assert by_name["optimizer state, float32 masters"] == pytest.approx(5_771_283_456 * 12 / 2**30, abs=0.01)
    proposed = [line.split(" saves")[0].strip() for line in lines if " saves" in line]
    assert "--finetune lora" in proposed
    assert "--optim adamw_8bit" in proposed
    assert not {"--load_in_4bit", "--offload_embeddings"} & set(proposed)


def test_parts_are_counted_whole() -> None:
    """Compare trained weights, of adapters and of optional parts, and frozen weights with those of a real model."""
    config = with_parts(small_config(), Parts(True, TOWER))
    options, _ = parse_train_options("--dry_run --precision bf16 --audio_self_attention --whisper_conditioning".split())
    real = add_lora(empty_model(config, torch.float32), LoraOptions(), "", torch.float32, Parts(True, TOWER))
    weights = model_weights(dry_run.Setting(config, options, {"zero_optimization": {"stage": 0}}, 1))
    for trained in (True, False):
        planned = sum(weight.numel * weight.count for weight in weights if (weight.group == LORA) == trained)
        assert planned == sum(p.numel() for p in real.parameters() if p.requires_grad == trained)


def run_dry(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "launch" / "train.py"), "--dry_run", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def printed(capsys: pytest.CaptureFixture[str], options: str) -> list[str]:
    dry_run.main(*parse_train_options(["--dry_run", *options.split()]))
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_command_plans_the_released_geometry_without_weights() -> None:
    done = run_dry(
        *f"--base_ckpt {BIG} --load_in_4bit --activation_checkpointing every_layer --batch_size 1 "
        "--offload_embeddings --device_memory_gib 24".split()
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("fits: ")
    assert any("LoRA: rank 16 on attention, text_mlp, audio_mlp" in line for line in lines)
    assert any("(a guess: give --train_manifest" in line for line in lines)
    assert any(line.startswith("embeddings ") for line in lines)  # in host memory
    total_gib = float(next(line for line in lines if line.startswith("total")).split()[-2])
    assert 3.5 < total_gib < 6


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Ranks(rank=1, world_size=2, local_rank=1, local_world_size=2, port=29500).variables().items():
        monkeypatch.setenv(name, value)
    assert printed(capsys, "") == []


@pytest.mark.slow
def test_bad_input_is_exit_code_2(tmp_path: Path) -> None:
    done = run_dry("--base_ckpt", str(tmp_path), "--device_memory_gib", "-1")
    assert done.returncode == 2
    assert "--device_memory_gib -1.0: must be above 0" in done.stderr
    assert "has no config.json" in done.stderr


def test_what_does_not_fit_comes_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, f"--base_ckpt {BIG} --device_memory_gib 8 --plan_ranks 1")
    assert lines[-1].startswith("does not fit: ")
    start = next(i for i, line in enumerate(lines) if line.startswith("what would help"))
    proposed = [line.split(" saves")[0].strip() for line in lines[start + 1 :] if " saves" in line]
    assert proposed[:4] == [
        "--activation_checkpointing every_layer", "--batch_size 1", "--load_in_4bit", "--offload_embeddings",
    ]  # fmt: skip
    assert "--deepspeed ds_configs/zero3.json on 4 GPUs" in proposed
    pairs = next(i for i, line in enumerate(lines) if line.startswith("no single change is enough"))
    assert lines[pairs + 1].startswith("  --activation_checkpointing every_layer --load_in_4bit  saves ")
    assert all(line.endswith(", fits") for line in lines[pairs + 1 : pairs + 4])


def needed(options: str) -> str:
    """Return the GiB that are planned for options, as they are printed."""
    argv = overriding(["--dry_run", *options.split()])
    return f"{(plan(dry_run.make_setting(*parse_train_options(argv))).total + CONTEXT_BYTES) / 2**30:.2f} GiB"


def test_advice_is_what_its_options_are_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line, its options given, is planned for the memory that the line says. No pair is enough here."""
    common = f"--base_ckpt {BIG} --max_seq_len 1024"
    lines = printed(capsys, f"{common} --device_memory_gib 3 --plan_ranks 1")
    changes = [re.split(r" +saves +[\d.]+ GiB: +", line.strip()) for line in lines if line[:3] == "  -"]
    assert len(changes) > 6
    text, of_all = lines[-4].removeprefix("together: "), lines[-3].split(": ")[1].strip()
    assert len(re.findall("--", text)) > 4
    for change, result in [*changes, (text, of_all)]:
        on_four = change.endswith(" on 4 GPUs")
        options = change.removesuffix(" on 4 GPUs").replace("--deepspeed ", f"--deepspeed {PROJECT}/")
        assert result == f"{needed(f'{common} --plan_ranks {4 if on_four else 1} {options}')}, does not fit", change


def test_room_that_is_left_is_for_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Without recomputation, quantization and so on, or with a larger micro-batch: as planned with these options."""
    run = "--load_in_4bit --offload_embeddings --activation_checkpointing every_layer --optim adamw_8bit"
    common = f"--base_ckpt {BIG} --plan_ranks 1 --max_seq_len 512"
    lines = printed(capsys, f"{common} {run} --device_memory_gib 24")
    start = next(i for i, line in enumerate(lines) if line.startswith("room is left for"))
    uses = [re.split(r" {2,}", line.strip()) for line in lines[start + 1 : -2]]
    assert [use for use, _ in uses] == [
        "--batch_size 16 --grad_accum 1", "--activation_checkpointing none", "--optim adamw", "no --offload_embeddings",
        "no --load_in_4bit",
    ]  # fmt: skip
    for use, gib in uses:
        kept = re.sub(rf"{use.removeprefix('no ').split()[0]}( [^-]\S*)?", "", run)
        assert gib == needed(f"{common} {kept} {'' if use.startswith('no ') else use}"), use
        assert float(gib.split()[0]) <= 0.9 * 24


def test_exit_code_of_a_plan_that_must_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """1 where it does not fit, 0 where it does, 2 where nothing says how large the GPU is."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["--dry_run", "--require_fit", "--base_ckpt", str(BIG), "--max_seq_len", "512", "--grad_accum", "1"]
    assert cli.train([*command, "--device_memory_gib", "80"]) == 0
    assert cli.train([*command, "--device_memory_gib", "13"]) == 1
    assert "error: --require_fit: the plan does not fit: 13." in capsys.readouterr().err
    assert cli.train(command) == 2
    assert "--require_fit: no GPU on this machine; give --device_memory_gib N" in capsys.readouterr().err
    assert check_options(parse_train_options(["--require_fit"])[0]) == ["--require_fit: only applies to --dry_run"]


def test_each_option_saves_what_it_is_for() -> None:
    def planned(options: str) -> int:
        argv = f"--dry_run --base_ckpt {BIG} --max_seq_len 512 {options}".split()
        return plan(dry_run.make_setting(*parse_train_options(argv))).total

    plain = planned("")
    for cheaper in ("--load_in_4bit", "--offload_embeddings", "--optim adamw_8bit", "--batch_size 1"):
        assert planned(cheaper) < plain, cheaper
    sharded = f"--deepspeed {PROJECT}/ds_configs/zero3.json --plan_ranks"
    assert planned(f"{sharded} 4") < planned(f"{sharded} 2") < plain


def test_tokens_per_batch_set_the_batch() -> None:
    options = "--dry_run --max_tokens_per_batch 1000 --max_seq_len 300 --plan_ranks 3"
    setting = dry_run.make_setting(*parse_train_options(options.split()))
    assert (setting.batch_shape(), setting.ranks) == ((3, 300), 3)


def test_bad_options() -> None:
    options, _ = parse_train_options("--plan_ranks 0 --device_memory_gib 8".split())
    assert check_options(options) == [
        "--device_memory_gib: only applies to --dry_run",
        "--plan_ranks 0: must be above 0",
        "--plan_ranks: only applies to --dry_run",
    ]


def test_base_on_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(InputError, match="not a local folder, and not available on the hub"):
        dry_run.make_setting(*parse_train_options("--dry_run --base_ckpt some/base".split()))


def test_all_faults_at_once(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"no_such_key": 1}))
    with pytest.raises(InputError) as caught:
        dry_run.make_setting(
            *parse_train_options(f"--dry_run --lora_r 0 --base_ckpt {tmp_path} --deepspeed {tmp_path}/ds.json".split())
        )
    assert len(caught.value.problems) == 3


def test_auto_recomputes_as_little_as_it_takes() -> None:
    argv = f"--dry_run --base_ckpt {BIG} --load_in_4bit --batch_size 2 --activation_checkpointing auto"
    setting = dry_run.make_setting(*parse_train_options(argv.split()))
    totals = {
        choice: plan(replace(setting, options=setting.options.replace(activation_checkpointing=choice))).total
        for choice in AUTO_CHECKPOINTING
    }
    assert sorted(totals.values(), reverse=True) == list(totals.values())
    for choice, total in totals.items():
        decided = with_checkpointing(setting, total + CONTEXT_BYTES)
        assert decided.options.model.activation_checkpointing == choice
    assert with_checkpointing(setting, 0).options.model.activation_checkpointing == "every_layer"


@pytest.mark.parametrize("value", ["0", "-1", "some", "1.5"])
def test_bad_checkpointing(value: str) -> None:
    options, _ = parse_train_options(["--activation_checkpointing", value])
    (problem,) = check_options(options)
    assert problem == (
        f"--activation_checkpointing {value}: must be none, every_layer, auto, or a number N of layers, 1 or more"
    )


HARDWARE = re.findall(
    r"^\| (?:(\d+) x )?(\d+) GB[^|]* \| `([^`]+)` \| ([\d.]+) GiB \|$",
    (PROJECT / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_the_readme_has_a_table_of_hardware() -> None:
    assert len(HARDWARE) >= 7


@pytest.mark.parametrize(("ranks", "card_gb", "options", "planned_gib"), HARDWARE)
def test_hardware_of_the_readme(ranks: str, card_gb: str, options: str, planned_gib: str) -> None:
    """The table's memory is what --dry_run plans for samples of 1,024 positions, and fits its card."""
    common = f"--dry_run --base_ckpt {PROJECT}/benchmarks/3b --max_seq_len 1024 --plan_ranks {ranks or 1}"
    setting = dry_run.make_setting(*parse_train_options(f"{common} {options}".split()))
    total_gib = (plan(setting).total + CONTEXT_BYTES) / 2**30
    assert f"{total_gib:.1f}" == planned_gib
    assert total_gib < 0.9 * float(card_gb) * 1e9 / 2**30
