"""The benchmarks' count of operations against torch's, a comparison that runs, and the figures in the documents."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import PROJECT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_ds.data.collate import collate
from higgs_ds.model.lora import add_lora
from higgs_ds.model.v2.loss_model import DualLossModel
from higgs_ds.options.train import LoraOptions

BENCHMARKS = PROJECT / "benchmarks"


class TorchsCount(TorchDispatchMode):
    """Count operations with torch's formulas, for each kind of call."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.addmm_.default:  # torch has a formula for addmm only
            self.counts["aten.addmm_"] += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif func.overloadpacket in flop_registry:
            formula = flop_registry[func.overloadpacket]
            self.counts[str(func.overloadpacket)] += formula(*args, **(kwargs or {}), out_val=result)
        return result


def test_operations_against_torchs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts of matmuls are equal, but for inputs of the adapters' second factors, which are computed again.

    Attention is left out, as torch counts its full square and its recomputation.
    """
    monkeypatch.syspath_prepend(BENCHMARKS)
    import random_base
    import sides
    import step_grid

    length, batch_size, heads, dim, layers = 128, 3, 4, 32, 2
    values = {
        "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 2, "head_dim": dim, "vocab_size": 2000,
    }  # fmt: skip
    higgs = HiggsAudioV2ForConditionalGeneration(
        HiggsAudioV2Config(**values, num_codebooks=8, codebook_size=1026, pad_token_id=0), use_text_head=True
    ).requires_grad_(False)
    lora = LoraOptions(lora_r=sides.LORA_R, lora_dropout=0)
    model = DualLossModel(add_lora(higgs, lora, "", torch.float32)).train()
    samples = step_grid.samples({"length": length, "batch": batch_size})
    batch = collate(samples, sides.stream(), random_base.PAD_ID).tensors(torch.device("cpu"))
    with TorchsCount() as counted:
        model(**batch, target_weights=torch.ones(9))[0].sum().backward()
    matmuls = sum(count for op, count in counted.counts.items() if "attention" not in op)
    attention = layers * batch_size * length * 3 * 2 * (length / 2 * 2 * heads * dim)
    of_attention = 3 * values["hidden_size"] + heads * dim
    of_ffn = 2 * values["hidden_size"] + values["intermediate_size"]
    predicting = len(batch["predicting_text"]) + len(batch["predicting_audio"])
    fed = (layers - 1) * batch_size * length + predicting  # positions that pass through the FFNs
    again = 2 * sides.LORA_R * (layers * batch_size * length * of_attention + fed * of_ffn)
    found = step_grid.operations(values, length, batch_size) - attention + again
    print(counted.counts, found, attention)
    assert found == pytest.approx(matmuls, rel=1e-6)


@pytest.mark.slow
def test_train_step_compares() -> None:
    command = (
        "train_step.py --precision fp32 --hidden 64 --layers 1 --vocab 2000 --recompute none --pairs 1 --steps 1 --json"
    ).split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / command[0]), *command[1:]], check=True, capture_output=True, text=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert min(result[name] for name in ("speed_ratio", "memory_ratio")) > 0


@pytest.mark.slow
def test_preference_tuning_helps() -> None:
    """With fewer texts than in the figures: fewer words are wrong, and as much speech ends on its own."""
    options = "--texts 100 --held_out 100 --without_sft --json".split()
    command = [sys.executable, str(BENCHMARKS / "preferences.py"), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    before, after = result["before"], result["dpo"]
    assert before["word_error_rate"] >= 0.2
    assert after["word_error_rate"] < 0.85 * before["word_error_rate"]
    assert after["stop_rate"] >= before["stop_rate"] - 0.02
    assert after["median_pitch_hz"] == pytest.approx(before["reference_median_pitch_hz"], abs=5)


def test_written_figures_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/benchmarks.md equals the generated page, and the README's rows are rows of it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import summary

    page = summary.PAGE.read_text(encoding="utf-8")
    assert page == "\n".join(summary.page()) + "\n", "run python benchmarks/summary.py"
    section = (PROJECT / "README.md").read_text(encoding="utf-8").split("## Speed, memory")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) == 6
    assert set(rows) <= set(page.splitlines())
