"""Learning rates of groups and LoRA+: against PEFT's and torch's optimizers, over ranks and stages, after a resume."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics
from launcher import RANDOM, run_script, train_runs
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from plain_training import load, plain_steps, windows_of
from safetensors.torch import load_file

from higgs_ds.model.parts import Parts
from higgs_ds.options.optim import OptimOptions
from higgs_ds.training.learning_rates import group_of_trained, parameter_groups

pytestmark = pytest.mark.slow

LR, DECAY, RATIO, STEPS = 1e-3, 0.1, 8.0, 5
SHARES = [0.0, 1.0, 0.75, 0.5, 0.25]  # a linear schedule, with a step of warm-up
ADAPTER, MASTERS = "lora_adapters/adapter_model.safetensors", "trained_weights/model.safetensors"
KINDS = {
    "loraplus": f"--lora_dropout 0 --loraplus_lr_ratio {RATIO:g}",
    "groups": "--lora_dropout 0 --group_lr attention=4e-4 audio_mlp=2e-3 --loraplus_lr_ratio 4",
    "full": "--finetune full --group_lr audio_mlp=2e-3 heads=1e-4 embeddings=5e-4",
}
# Runs on one rank are compared with loops of plain torch, and runs on two ranks with these.
ON_TWO_RANKS = [
    ("groups", "zero0"), ("groups", "zero1"), ("groups", "zero2"), ("groups", "zero3"), ("full", "zero2_offload"),
    ("full", "zero3"), ("groups", "zero3_offload"),
]  # fmt: skip
BF16 = ["zero0", "zero1", "zero3"]  # with DeepSpeed's other wrappers
Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def options(ds_files: Path, small_base: Path, mixed_manifest: Path) -> Options:
    def make(output_dir: Path, ds_name: str, grad_accum: int, more: str) -> list[str]:
        return (
            f"--deepspeed {ds_files}/{ds_name}.json --output_dir {output_dir} --base_ckpt {small_base} "
            f"--precision fp32 --train_manifest {mixed_manifest} --val_split 0 --allow_text_targets --batch_size 1 "
            f"--grad_accum {grad_accum} --max_steps {STEPS} --lr {LR} --lr_scheduler_type linear --warmup_ratio 0.2 "
            f"--weight_decay {DECAY} --log_steps 1 --save_steps {1 if grad_accum == 4 else 3} {more}"
        ).split()

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, options: Options) -> Path:
    """Runs in KIND/alone and KIND/FILE, those in bf16 in KIND/FILE-bf16, and resumed ones in KIND/FILE-again."""
    root = tmp_path_factory.mktemp("rates")
    train_runs(1, [options(root / kind / "alone", "zero0", 4, more) for kind, more in KINDS.items()])
    lines = [options(root / kind / name, name, 2, KINDS[kind]) for kind, name in ON_TWO_RANKS]
    more = f"{KINDS['groups']} --precision bf16"
    train_runs(2, [*lines, *(options(root / "groups" / f"{name}-bf16", name, 2, more) for name in BF16)])
    for name in BF16:
        shutil.copytree(root / "groups" / f"{name}-bf16", root / "groups" / f"{name}-again")
        shutil.rmtree(root / "groups" / f"{name}-again" / f"checkpoint-{STEPS}")
    more += " --resume auto"
    train_runs(2, [options(root / "groups" / f"{name}-again", name, 2, more) for name in BF16])
    return root


def learned(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = run / f"checkpoint-{step}"
    return load_file(folder / (MASTERS if (folder / MASTERS).is_file() else ADAPTER))


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def groups_by_hand(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The groups of KINDS["groups"], by the names of PEFT's parameters."""
    rates = {"self_attn": 4e-4, r"\d\.mlp": LR, "audio_mlp": 2e-3}
    groups = []
    for module, rate in rates.items():
        for factor, lr in (("lora_A", rate), ("lora_B", 4 * rate)):
            found = [p for name, p in model.named_parameters() if re.search(rf"{module}\..*{factor}", name)]
            groups.append({"params": found, "lr": lr})
    assert len([p for group in groups for p in group["params"]]) == sum(p.requires_grad for p in model.parameters())
    return torch.optim.AdamW(groups, weight_decay=DECAY)


def by_peft(model: torch.nn.Module) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {"loraplus": by_peft, "groups": groups_by_hand}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.usefixtures("lone_rank")
def test_adapters_against_plain_peft(
    runs: Path, small_base: Path, mixed_manifest: Path, cache_dir: Path, kind: str
) -> None:
    """The first step has a learning rate of 0, so that its checkpoint holds the adapter from which both start."""
    run = runs / kind / "alone"
    model = PeftModel.from_pretrained(load(small_base), run / "checkpoint-1" / "lora_adapters", is_trainable=True)
    optimizer = OPTIMIZERS[kind](model)
    windows = windows_of(small_base, mixed_manifest, cache_dir, STEPS)
    losses = plain_steps(model.get_base_model(), windows, optimizer, SHARES)
    assert [line["train/loss"] for line in read_metrics(run)] == pytest.approx(losses, abs=2e-5)
    trained = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    start = learned(run, 1)
    assert differences(start, trained) > 2 * LR  # the way of a B factor, of one with --lr at most about 2 LR
    assert differences(learned(run), trained) < 2e-5


@pytest.mark.usefixtures("lone_rank")
def test_full_fine_tuning_against_plain_torch(
    runs: Path, small_base: Path, mixed_manifest: Path, cache_dir: Path
) -> None:
    run, model = runs / "full" / "alone", load(small_base)
    patterns = {"audio_mlp|audio_post_attention": 2e-3, r"_head|^model\.norm": 1e-4, "embed_": 5e-4, "": LR}
    parameters, groups = dict(model.named_parameters()), []
    for pattern, lr in patterns.items():
        found = [parameters.pop(name) for name in list(parameters) if re.search(pattern, name)]
        groups.append({"params": found, "lr": lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    losses = plain_steps(model, windows_of(small_base, mixed_manifest, cache_dir, STEPS), optimizer, SHARES)
    assert [line["train/loss"] for line in read_metrics(run)] == pytest.approx(losses, abs=5e-5)
    assert differences(learned(run), {name: p.detach() for name, p in model.named_parameters()}) < 5e-5


@pytest.mark.parametrize(("kind", "name"), ON_TWO_RANKS)
def test_same_on_ranks_and_stages(runs: Path, kind: str, name: str) -> None:
    expected, found = (read_metrics(runs / kind / folder) for folder in ("alone", name))
    for key in ("train/loss", "grad_norm"):
        values = [[line[key] for line in lines] for lines in (expected, found)]
        assert values[1] == pytest.approx(values[0], rel=1e-4), key
    assert [{key: line[key] for key in line if key.startswith("lr")} for line in found] == [
        {key: line[key] for key in line if key.startswith("lr")} for line in expected
    ]
    assert differences(learned(runs / kind / "alone"), learned(runs / kind / name)) < 5e-5


@pytest.mark.parametrize("name", BF16)
def test_bf16_follows_and_resumes_to_the_last_bit(runs: Path, name: str) -> None:
    expected, whole, again = (runs / "groups" / folder for folder in ("alone", f"{name}-bf16", f"{name}-again"))
    losses = [[line["train/loss"] for line in read_metrics(run)] for run in (expected, whole, again)]
    assert losses[1] == pytest.approx(losses[0], abs=0.03)
    assert losses[2] == losses[1]
    assert differences(learned(whole), learned(again)) == 0
    moments = [load_file(run / f"checkpoint-{STEPS}" / "optimizer.safetensors") for run in (whole, again)]
    assert differences(*moments) == 0
    rates = [[{key: line[key] for key in line if key.startswith("lr")} for line in read_metrics(run)]
             for run in (whole, again)]  # fmt: skip
    assert rates[0] == rates[1]


def test_logged_rates(runs: Path) -> None:
    """--lr is always logged; besides it, only what has another learning rate."""
    peaks = {"lr/attention": 4e-4, "lr/audio_mlp": 2e-3}
    peaks |= {f"{group}/lora_B": 4 * lr for group, lr in peaks.items()} | {"lr": LR, "lr/lora_B": 4 * LR}
    for kind, expected in (("groups", peaks), ("loraplus", {"lr": LR, "lr/lora_B": RATIO * LR})):
        for line, share in zip(read_metrics(runs / kind / "alone"), SHARES, strict=True):
            rates = {key: value for key, value in line.items() if key.startswith("lr")}
            assert rates == pytest.approx({name: lr * share for name, lr in expected.items()}, abs=1e-12)


def test_made_longer_and_with_other_rates(runs: Path, options: Options, tmp_path: Path) -> None:
    shutil.copytree(runs / "groups" / "alone", tmp_path / "run")
    line = [*RANDOM, *options(tmp_path / "run", "zero0", 4, f"{KINDS['groups']} --resume auto --no_report")]
    at = line.index("--max_steps") + 1
    longer = run_script("train", [*line[:at], "9", *line[at + 1 :]], tmp_path)
    assert longer.returncode == 0, longer.stderr
    assert "learning rate (linear) of step 6 is 0.0005, 0.0002, 0.0008, 0.001, 0.004, 0.002, and was to be 0, 0, " in (
        longer.stdout.replace("\n", " ")
    )
    other = run_script("train", [word.replace("=4e-4", "=5e-4") for word in line], tmp_path)
    assert other.returncode == 2
    assert "was trained with group_lr ['attention=4e-4', 'audio_mlp=2e-3'], but this run has ['attention=5e-4'" in (
        other.stderr
    )


PREFIX = "base_model.model.model.layers.3."


@pytest.mark.parametrize(
    ("name", "parts", "group"),
    [
        (f"{PREFIX}self_attn.q_proj.lora_A.weight", False, "attention"),
        (f"{PREFIX}mlp.up_proj.lora_B.weight", False, "text_mlp"),
        (f"{PREFIX}audio_mlp.up_proj.lora_magnitude_vector", False, "audio_mlp"),
        (f"{PREFIX}audio_attn.q_proj.lora_A.weight", False, "attention"),  # adapters on a base that has the part
        (f"{PREFIX}audio_attn.q_proj.weight", True, "audio_self_attention"),
        (f"{PREFIX}audio_post_audio_attn_layer_norm.weight", True, "audio_self_attention"),
        ("base_model.model.model.audio_tower.layers.0.self_attn.q_proj.weight", True, "whisper_conditioning"),
        ("base_model.model.text_lm_head.weight", False, "heads"),
        ("model.embed_audio_tokens.weight", False, "embeddings"),
        ("model.layers.0.post_attention_layernorm.weight", False, "text_mlp"),
    ],
)
def test_groups_of_names(name: str, parts: bool, group: str) -> None:
    assert group_of_trained(name, Parts(True, {"d_model": 8}) if parts else Parts()) == group


def test_without_the_options_there_is_one_group() -> None:
    trained = {f"{PREFIX}{name}": torch.nn.Parameter(torch.zeros(1)) for name in ("mlp.up_proj.lora_A.weight",
               "self_attn.q_proj.lora_B.weight", "audio_mlp.up_proj.lora_A.weight")}  # fmt: skip
    (group,) = parameter_groups(OptimOptions(), trained)
    assert all(one is other for one, other in zip(group["params"], trained.values(), strict=True))
