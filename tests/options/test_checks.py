"""Options: documented defaults, checks, and a parser that does not import torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

from higgs_ds.common.errors import InputError
from higgs_ds.options.checks import check_options
from higgs_ds.options.command_line import parse_prepare_options, parse_train_options
from higgs_ds.options.commands import PrepareOptions, parse_shard
from higgs_ds.options.train import TrainOptions
from higgs_ds.training.intervals import with_intervals


def test_defaults_that_users_know() -> None:
    flat = TrainOptions().flat()
    known = {
        "epochs": 2, "max_steps": None, "batch_size": 2, "grad_accum": 8, "lr": 2e-4, "lora_r": 16, "lora_alpha": 32,
        "lora_dropout": 0.05, "val_split": 0.05,
    }  # fmt: skip
    assert {name: flat[name] for name in known} == known
    of_a_long_run = with_intervals(TrainOptions(), 20_000).flat()
    intervals = {"log_steps": 10, "val_steps": 100, "save_steps": 1000}
    assert {name: of_a_long_run[name] for name in intervals} == intervals


def test_parsed_options_and_names_of_given_ones() -> None:
    options, given = parse_train_options(
        "--local_rank=1 --lr 1e-3 --lora_targets attention audio_mlp --codebook_weights 2 1 1 1 1 1 1 1 "
        "--merge_adapter_with_base --val_manifest v.jsonl --max_steps 5".split()
    )
    assert options.optim.lr == 1e-3
    assert options.lora.lora_targets == ("attention", "audio_mlp")
    assert options.optim.codebook_weights == (2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert options.run.merge_adapter_with_base
    assert given == {"lr", "lora_targets", "codebook_weights", "merge_adapter_with_base", "val_manifest", "max_steps"}


def test_every_option_has_a_help_text() -> None:
    for group in dataclasses.fields(TrainOptions):
        for option in dataclasses.fields(getattr(TrainOptions(), group.name)):
            assert len(option.metadata["help"]) > 10, option.name


def test_all_bad_options_are_reported_at_once() -> None:
    bad = {
        "lr": -1.0, "batch_size": 0, "lora_dropout": 1.0, "val_split": -0.1, "max_steps": 0, "warmup_ratio": 2.0,
        "max_seq_len": 0, "max_clip_s": 0.0, "num_workers": 0, "bucket_size": 0, "max_tokens_per_batch": 0,
        "max_grad_norm": float("nan"), "text_loss_weight": 0.0, "audio_loss_weight": 0.0,
        "codebook_weights": (0.0,) * 8, "ema_decay": 1.0, "loraplus_lr_ratio": 0.5, "group_lr": ("audio_mlp=fast",),
        "reference_dropout": 1.0, "trim_silence": -0.1, "silence_db": 0.0, "flag_pause_s": -1.0, "flag_rate_ratio": 1.0,
        "flag_level_dbfs": 1.0, "flag_bandwidth": float("nan"), "flag_similarity": 0.5, "flag_min_clips": 0,
        "flag_codec_clips": -1,
    }  # fmt: skip
    problems = check_options(TrainOptions().replace(**bad))
    for name in bad:
        assert any(f"--{name} " in problem for problem in problems), name
    assert len(problems) == len(bad) - 1  # the two loss weights are one problem
    assert check_options(TrainOptions()) == []
    (problem,) = check_options(TrainOptions().replace(reference="none", reference_dropout=0.1))
    assert problem == "--reference_dropout 0.1: --reference none leaves out every reference already; remove one of them"
    assert check_options(TrainOptions().replace(reference="random", reference_dropout=0.1)) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--group_lr attention=1e-4 text_mlp=2e-4", []),
        ("--group_lr audio_self_attention=1e-5 --audio_self_attention", []),
        ("--group_lr heads=1e-5 --finetune full", []),
        ("--group_lr heads=1e-5 embeddings=1e-6 --also_train heads embeddings", []),
        ("--group_lr attention", ["attention: must be GROUP=LR with an LR above 0, for instance audio_mlp=1e-4"]),
        ("--group_lr attention=0 text_mlp=nan audio_mlp=inf", ["tention=0: must", "text_mlp=nan: must", "=inf: must"]),
        (
            "--group_lr heads=1 --lora_targets attention",
            ["heads=1: this run does not train heads; it trains attention"],
        ),
        ("--group_lr text_mlp=1 --lora_targets audio_mlp", ["does not train text_mlp; it trains audio_mlp"]),
        ("--group_lr whisper_conditioning=1e-4", ["this run does not train whisper_conditioning"]),
        ("--group_lr attention=1e-4 attention=1e-5", ["attention=1e-5: attention is given twice; remove one of them"]),
        ("--loraplus_lr_ratio 16 --finetune full", ["--loraplus_lr_ratio: only applies to adapters"]),
        ("--loraplus_lr_ratio inf", ["--loraplus_lr_ratio inf: must be 1 or more"]),
        ("--ema_decay 0", ["--ema_decay 0.0: must be above 0 and below 1"]),
    ],
)
def test_learning_rates_and_averages(given: str, words: list[str]) -> None:
    problems = check_options(parse_train_options(given.split())[0])
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True)), problems


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--evaluate_steps 5 --metric_for_best_model eval/stop_rate", []),
        ("--evaluate_steps 5 --metric_for_best_model eval/mos --measures dnsmos --early_stopping_patience 2", []),
        ("--evaluate_steps 5 --metric_for_best_model eval/missing_words --recognizer pocketsphinx", []),
        ("--metric_for_best_model eval/mos", ["--metric_for_best_model eval/mos: needs --evaluate_steps N"]),
        (
            "--recognizer r --measures dnsmos",
            ["--recognizer: needs --evaluate_steps", "--measures: needs --eval"],
        ),
        (
            "--evaluate_steps 0 --evaluate_samples 0",
            ["--evaluate_steps 0: must be 1", "--evaluate_samples 0: must"],
        ),
        ("--evaluate_steps 5 --evaluate_batch_size 0", ["--evaluate_batch_size 0: must be 1 or more"]),
        ("--evaluate_steps 5 --evaluate_temperature -1", ["--evaluate_temperature -1.0: must be 0 or above"]),
        (
            "--evaluate_steps 5 --metric_for_best_model eval/character_error_rate",
            ["--metric_for_best_model eval/character_error_rate: needs --recognizer, which hears the words"],
        ),
        (
            "--evaluate_steps 5 --metric_for_best_model eval/similarity_to_speaker --measures dnsmos",
            ["--metric_for_best_model eval/similarity_to_speaker: needs --measures similarity"],
        ),
        ("--evaluate_steps 5 --val_split 0", ["--evaluate_steps: needs held-out samples, and --val_split is 0; give"]),
        ("--evaluate_steps 5 --val_split 0 --val_manifest m", []),
        ("--evaluate_steps 5 --metric_for_best_model eval/mos_p808", ["eval/mos_p808: needs --measures dnsmos"]),
    ],
)
def test_evaluations(given: str, words: list[str]) -> None:
    problems = check_options(parse_train_options(given.split())[0])
    assert len(problems) == len(words), problems
    assert all(word in problem for word, problem in zip(words, problems, strict=True)), problems


@pytest.mark.parametrize("script", ["train.py", "prepare.py", "merge.py", "generate.py"])
def test_help_imports_no_torch(script: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
        f"try: runpy.run_path(r'{PROJECT / 'launch' / script}', run_name='__main__')\n"
        "except SystemExit as error: assert error.code == 0\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_prepare_accepts_the_options_of_training() -> None:
    data, model, prepare_options, _ = parse_prepare_options(
        "--train_manifest m --base_ckpt b --check_only --shard 1/4".split()
    )
    assert (data.train_manifest, data.val_split, model.base_ckpt) == ((Path("m"),), 0.05, "b")
    assert prepare_options == PrepareOptions(check_only=True, shard="1/4")


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "1/2/3", "a/b", "0/0", ""])
def test_bad_shards(text: str) -> None:
    assert parse_shard("3/4") == (3, 4)
    with pytest.raises(InputError, match="must be I/N"):
        parse_shard(text)


def test_unknown_option_exits_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        parse_train_options(["--learning_rate", "1"])
    assert caught.value.code == 2
