"""Full fine-tuning: gradients of every weight compared with transformers' forward and autograd, groups, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import native_inputs, whisper_folder
from test_routed_layers import BATCHES, CPU, batch_of

from higgs_ds.common.errors import InputError
from higgs_ds.data.collate import Batch
from higgs_ds.model import head_loss
from higgs_ds.model.config import read_config, tower_geometry, with_parts
from higgs_ds.model.full import describe, group_of, make_trainable, unfreeze_groups
from higgs_ds.model.loading import empty_model, load_base, num_parameters
from higgs_ds.model.parts import NO_PARTS, Parts
from higgs_ds.model.recomputation import checkpoint_layers
from higgs_ds.model.v2.loss_model import DualLossModel
from higgs_ds.options.checks import check_options
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.fields import FULL, TRAIN_GROUPS
from higgs_ds.options.train import LoraOptions, TrainOptions, TuneOptions

HEAD_WEIGHTS = torch.tensor([0.7, 0.3, 0.2, 0.1, 0.4, 0.5, 0.6, 0.8, 0.9])


def plain_loss(native: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Compute the loss by transformers' forward over all positions and torch's cross entropy."""
    inputs = native_inputs(batch, native.config.audio_token_id)
    hidden = native.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    text, audio = (hidden[batch.positions[places]] for places in (batch.text_places, batch.audio_places))
    text_loss = F.cross_entropy(native.text_lm_head(text), batch.text_targets, reduction="sum")
    logits = native.audio_lm_head(audio).view(len(audio), 8, native.config.codebook_size)
    audio_losses = [F.cross_entropy(logits[:, k], batch.audio_targets[:, k], reduction="sum") for k in range(8)]
    return (torch.stack([text_loss, *audio_losses]) * HEAD_WEIGHTS).sum()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_gradients_of_every_weight(
    base: Path, kind: str, chunks: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with heads in chunks of a few rows and classes."""
    if chunks:
        monkeypatch.setattr(head_loss, "CPU_CHUNKS", head_loss.Chunks(1000, 100, 1000))
    batch = batch_of(*BATCHES[kind])
    native = load_base(base, torch.float32).requires_grad_().train()
    expected = plain_loss(native, batch)
    expected.backward()
    trained = unfreeze_groups(load_base(base, torch.float32), TRAIN_GROUPS)
    if recompute:
        checkpoint_layers(trained, 1)
    model = DualLossModel(trained).train()
    found, *_ = model(**batch.tensors(CPU), target_weights=HEAD_WEIGHTS)
    (2 * found.sum()).backward()
    torch.testing.assert_close(found.sum(), expected, rtol=1e-6, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in model.higgs.named_parameters()}
    for name, parameter in native.named_parameters():
        gradient = gradients[name]
        assert gradient is not None, name  # ZeRO waits for the gradient of each parameter
        plain = torch.zeros_like(parameter) if parameter.grad is None else 2 * parameter.grad
        assert (gradient - plain).abs().max() <= 1e-5 * plain.abs().max(), name


@pytest.mark.parametrize("group", TRAIN_GROUPS)
def test_one_group_alone(base: Path, group: str) -> None:
    """A group trained alone gets the same gradients as when all are trained, and no other weight gets one."""
    batch = batch_of(*BATCHES["speech and text"])
    found = {}
    for groups in ((group,), TRAIN_GROUPS):
        model = DualLossModel(unfreeze_groups(load_base(base, torch.float32), groups)).train()
        model(**batch.tensors(CPU), target_weights=HEAD_WEIGHTS)[0].sum().backward()
        found[groups] = {n: p.grad for n, p in model.higgs.named_parameters() if p.grad is not None}
    of_group = {name: gradient for name, gradient in found[TRAIN_GROUPS].items() if group_of(name) == group}
    assert found[group,].keys() == of_group.keys()
    assert all(gradient.any() for gradient in of_group.values())
    for name, gradient in of_group.items():
        # Frozen projections are fused, so that sums are rounded in another order.
        assert (found[group,][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_bf16_follows_float32(base: Path) -> None:
    batch = batch_of(*BATCHES["speech and text"])
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = DualLossModel(unfreeze_groups(load_base(base, dtype), TRAIN_GROUPS)).train()
        model(**batch.tensors(CPU), target_weights=HEAD_WEIGHTS)[0].sum().backward()
        gradients.append({name: p.grad for name, p in model.higgs.named_parameters()})
    for name, plain in gradients[0].items():
        found = gradients[1][name]
        assert found.dtype == torch.bfloat16
        assert (found - plain).norm() <= 0.05 * plain.norm(), name


def test_every_weight_is_in_one_group(base: Path) -> None:
    config = read_config(base)
    names = [name for name, _ in empty_model(config, torch.float32).named_parameters()]
    assert config.dtype == torch.bfloat16  # unchanged
    groups = {name: group_of(name) for name in names}
    assert set(groups.values()) == set(TRAIN_GROUPS)
    for name, group in {
        "model.layers.1.input_layernorm.weight": "attention",
        "model.layers.1.audio_input_layernorm.weight": "attention",
        "model.layers.1.post_attention_layernorm.weight": "text_mlp",
        "model.layers.1.audio_post_attention_layernorm.weight": "audio_mlp",
        "model.layers.0.audio_mlp.up_proj.weight": "audio_mlp",
        "model.layers.0.mlp.up_proj.weight": "text_mlp",
        "model.norm.weight": "heads",
        "model.embed_audio_tokens.embed_audio_tokens.weight": "embeddings",
    }.items():
        assert groups[name] == group


def test_optional_parts(base: Path, tmp_path: Path) -> None:
    """Audio self-attention is in group `attention`, the tower in none. With its option, each part is always trained."""
    parts = Parts(True, tower_geometry(whisper_folder(tmp_path / "whisper")))
    config = with_parts(read_config(base), parts)

    def trained(groups: tuple[str, ...], full_parts: Parts) -> set[str]:
        model = unfreeze_groups(empty_model(config, torch.float32), groups, full_parts)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    everything = trained(TRAIN_GROUPS, parts)
    assert len(everything) == len(list(empty_model(config, torch.float32).parameters()))
    of_tower = {name for name in everything if "audio_tower" in name or "audio_encoder_proj" in name}
    assert trained(TRAIN_GROUPS, NO_PARTS) == everything - of_tower
    assert any("audio_attn" in name for name in trained(("attention",), NO_PARTS))
    alone = trained(("heads",), parts)
    assert of_tower < alone
    assert any("audio_post_audio_attn_layer_norm" in name for name in alone)
    assert {group_of(name) for name in alone} == {None, "attention", "heads"}


def test_a_weight_of_two_groups_is_refused(base: Path) -> None:
    model = load_base(base, torch.float32)
    model.text_lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(InputError, match="shares one weight between two groups"):
        unfreeze_groups(model, ("heads",))
    assert unfreeze_groups(model, ("heads", "embeddings")).text_lm_head.weight.requires_grad


def test_description(base: Path) -> None:
    """The described numbers equal torch's counts."""
    model = empty_model(read_config(base), torch.float32)
    whole = sum(parameter.numel() for parameter in model.parameters())
    heads = model.text_lm_head.weight.numel() + model.audio_lm_head.weight.numel() + model.model.norm.weight.numel()
    tune = TuneOptions(FULL, ("heads",))
    ready = make_trainable(model, tune, LoraOptions(), "", torch.float32)
    line = describe(ready, tune, num_parameters(base))
    assert line == f"full fine-tuning: {heads:,} of {whole:,} parameters ({heads / whole:.2%}): heads {heads:,}"


def test_load_in_4bit_equals_qlora() -> None:
    for line in ("--finetune qlora", "--load_in_4bit", "--finetune lora --load_in_4bit"):
        options, _ = parse_train_options(line.split())
        assert (options.tune.finetune, options.model.load_in_4bit) == ("qlora", True)
    assert parse_train_options([])[0].tune == TuneOptions()
    assert not parse_train_options(["--finetune", "full"])[0].model.load_in_4bit


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ("--finetune full", []),
        ("--finetune full --load_in_4bit", ["--load_in_4bit: 4-bit weights cannot be trained with --finetune full"]),
        (
            "--finetune full --lora_r 8 --use_dora --lora_targets attention --load_in_4bit",
            [
                "--load_in_4bit: ",
                "--lora_r: only applies to adapters, ",
                "--lora_targets: only applies to adapters",
                "--use_dora: only applies to adapters",
            ],
        ),
        (
            "--finetune full --offload_embeddings",
            ["--offload_embeddings: trained embeddings cannot be in host"],
        ),
        ("--finetune full --offload_embeddings --train_groups attention heads", []),
        (
            "--train_groups attention",
            ["--train_groups: only applies to --finetune full; use --lora_targets, and --also_train, for adapters"],
        ),
        ("--finetune full --merge_adapter_with_base --push_to_hub --hub_repo_id a/b --upload_merged_model", []),
    ],
)
def test_options_that_go_together(line: str, problems: list[str]) -> None:
    found = check_options(parse_train_options(line.split())[0])
    assert len(found) == len(problems), found
    assert all(problem.startswith(words) for problem, words in zip(found, problems, strict=True)), found


def test_no_group_and_an_unknown_group(capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = check_options(TrainOptions().replace(finetune="full", train_groups=()))
    assert problem.startswith("--train_groups: nothing would be trained; name one or more of attention, text_mlp")
    for given in (["norms"], []):
        with pytest.raises(SystemExit) as caught:
            parse_train_options(["--finetune", "full", "--train_groups", *given])
        assert caught.value.code == 2
    assert "argument --train_groups: invalid choice: 'norms' (choose from" in capsys.readouterr().err
