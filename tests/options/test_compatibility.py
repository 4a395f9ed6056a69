"""The support table of docs/small_cards.md: every pair marked yes is trained here, and every other one is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, read_metrics
from launcher import RANDOM, run_script, train_runs

BASES = {
    "bf16": "--precision bf16",
    "fp16": "--precision fp16",
    "fp32": "--precision fp32",
    "nf4": "--precision bf16 --load_in_4bit",
}
DS_CONFIGS = sorted(path.stem for path in (PROJECT / "ds_configs").glob("*.json"))
CHECKPOINTING = ("none", "every_layer")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, small_base: Path) -> Path:
    """Train two steps of every pair on two ranks, in folders BASE-FILE-CHECKPOINTING; stage 3 shards all weights."""
    root = tmp_path_factory.mktemp("support")
    runs = []
    for name in DS_CONFIGS:
        values = json.loads((PROJECT / "ds_configs" / f"{name}.json").read_text())
        if values["zero_optimization"]["stage"] == 3:
            values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (root / f"{name}.json").write_text(json.dumps(values))
        for base, option in BASES.items():
            for checkpointing in CHECKPOINTING:
                more = "--offload_embeddings --offload_checkpoints" if checkpointing == "every_layer" else ""
                runs.append(
                    f"--deepspeed {root}/{name}.json --output_dir {root}/{base}-{name}-{checkpointing} {option} {more} "
                    f"--train_manifest {mixed_manifest} --val_split 0 --allow_text_targets --batch_size 1 "
                    f"--grad_accum 1 --max_steps 2 --lr 5e-3 --lora_dropout 0 --log_steps 1 --base_ckpt {small_base} "
                    f"--activation_checkpointing {checkpointing}".split()
                )
    train_runs(2, runs)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", DS_CONFIGS)
@pytest.mark.parametrize("held", BASES)
def test_supported(results: Path, held: str, name: str, checkpointing: str) -> None:
    expected, found = (
        [line["train/loss"] for line in read_metrics(results / run)]
        for run in (f"{held}-zero2-none", f"{held}-{name}-{checkpointing}")
    )
    assert len(found) == 2
    assert found == pytest.approx(expected, abs=1e-5 if held == "fp32" else 0.02)
    assert found[1] != found[0]


def test_table_in_the_documents() -> None:
    """The table lists every DeepSpeed file, and marks each pair with a base and with checkpointing as yes."""
    rows = re.findall(
        r"^\| `(\w+)\.json` \|((?: yes \|)+)$", (PROJECT / "docs" / "small_cards.md").read_text(), re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == DS_CONFIGS
    assert {cells.count("yes") for _, cells in rows} == {len(BASES) * len(CHECKPOINTING)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--use_dora --deepspeed {root}/zero3.json", "--use_dora: not supported at ZeRO stage 3"),
        ("--use_dora --lora_bias --load_in_4bit", "--use_dora and --lora_bias: PEFT treats the bias as a part"),
        ("--lora_bias", "--lora_bias: the base's layers in attention, text_mlp, audio_mlp have no bias"),
        (
            "--optim adamw_8bit --deepspeed {root}/zero2_offload.json",
            "offload_optimizer keeps the state in host memory",
        ),
        pytest.param(
            "--attn_implementation flash_attention_2 --precision fp32",
            "--attn_implementation flash_attention_2: needs a GPU, and this machine has none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (
            "--offload_checkpoints",
            "--offload_checkpoints: --activation_checkpointing none recomputes no layers",
        ),
        pytest.param(
            "--precision fp16",
            "--precision fp16: needs a GPU, and this machine has none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("--finetune full --load_in_4bit --lora_r 8", "--load_in_4bit: 4-bit weights cannot be trained with"),
        (
            "--finetune full --load_in_4bit --lora_r 8",
            "--lora_r: only applies to adapters, and --finetune full trains none",
        ),
        pytest.param(
            "--optim paged_adamw",
            "--optim paged_adamw: pages GPU memory, and this machine has no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_refused(tmp_path: Path, options: str, reason: str) -> None:
    line = f"--output_dir {tmp_path}/out {options.format(root=PROJECT / 'ds_configs')}"
    done = run_script("train", [*RANDOM, *line.split()], tmp_path)
    assert done.returncode == 2, done
    assert reason in done.stderr
    assert not done.stdout  # nothing was loaded
    assert not (tmp_path / "out").exists()
