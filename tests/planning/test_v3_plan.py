"""The memory plan of Higgs Audio v3: against a real pass, and of the released geometry."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import PROJECT, kept_bytes, speech_batch

from higgs_ds.model import nf4
from higgs_ds.model.families import family_of
from higgs_ds.model.full import make_trainable
from higgs_ds.model.parts import Parts
from higgs_ds.model.recomputation import checkpoint_layers
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.fields import FULL
from higgs_ds.options.train import LoraOptions, TuneOptions
from higgs_ds.planning import dry_run
from higgs_ds.planning.activations import PassSettings, measure_pass
from higgs_ds.planning.plan import CONTEXT_BYTES, plan
from higgs_ds.planning.weights import LORA, model_weights

GIB = 2**30
BIG = PROJECT / "benchmarks" / "4b"
HARDWARE = re.findall(
    r"^\| (\d+) GB \| `(.+)` \| (\S+) GiB \|$",
    (PROJECT / "docs" / "higgs_v3.md").read_text(encoding="utf-8"),
    re.M,
)
assert len(HARDWARE) == 4
FAMILY = family_of("higgs_multimodal_qwen3")
CONFIG = FAMILY.config_of(
    {
        "model_type": "higgs_multimodal_qwen3",
        "text_config": {
            "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 5, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300,
        },
        "audio_encoder_config": {"num_codebooks": 8, "vocab_size": 66},
    }
)  # fmt: skip


@pytest.mark.parametrize("recompute", [None, 1, 2])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "full"])
def test_activations_against_a_real_forward(kind: str, recompute: int | None) -> None:
    settings = PassSettings(
        dtype=torch.float32 if kind in ("fp32", "full") else torch.bfloat16,
        four_bit=kind == "nf4",
        recompute_every=recompute,
        lora=LoraOptions(lora_r=4),
        batch_size=2,
        length=90,
        on_gpu=False,
        keeps_inputs=False,
        tune=TuneOptions(FULL) if kind == "full" else TuneOptions(),
    )
    model = FAMILY.build(CONFIG).to(settings.dtype).requires_grad_(False)
    if settings.four_bit:
        weights = {name: p.data for name, p in model.named_parameters() if nf4.is_quantized_weight(name)}
        nf4.replace_linears(model, settings.dtype)
        for name, weight in weights.items():
            nf4.fill(model.get_submodule(name.rpartition(".")[0]), nf4.quantize(weight, settings.dtype))
    if recompute is not None:
        checkpoint_layers(model, recompute)
    trained = FAMILY.loss_model(make_trainable(model, settings.tune, settings.lora, "", settings.dtype, Parts()))
    trained.train()
    batch = speech_batch(2, 90, settings.text_positions, 8, 64).tensors(torch.device("cpu"))
    batch |= {"target_weights": torch.ones(9)}
    kept = kept_bytes(lambda: trained(**batch), [*trained.parameters(), *trained.buffers(), *batch.values()])
    planned = measure_pass(CONFIG, settings)
    assert planned.activations + planned.logits == pytest.approx(kept, rel=0.15)


def gib_of(options: str) -> float:
    common = f"--dry_run --base_ckpt {BIG} --batch_size 1 --max_seq_len 2048 --activation_checkpointing every_layer"
    return plan(dry_run.make_setting(*parse_train_options(f"{common} {options}".split()))).total / GIB


def test_released_geometry() -> None:
    setting = dry_run.make_setting(*parse_train_options(f"--dry_run --base_ckpt {BIG}".split()))
    weights = model_weights(setting)
    numel = sum(weight.numel * weight.count for weight in weights if weight.group != LORA)
    embeddings = 151_936 * 2560 + 8 * 1026 * 2560
    layer = 2560 * (32 + 2 * 8) * 128 + 32 * 128 * 2560 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert numel == embeddings + 36 * layer + 2560
    assert {weight.group for weight in weights} == {"attention", "text FFN", "norms", "embeddings", "heads", LORA}
    # The table of codes is the head, too, and stays on the device when the text's embedding is offloaded.
    assert [weight.numel for weight in weights if weight.group == "heads"] == [8 * 1026 * 2560]


@pytest.mark.parametrize(("card_gb", "options", "planned_gib"), HARDWARE)
def test_hardware_of_the_document(card_gb: str, options: str, planned_gib: str) -> None:
    """The table's memory is what --dry_run plans for samples of 2,048 positions, and fits its card."""
    common = f"--dry_run --base_ckpt {BIG} --max_seq_len 2048"
    setting = dry_run.make_setting(*parse_train_options(f"{common} {options}".split()))
    total_gib = (plan(setting).total + CONTEXT_BYTES) / GIB
    assert f"{total_gib:.1f}" == planned_gib
    assert total_gib < 0.92 * float(card_gb) * 1e9 / GIB


def test_qlora_and_lora_fit_small_cards() -> None:
    assert gib_of("--load_in_4bit --offload_embeddings --deepspeed small_card.json") < 3.1
    assert gib_of("--load_in_4bit --deepspeed small_card.json") < 5
    assert gib_of("--deepspeed zero2.json") < 9
