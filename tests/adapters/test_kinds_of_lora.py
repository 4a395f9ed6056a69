"""Every kind of LoRA that PEFT trains: merged to what PEFT itself computes, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import config as peft_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_ds.adapters import lora_config, verify
from higgs_ds.adapters.convert import adapter_in_native_names, convert_adapter
from higgs_ds.adapters.load import Adapter, BaseWeights, read_adapter
from higgs_ds.adapters.lora_config import LoraValues
from higgs_ds.adapters.merge import merge
from higgs_ds.adapters.verify import compare_with_peft
from higgs_ds.bases.conversion import rewrite
from higgs_ds.cli import merge as merge_command
from higgs_ds.common.errors import InputError, SaveError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")

ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
CONVERT = (
    "convert it to plain LoRA with PEFT: save_pretrained(NEW_FOLDER, path_initial_model_for_weight_conversion="
    "INITIAL_FOLDER), where INITIAL_FOLDER is the adapter saved before its first training step"
)
MERGE = "merge it with PEFT: PeftModel.from_pretrained, merge_and_unload() and save_pretrained"
UNMERGEABLE = "which cannot be merged here; plain LoRA, rsLoRA and DoRA can"


def load(folder: Path) -> Any:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, dtype=torch.float32).eval()


def random_base(like: Path, folder: Path, dtype: torch.dtype, **values: Any) -> Path:
    config = HiggsAudioV2Config.from_pretrained(like, **values)
    torch.manual_seed(5)
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif name.endswith("_proj.weight"):
                parameter.normal_(std=0.1)  # so that a layer's change reaches the logits
    model.to(dtype).save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((like / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def tiny(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base in float32."""
    return random_base(small_base, tmp_path_factory.mktemp("tiny") / "base", torch.float32)


@pytest.fixture(scope="module")
def biased(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a bias in each linear layer, unlike the released bases."""
    folder = tmp_path_factory.mktemp("biased") / "base"
    return random_base(small_base, folder, torch.float32, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def half(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small base in bfloat16."""
    return random_base(small_base, tmp_path_factory.mktemp("half") / "base", torch.bfloat16)


def outputs(model: nn.Module) -> torch.Tensor:
    """Hidden states, text and audio logits of a sequence of text and frames."""
    higgs: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config, draw = higgs.config, torch.Generator().manual_seed(0)
    ids = torch.cat([torch.arange(10, 22), torch.full((8,), config.audio_token_id)])[None]
    codes = torch.randint(config.codebook_size, (1, 8, config.num_codebooks), generator=draw)
    mask = torch.ones(1, 8, dtype=torch.bool)
    with torch.no_grad():
        hidden = higgs.model(input_ids=ids, audio_input_ids=codes, audio_input_ids_mask=mask).last_hidden_state
        return torch.cat([hidden, higgs.text_lm_head(hidden), higgs.audio_lm_head(hidden)], -1)


def move(model: nn.Module) -> None:
    """Change every trained parameter, in place of training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name:
                parameter *= 1 + 0.2 * torch.rand(parameter.shape)
            else:
                parameter += 0.1 * torch.randn(parameter.shape)


def adapted(base: Path, **options: Any) -> PeftModel:
    torch.manual_seed(6)
    return get_peft_model(load(base), LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | options)))


def saved(model: PeftModel, folder: Path) -> Path:
    """Train an adapter, so to speak, and let PEFT save it."""
    move(model)
    model.save_pretrained(folder)
    return folder


def assert_merges_as_peft(base: Path, adapter: Path, merged: Path) -> None:
    """Merge, and compare outputs with PEFT's unmerged model, and weights with those that PEFT merges."""
    agreement = merge(base, adapter, merged).agreement
    assert agreement is not None
    assert agreement.relative < 1e-5
    model = PeftModel.from_pretrained(load(base), adapter).eval()
    expected = outputs(model)
    assert (expected - outputs(load(base))).abs().max() > 0.1  # far more than the tolerance below
    torch.testing.assert_close(outputs(load(merged)), expected, rtol=0, atol=1e-4)
    weights = load(merged).state_dict()
    for name, weight in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-6)


LAYER_RANKS = {"layers.0.self_attn.q_proj": 2, "v_proj": 3}
MERGED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "on all linear layers and both heads": {"target_modules": "all-linear"},
    "DoRA on all": {"target_modules": "all-linear", "use_dora": True},
    "on layers by an expression": {"target_modules": r"model\.layers\.1\.(self_attn|audio_mlp)\..*_proj"},
    "on some layers": {"layers_to_transform": [1]},
    "ranks": {"rank_pattern": LAYER_RANKS},
    "alphas": {"alpha_pattern": {r".*\.1\.self_attn\.v_proj": 20, "v_proj": 2, "proj": 99}},
    "ranks and alphas": {"rank_pattern": {"^model.layers.1.*": 6}, "alpha_pattern": {"q_proj": 3.5}},
    "ranks with rsLoRA": {"rank_pattern": LAYER_RANKS, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "ranks with DoRA": {"rank_pattern": LAYER_RANKS, "alpha_pattern": {"v_proj": 3}, "use_dora": True},
    "ranks of heads": {"target_modules": "all-linear", "rank_pattern": {"audio_lm_head": 7, ".*mlp.*": 1}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "a whole head": {"modules_to_save": ["audio_lm_head"]},
    "whole heads and embeddings": {
        "modules_to_save": ["lm_head", "embed_tokens", "embed_audio_tokens.embed_audio_tokens"]
    },
}


@pytest.mark.parametrize("options", MERGED.values(), ids=MERGED)
def test_merged_as_peft(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    assert_merges_as_peft(tiny, saved(adapted(tiny, **options), tmp_path / "adapter"), tmp_path / "merged")


def test_eva(tiny: Path, tmp_path: Path) -> None:
    """EVA moves ranks between layers, which it records as a rank_pattern, and does not change the base."""
    config = peft_config.EvaConfig(rho=2.0)
    model = adapted(tiny, target_modules=[*ATTENTION, "self_attn.k_proj"], init_lora_weights="eva", eva_config=config)
    batches = [{"input_ids": torch.randint(10, 200, (2, 30))} for _ in range(4)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    assert model.peft_config["default"].rank_pattern
    assert_merges_as_peft(tiny, saved(model, tmp_path / "adapter"), tmp_path / "merged")


# PEFT mistakes the biases for the empty shards of ZeRO-3.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor:UserWarning")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_bias(biased: Path, tmp_path: Path, use_rslora: bool) -> None:
    model = adapted(biased, lora_bias=True, use_rslora=use_rslora, alpha_pattern={"v_proj": 3})
    assert_merges_as_peft(biased, saved(model, tmp_path / "adapter"), tmp_path / "merged")


def with_corda(model: Any) -> Any:
    """Give each target what `preprocess_corda` computes, which needs a package; here the covariance is the identity."""
    for name, module in model.named_modules():
        if name.endswith(tuple(ATTENTION)):
            u, s, v = torch.linalg.svd(module.weight.data, full_matrices=False)
            module.eigens = SimpleNamespace(U_WC=u[:, :4], S_WC=s[:4], V_WC=v.T[:, :4])
    return model


def with_gradients(model: Any) -> Any:
    """Give each target what `preprocess_loraga` computes."""
    for name, module in model.named_modules():
        if name.endswith(tuple(ATTENTION)):
            module._peft_loraga_grad = torch.randn(module.weight.shape)
    return model


CHANGES_BASE: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "pissa": (lambda m: m, {}, f"{CONVERT}. Without INITIAL_FOLDER, {MERGE}"),
    "pissa_niter_2": (lambda m: m, {}, CONVERT),
    "olora": (lambda m: m, {}, f"{CONVERT}. Without INITIAL_FOLDER, {MERGE}"),
    "corda": (with_corda, {"corda_config": peft_config.CordaConfig()}, CONVERT),
    "lora_ga": (with_gradients, {"lora_ga_config": LoraGAConfig()}, CONVERT),
}


def changing_base(base: Path, initialization: str, **options: Any) -> PeftModel:
    prepare, values, _ = CHANGES_BASE[initialization]
    torch.manual_seed(7)
    more = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION} | values | options
    return get_peft_model(prepare(load(base)), LoraConfig(init_lora_weights=initialization, **more))


def refusal(base: Path, adapter: Path, output: Path) -> str:
    with pytest.raises(InputError) as caught:
        merge(base, adapter, output)
    assert not output.exists()
    return str(caught.value)


def message_of(initialization: str, remedy: str) -> str:
    return (
        f"init_lora_weights is '{initialization}': it changed the base's weights before training, and the adapter "
        f"belongs to the changed weights; {remedy}"
    )


@pytest.mark.parametrize("initialization", CHANGES_BASE)
def test_initializations_that_change_the_base(tiny: Path, tmp_path: Path, initialization: str) -> None:
    """Refused as PEFT saves them. Converted by PEFT, they give the trained model's outputs."""
    model = changing_base(tiny, initialization)
    if initialization != "lora_ga":  # there, the loss of accuracy is that of the factors' dtype
        torch.testing.assert_close(outputs(model.eval()), outputs(load(tiny)), rtol=0, atol=1e-3)
    model.save_pretrained(tmp_path / "initial")
    saved(model, tmp_path / "adapter")
    remedy = CHANGES_BASE[initialization][-1]
    message = refusal(tiny, tmp_path / "adapter", tmp_path / "out")
    assert message == f"{tmp_path / 'adapter'}: {message_of(initialization, remedy)}"
    trained = outputs(model.eval())
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert_merges_as_peft(tiny, tmp_path / "converted", tmp_path / "merged")
    torch.testing.assert_close(outputs(load(tmp_path / "merged")), trained, rtol=0, atol=2e-3)
    if MERGE in remedy:
        merged = PeftModel.from_pretrained(load(tiny), tmp_path / "adapter").merge_and_unload()
        torch.testing.assert_close(outputs(merged), trained, rtol=0, atol=2e-3)


def test_the_command_refuses_pissa(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = saved(changing_base(tiny, "pissa"), tmp_path / "adapter")
    options = [
        "--base_model_path",
        str(tiny),
        "--lora_adapter_path",
        str(adapter),
        "--output_path",
        str(tmp_path / "out"),
    ]
    assert merge_command(options) == 2
    assert f"{adapter}: init_lora_weights is 'pissa': it changed the base's weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_converted_with_ranks(tiny: Path, tmp_path: Path) -> None:
    """PEFT doubles the ranks, also those of its patterns."""
    model = changing_base(tiny, "pissa", rank_pattern=LAYER_RANKS, alpha_pattern=LAYER_RANKS)
    model.save_pretrained(tmp_path / "initial")
    move(model)
    trained = outputs(model.eval())
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert_merges_as_peft(tiny, tmp_path / "converted", tmp_path / "merged")
    torch.testing.assert_close(outputs(load(tmp_path / "merged")), trained, rtol=0, atol=2e-3)


def changed(adapter: Path, **values: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return adapter


def unpaired(name: str) -> str:
    return f"base_model.model.{name} does not belong to a LoRA pair"


EMBEDDING = "which cannot be merged here; leave embeddings out of target_modules"
Q = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all biases": ({"bias": "all"}, [f"bias is 'all', {UNMERGEABLE}", unpaired(f"{Q}.base_layer.bias")]),
    "biases": ({"bias": "lora_only"}, [f"bias is 'lora_only', {UNMERGEABLE}", unpaired(f"{Q}.base_layer.bias")]),
    "a whole module": (
        {"modules_to_save": ["model.norm"]},
        [f"modules_to_save is ['model.norm'], {UNMERGEABLE}", unpaired("model.norm.weight")],
    ),
    "an embedding": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        [f"base_model.model.model.embed_tokens.lora_embedding_A is LoRA on an embedding, {EMBEDDING}"],
    ),
    "tokens": ({"trainable_token_indices": [1, 2]}, [f"trainable_token_indices is [1, 2], {UNMERGEABLE}"]),
    "parameters": (
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        [f"target_parameters is ['q_proj.weight'], {UNMERGEABLE}"],
    ),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, [f"alora_invocation_tokens is [1, 2], {UNMERGEABLE}"]),
    "KaSA": (
        {"kasa_config": peft_config.KasaConfig()},
        [f"kasa_config is {{'beta': 0.0001, 'gamma': 0.001}}, {UNMERGEABLE}", unpaired(f"{Q}.lora_diag")],
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(biased: Path, tmp_path: Path, case: str) -> None:
    options, expected = REFUSED[case]
    message = refusal(biased, saved(adapted(biased, **options), tmp_path / "adapter"), tmp_path / "out")
    for problem in expected:
        assert f"{tmp_path / 'adapter'}: {problem}" in message


WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "loftq": (
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        message_of("loftq", f"PEFT cannot convert it to plain LoRA; {MERGE}"),
    ),
    "another case": (
        {"init_lora_weights": "OLoRA"},
        message_of("OLoRA", f"{CONVERT}. Without INITIAL_FOLDER, {MERGE}"),
    ),
    "unknown": (
        {"init_lora_weights": "later"},
        "init_lora_weights is 'later', an initialization that PEFT 0.21.2 does not have, so that it is unknown whether "
        "it changed the base's weights",
    ),
    "number": ({"init_lora_weights": 3}, "init_lora_weights is 3, an initialization that PEFT 0.21.2 does not have"),
    "setting": (
        {"use_later": True},
        "use_later is True, a setting that PEFT 0.21.2 does not have, so that its effect is unknown",
    ),
    "method": ({"peft_type": "LOHA"}, f"peft_type is 'LOHA', {UNMERGEABLE}"),
    "ranks": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj' is 0; it must be a whole number above 0"),
    "rank": ({"r": 5}, f"{Q} has rank 4, but rank 5 in adapter_config.json"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha is '8'; it must be a number"),
    "not an object": ({"alpha_pattern": [1]}, "alpha_pattern is [1]; it must be a JSON object"),
    "expression": ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is not a regular expression"),
    "expression in PEFT's": ({"alpha_pattern": {"(?i)Q": 1}}, "alpha_pattern: '(?i)Q' is not a regular expression"),
    "switch": ({"use_rslora": "no"}, "use_rslora is 'no'; it must be true or false"),
    "DoRA": ({"use_dora": True}, f"{Q} has no tensor for use_dora, which is True in adapter_config.json"),
    "bias": ({"lora_bias": True}, f"{Q} has no tensor for lora_bias, which is True in adapter_config.json"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_refused_as_written(tiny: Path, tmp_path: Path, case: str) -> None:
    values, expected = WRITTEN[case]
    adapter = changed(saved(adapted(tiny), tmp_path / "adapter"), **values)
    assert f"{adapter}: {expected}" in refusal(tiny, adapter, tmp_path / "out")


def test_tables_cover_pefts_settings() -> None:
    """After an upgrade of PEFT, a person decides what each new setting does to a merge."""
    values = {field.name: field for field in dataclasses.fields(LoraValues)}
    tables = [set(lora_config.PLAIN), lora_config.WITHOUT_EFFECT, set(values)]
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert set.union(*tables) == {field.name for field in dataclasses.fields(LoraConfig)}
    peft = LoraConfig()
    for name, plain in lora_config.PLAIN.items():
        assert getattr(peft, name) == (PeftType.LORA if name == "peft_type" else plain), name
    for name in values:
        assert getattr(peft, name) == getattr(LoraValues(), name), name


def test_tables_cover_pefts_initializations() -> None:
    named: set[str] = set()

    def collect(hint: Any) -> None:
        for part in typing.get_args(hint):
            named.update([part] if isinstance(part, str) else [])
            collect(part)

    collect(typing.get_type_hints(LoraConfig)["init_lora_weights"])
    named = {name.replace("[number of iters]", "4") for name in named}
    changing = {*CHANGES_BASE, "loftq", "pissa_niter_4"} - {"pissa_niter_2"}
    keeping = {"gaussian", "eva", "orthogonal", "mica"}
    assert named | {"lora_ga"} == changing | keeping  # PEFT's annotation does not list it
    assert all(lora_config.find_problems({"init_lora_weights": name}, []) for name in changing)
    assert not any(lora_config.find_problems({"init_lora_weights": name}, []) for name in keeping)


@pytest.fixture
def everything(tiny: Path, tmp_path: Path) -> Path:
    """An adapter on all linear layers, with several ranks and alphas."""
    options = {"target_modules": "all-linear", "rank_pattern": LAYER_RANKS, "alpha_pattern": {"text_lm_head": 3}}
    return saved(adapted(tiny, **options), tmp_path / "adapter")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not tensor.equal(found[name])]


def test_both_layouts(tiny: Path, everything: Path, tmp_path: Path) -> None:
    """An adapter on the heads merges into either layout, with the tensor names of either."""
    merge(tiny, everything, tmp_path / "both", export_layout="both")
    native, original = (weights_of(tmp_path / "both" / layout) for layout in ("native", "original"))
    rewrite(tmp_path / "both" / "native", tmp_path / "rewritten", "original", "--input_path")
    assert_same(weights_of(tmp_path / "rewritten"), original)
    before = weights_of(tiny)
    assert {name for name in before if not before[name].equal(native[name])} >= {
        "audio_lm_head.weight",
        "text_lm_head.weight",
    }
    convert_adapter(everything, tmp_path / "renamed", "original")
    assert "base_model.model.audio_decoder_proj.text_lm_head.lora_A.weight" in weights_of(tmp_path / "renamed")
    merge(tiny, tmp_path / "renamed", tmp_path / "again")
    assert_same(weights_of(tmp_path / "again"), native)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "rank_pattern": {r"model\.layers\.0\..*": 2, "text_lm_head": 3}},
        {"target_modules": r"model\.layers\.1\..*_proj", "use_rslora": True},
        {"target_modules": [f"{Q}"], "alpha_pattern": {f"^{Q}": 99}},
        {"layers_to_transform": [1]},
    ],
    ids=["ranks", "expression", "full names", "some layers"],
)
def test_converted_configuration_finds_the_same_layers(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """There and back, PEFT loads the same adapter, although its patterns were those of other names."""
    adapter = saved(adapted(tiny, **options), tmp_path / "adapter")
    expected = outputs(PeftModel.from_pretrained(load(tiny), adapter).eval())
    convert_adapter(adapter, tmp_path / "original", "original")
    renamed = read_adapter(tmp_path / "original")
    assert renamed.scaling == read_adapter(adapter).scaling
    with adapter_in_native_names(tmp_path / "original", renamed) as folder:
        again = PeftModel.from_pretrained(load(tiny), folder).eval()
    torch.testing.assert_close(outputs(again), expected, rtol=0, atol=1e-5)
    merge(tiny, tmp_path / "original", tmp_path / "merged")  # its check loads the adapter with original names
    torch.testing.assert_close(outputs(load(tmp_path / "merged")), expected, rtol=0, atol=1e-4)


def test_self_check_sees_a_changed_base(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the refusal, PiSSA and OLoRA pass the comparison of the logits, but not that with PEFT."""
    monkeypatch.setattr("higgs_ds.adapters.files.find_problems", lambda *_: [])
    for initialization in ("pissa", "olora"):
        adapter = saved(changing_base(tiny, initialization), tmp_path / initialization)
        with pytest.raises(SaveError, match=f"{Q}.weight differs from what PEFT makes of"):
            merge(tiny, adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_self_check_sees_a_wrong_scaling(
    tiny: Path, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models that the logits compare would have the same mistake."""
    monkeypatch.setattr(LoraValues, "scaling", lambda self, layer: self.lora_alpha / self.r)
    with pytest.raises(SaveError, match="differs from what PEFT makes of"):
        merge(tiny, everything, tmp_path / "merged")


def test_self_check_sees_what_peft_does_not_load(tiny: Path, tmp_path: Path) -> None:
    adapter = changed(saved(adapted(tiny), tmp_path / "adapter"), target_modules=["q_proj"])
    with pytest.raises(SaveError, match=r"PEFT cannot load model.layers.0.self_attn.v_proj"):
        merge(tiny, adapter, tmp_path / "merged")


@pytest.fixture(params=["tiny", "half"])
def merged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path, Adapter]:
    """A base in float32 or bfloat16, the merged folder and its adapter, on all linear layers."""
    base = request.getfixturevalue(request.param)
    adapter = saved(adapted(base, target_modules="all-linear", use_dora=True), tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    return base, tmp_path / "merged", adapter, read_adapter(adapter)


@pytest.mark.parametrize("name", [f"{Q}.weight", "model.layers.0.audio_mlp.down_proj.weight", "text_lm_head.weight"])
def test_comparison_with_peft_sees_small_changes(
    merged: tuple[Path, Path, Path, Adapter], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The last row lacks a tenth of what the adapter adds, or all rows a fiftieth. PEFT merges 100 rows at a time."""
    base, folder, adapter_folder, adapter = merged
    monkeypatch.setattr(verify, "ROWS_AT_ONCE", 64 * 100)
    own = BaseWeights(None, dequantized=False)
    compare_with_peft(base, folder, adapter_folder, adapter, own)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    added = tensors[name].float() - load_file(base / "model.safetensors")[name].float()
    correct = tensors[name]
    wrong_row = correct.clone()
    wrong_row[-1] -= (0.1 * added[-1]).to(correct.dtype)
    for wrong in (wrong_row, (correct.float() - 0.02 * added).to(correct.dtype)):
        save_file(tensors | {name: wrong}, path)
        with pytest.raises(SaveError, match=f"{name} differs from what PEFT makes of"):
            compare_with_peft(base, folder, adapter_folder, adapter, own)


def test_comparison_with_peft_of_a_dequantized_merge(half: Path, tmp_path: Path) -> None:
    """PEFT gets the weights that the merge is made into, not the base's own."""
    adapter = saved(adapted(half, target_modules="all-linear"), tmp_path / "adapter")
    merge(half, adapter, tmp_path / "merged", merge_base="dequantized")
    read = read_adapter(adapter)
    with pytest.raises(SaveError, match="differs from what PEFT makes of"):
        compare_with_peft(half, tmp_path / "merged", adapter, read, BaseWeights(None, dequantized=False))


def test_comparison_with_peft_is_of_few_layers(tiny: Path, everything: Path) -> None:
    """One layer of each kind, and one of each further rank or scaling."""
    names = verify._layers_to_compare(read_adapter(everything))
    assert len(names) == len(set(names)) <= 10 + 2 + 3
    assert {"audio_lm_head.weight", "text_lm_head.weight", f"{Q}.weight"} <= set(names)


def test_loading_adapters_does_not_import_peft() -> None:
    import subprocess
    import sys

    code = (
        "import higgs_ds.adapters.load, higgs_ds.adapters.save, higgs_ds.adapters.convert, higgs_ds.adapters.merge, "
        "sys; assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
