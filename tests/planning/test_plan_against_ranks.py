"""Compare the plan for weights, gradients and optimizer state with counted bytes of real runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launcher import RANDOM, overriding, start_ranks

from higgs_ds.options.command_line import parse_train_options
from higgs_ds.planning.dry_run import make_setting
from higgs_ds.planning.plan import plan

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent.parent / "plan_worker.py"
TOLERANCE = 0.05
# Ranks, ZeRO stage, options.
SETTINGS = [
    (1, 0, ""),
    (1, 0, "--precision fp32 --lora_r 8 --lora_targets attention"),
    (1, 1, "--load_in_4bit"),
    (1, 2, "--load_in_4bit --offload_embeddings"),
    (1, 3, "--precision fp32"),
    (2, 0, "--lora_targets audio_mlp"),
    (2, 1, "--precision fp32 --lora_r 4 --lora_targets audio_mlp"),
    (2, 1, ""),
    (2, 2, "--lora_r 32 --offload_embeddings"),
    (2, 3, "--precision fp32 --lora_r 5"),
    (1, 0, "--finetune full"),
    (1, 1, "--finetune full --precision fp32"),
    (1, 2, "--finetune full"),
    (2, 0, "--finetune full --precision fp32 --train_groups attention heads --offload_embeddings"),
    (2, 1, "--finetune full"),
    (2, 2, "--finetune full --train_groups audio_mlp embeddings"),
    (2, 3, "--finetune full"),
    (2, 3, "--finetune full --precision fp32 --train_groups text_mlp heads"),
    (1, 0, "--precision fp32 --ema_decay 0.99 --lora_r 4"),
    (2, 1, "--ema_decay 0.99 --loraplus_lr_ratio 16 --lora_targets attention"),
    (2, 2, "--ema_decay 0.99 --loraplus_lr_ratio 16 --group_lr attention=1e-4 audio_mlp=1e-3"),
    (2, 3, "--precision fp32 --ema_decay 0.99 --loraplus_lr_ratio 16"),
    (1, 2, "--precision fp16 --load_in_4bit"),
    (1, 0, "--precision fp16 --lora_targets attention"),
    (2, 1, "--precision fp16 --lora_targets audio_mlp"),
    (2, 2, "--precision fp16 --finetune full"),
    (2, 3, "--precision fp16 --lora_r 5"),
    (2, 3, "--load_in_4bit --lora_targets attention audio_mlp"),
    (2, 2, "--also_train heads --lora_r 8"),
    (2, 3, "--also_train embeddings heads --load_in_4bit"),
]


@pytest.fixture(scope="module")
def counted(
    tmp_path_factory: pytest.TempPathFactory, base: Path, ds_file: Callable[[int], Path]
) -> dict[tuple[int, int, str], dict[str, int]]:
    """Bytes by part on rank 0, for each setting."""
    root = tmp_path_factory.mktemp("planner")
    results = {}
    for ranks in (1, 2):
        settings = [setting for setting in SETTINGS if setting[0] == ranks]
        lines = [command(stage, options, ds_file) for _, stage, options in settings]
        output = root / f"{ranks}.json"
        worker = [sys.executable, str(WORKER), json.dumps(lines), str(output)]
        processes = start_ranks(ranks, worker)
        try:
            texts = [process.communicate(timeout=600)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), texts[0][-6000:]
        results |= dict(zip(settings, json.loads(output.read_text()), strict=True))
    return results


def command(stage: int, options: str, ds_file: Callable[[int], Path]) -> list[str]:
    return f"--deepspeed {ds_file(stage)} --batch_size 1 --grad_accum 2 {options}".split()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s[0]}-ranks-stage-{s[1]}{s[2].replace(' ', '_')}")
def test_plan_against_counted_bytes(
    counted: dict[tuple[int, int, str], dict[str, int]],
    ds_file: Callable[[int], Path],
    setting: tuple[int, int, str],
) -> None:
    ranks, stage, options = setting
    argv = [*RANDOM, *command(stage, options, ds_file), "--dry_run", "--plan_ranks", str(ranks)]
    memory = plan(make_setting(*parse_train_options(overriding(argv))))
    planned = {
        "frozen": sum(memory.weights.values()),
        "quantization": memory.quantization,
        "trained": memory.trained,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "host": memory.host.get("embeddings", 0),
    }
    found = counted[setting]
    print({name: (planned[name], found[name]) for name in planned})
    assert found["other_packed"] == 0  # under ZeRO-3, no rank keeps gathered weights
    for name, size in planned.items():
        assert size == pytest.approx(found[name], rel=TOLERANCE), name


def test_4bit_storage_is_sharded(counted: dict[tuple[int, int, str], dict[str, int]]) -> None:
    whole, half = counted[1, 1, "--load_in_4bit"], counted[SETTINGS[-1]]
    assert half["own_packed"] == whole["own_packed"] / 2 > 0
