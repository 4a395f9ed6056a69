"""launch/blend.py and --lora_scale, compared with weights that plain torch has summed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_kinds_of_lora import Q, adapted, biased, load, outputs, random_base, saved, tiny

from higgs_ds.adapters.blend import blend
from higgs_ds.adapters.convert import adapter_in_native_names, convert_adapter
from higgs_ds.adapters.load import read_adapter
from higgs_ds.adapters.merge import merge
from higgs_ds.adapters.save import AdapterFormat, write_adapter
from higgs_ds.cli import blend as blend_command
from higgs_ds.cli import merge as merge_command
from higgs_ds.common.errors import InputError
from higgs_ds.model.fully_trained import FullyTrained
from higgs_ds.model.parts import Parts
from higgs_ds.model.quantization import BaseQuantization
from higgs_ds.options.commands import BlendOptions

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
__all__ = ["biased", "tiny"]  # fixtures

# Different ranks, alphas, kinds of scaling, targets, and patterns of ranks and of layers.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {
        "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["audio_mlp.up_proj", "self_attn.v_proj"],
    },
    "everything": {
        "r": 2, "target_modules": "all-linear", "rank_pattern": {"layers.0.self_attn.q_proj": 5, "v_proj": 3},
        "alpha_pattern": {"text_lm_head": 3},
    },
    "one layer": {"r": 6, "target_modules": ["q_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter of each kind, with random factors."""
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: saved(adapted(tiny, **options), folder / f"a={kind}") for kind, options in KINDS.items()}


def change(adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, in float64, from its files and PEFT's rules alone: alpha / r or sqrt(r)."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    config, tensors = LoraConfig.from_pretrained(adapter), load_file(adapter / "adapter_model.safetensors")
    changes = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
            product = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
            changes[f"{layer}.weight"] = alpha / (math.sqrt(rank) if config.use_rslora else rank) * product
    return changes


def summed(parts: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in parts:
        for name, added in change(adapter).items():
            total[name] = total.get(name, 0) + weight * added
    return total


def plain_model(base: Path, parts: list[tuple[Path, float]]) -> Any:
    """The base, to whose weights plain torch has added what the adapters add."""
    model = load(base)
    weights = model.state_dict()
    for name, added in summed(parts).items():
        weights[name] += added.to(weights[name].dtype)
    return model


def blended(folder: Path, parts: list[tuple[Path, float]], **options: Any) -> Path:
    blend(BlendOptions(tuple(f"{adapter}={weight}" for adapter, weight in parts), folder, **options))
    return folder


def as_peft_loads(base: Path, adapter: Path) -> torch.Tensor:
    with adapter_in_native_names(adapter, read_adapter(adapter)) as folder:
        return outputs(PeftModel.from_pretrained(load(base), folder).eval())


BLENDS = {
    "ranks and scalings": {"plain": 0.7, "rslora": 0.3},
    "negative": {"everything": -0.5, "rslora": 1.5, "plain": 0.25},
    "some layers": {"plain": 0.5, "one layer": 0.5},
    "all": {"plain": 0.4, "rslora": 0.3, "everything": 0.2, "one layer": -1.0},
    "one": {"rslora": 2.0},
    "weight 0": {"plain": 1.0, "everything": 0.0},
}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Float32's own error is about 4e-6 here, with values of up to 4."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", BLENDS)
def test_is_the_sum(tiny: Path, adapters: dict[str, Path], tmp_path: Path, case: str) -> None:
    """In plain PEFT and merged, and both again from a blend of adapters in the original layout."""
    parts = [(adapters[kind], weight) for kind, weight in BLENDS[case].items()]
    expected = outputs(plain_model(tiny, parts))
    assert (expected - outputs(load(tiny))).abs().max() > 0.05
    native = blended(tmp_path / "native", parts)
    close(outputs(PeftModel.from_pretrained(load(tiny), native).eval()), expected)
    merge(tiny, native, tmp_path / "merged")
    close(outputs(load(tmp_path / "merged")), expected)
    renamed = [(tmp_path / adapter.name, weight) for adapter, weight in parts]
    for (adapter, _), (original, _) in zip(parts, renamed, strict=True):
        convert_adapter(adapter, original, "original")
    original = blended(tmp_path / "original", renamed)
    assert read_adapter(original).in_original_names
    close(as_peft_loads(tiny, original), expected)
    merge(tiny, original, tmp_path / "merged_again")
    close(outputs(load(tmp_path / "merged_again")), expected)


def test_layouts_can_be_mixed_and_chosen(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    convert_adapter(adapters["rslora"], tmp_path / "renamed", "original")
    mixed = [(adapters["plain"], 0.7), (tmp_path / "renamed", 0.3)]
    expected = outputs(plain_model(tiny, [(adapters["plain"], 0.7), (adapters["rslora"], 0.3)]))
    for name, options, is_original in (("mixed", {}, False), ("original", {"to": "original"}, True)):
        made = blended(tmp_path / name, mixed, **options)
        assert read_adapter(made).in_original_names == is_original
        close(as_peft_loads(tiny, made), expected)


def test_ranks_add_up(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Layers of one adapter keep its rank. A weight of 0 adds none. Targets stay as short as they were."""
    made = blended(
        tmp_path / "made", [(adapters["plain"], 0.5), (adapters["rslora"], 0.5), (adapters["everything"], 0)]
    )
    ranks = {name: len(factors.a) for name, factors in read_adapter(made).factors.items()}
    assert {name.split("layers.0.")[1]: rank for name, rank in ranks.items() if "layers.0." in name} == {
        "self_attn.q_proj.weight": 4, "self_attn.v_proj.weight": 7, "audio_mlp.up_proj.weight": 3,
    }  # fmt: skip
    config = json.loads((made / "adapter_config.json").read_text())
    assert config["target_modules"] == ["audio_mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"]
    twice = blended(tmp_path / "twice", [(adapters["plain"], 0.5), (adapters["plain"], 0.5)])
    assert {len(factors.a) for factors in read_adapter(twice).factors.values()} == {8}
    for name, added in change(adapters["plain"]).items():
        torch.testing.assert_close(change(twice)[name], added, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 3, 5, 99])
def test_rank(adapters: dict[str, Path], tmp_path: Path, rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each layer is the truncated SVD of the dense sum, and the error that is printed and in the card is its error."""
    parts = [(adapters["plain"], 0.7), (adapters["rslora"], -1.3)]
    line = [f"{adapter}={weight}" for adapter, weight in parts]
    assert blend_command([*line, "--output_path", str(tmp_path / "made"), "--rank", str(rank)]) == 0
    found, lost, whole, worst = change(tmp_path / "made"), 0.0, 0.0, 0.0
    exact, full = summed(parts), {"q": 4, "v": 7, "u": 3}
    assert found.keys() == exact.keys()
    for name, dense in exact.items():
        u, values, vh = torch.linalg.svd(dense, full_matrices=False)
        best = u[:, :rank] * values[:rank] @ vh[:rank]
        torch.testing.assert_close(found[name], best, rtol=0, atol=1e-6)
        of_layer = len(read_adapter(tmp_path / "made").factors[name].a)
        assert of_layer == min(rank, full[name.split(".")[-2][0]])
        error, size = (dense - best).square().sum(), dense.square().sum()
        lost, whole, worst = lost + error, whole + size, max(worst, float((error / size).sqrt()))
    printed = capsys.readouterr().out
    if rank < 7:
        error = f"{math.sqrt(lost / whole):.2g} of all changes together, at most {worst:.2g} of one ("
    else:
        error = "0 of all changes together, at most 0 of one ("
    assert error in printed
    assert error in (tmp_path / "made" / "README.md").read_text()


def test_command(tiny: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it made, and the printed merge works as it is."""
    made = tmp_path / "made"
    parts = [f"{adapters['plain']}=0.7", f"{adapters['rslora']}=-3e-1"]
    assert blend_command([*parts, "--output_path", str(made)]) == 0
    lines = capsys.readouterr().out.splitlines()
    folder = adapters["plain"].parent.name
    assert lines[0] == f"Sum of changes: 0.7 x {folder}/a=plain + -0.3 x {folder}/a=rslora"
    assert lines[1:4] == [
        "Rank: 3 to 7, in 6 layers",
        "Error: none but rounding to float32",
        f"Blended adapter: {made}",
    ]
    card = (made / "README.md").read_text()
    assert f"`{tiny.name}`" in card
    assert str(tiny.parent) not in card
    assert all(f"- {line}" in card for line in lines[:3])
    assert (
        lines[4] == f'Generate: python launch/generate.py --lora_adapter_path {made} --text "Hello." --output hello.wav'
    )
    command = lines[5].removeprefix("Merge: python launch/merge.py ").replace("MERGED", str(tmp_path / "merged"))
    assert merge_command(command.split()) == 0
    assert blend_command([*parts, "--output_path", str(made)]) == 2
    assert f"--output_path {made}: already exists" in capsys.readouterr().err


def quantized(base: Path, folder: Path, digests: dict[str, str]) -> Path:
    """An adapter that records how its base was quantized."""
    model = adapted(base)
    tensors = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    record = BaseQuantization("bfloat16", "0.50", "cpu", digests)
    write_adapter(folder, tensors, AdapterFormat(model.peft_config["default"], record), must_have_moved=False)
    return folder


def test_of_4_bit_adapters(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Those of the same 4-bit weights keep the record; others belong to other weights."""
    one, same, other = (
        quantized(tiny, tmp_path / name, {f"{Q}.weight": digest})
        for name, digest in (("one", "ab"), ("same", "ab"), ("other", "cd"))
    )
    made = blended(tmp_path / "made", [(one, 0.5), (same, 0.5)])
    assert read_adapter(made).quantization == read_adapter(one).quantization
    assert "quantized to 4 bits" in (made / "README.md").read_text()
    with pytest.raises(InputError, match="quantized to different 4-bit weights"):
        blended(tmp_path / "out", [(one, 0.5), (other, 0.5)])
    mixed = f"trained on different weights: {one}: in 4 bits, {adapters['plain']}: of the base. Merge one of those"
    with pytest.raises(InputError) as caught:
        blended(tmp_path / "out", [(one, 0.5), (adapters["plain"], 0.5)])
    assert mixed in str(caught.value)


def with_a_full_part(base: Path, folder: Path) -> Path:
    """An adapter with which audio self-attention was fully trained, as far as its files tell."""
    model = adapted(base)
    tensors = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    tensors["base_model.model.model.layers.0.audio_attn.q_proj.weight"] = torch.ones(4, 4)
    form = AdapterFormat(model.peft_config["default"], full=FullyTrained(Parts(audio_self_attention=True)))
    write_adapter(folder, tensors, form, must_have_moved=False)
    return folder


def renamed_base(adapter: Path, folder: Path, base: str | None) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    return folder


def test_bases(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    other, none = (renamed_base(adapters["rslora"], tmp_path / str(name), name) for name in ("other", None))
    parts = [(adapters["plain"], 0.5), (other, 0.5), (none, 1.0)]
    with pytest.raises(InputError) as caught:
        blended(tmp_path / "out", parts)
    assert caught.value.problems == [
        f"{none}: names no base model; name it with --base_model_path",
        f"the adapters belong to different base models: {adapters['plain']}: {tiny}, {other}: other, {none}: None. If "
        "these are the same model, name it with --base_model_path",
    ]
    made = blended(tmp_path / "out", parts, base_model_path="some/base")
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"


def of_base(base: Path, folder: Path, weights: str) -> Path:
    """An adapter that records the digest of its base's weights."""
    model = adapted(base)
    tensors = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    write_adapter(folder, tensors, AdapterFormat(model.peft_config["default"], base_weights=weights), False)
    return folder


def test_recorded_weights_decide_before_names(tiny: Path, tmp_path: Path) -> None:
    one, same = (of_base(tiny, tmp_path / name, "5" * 64) for name in ("one", "same"))
    moved, other = renamed_base(same, tmp_path / "moved", "elsewhere"), of_base(tiny, tmp_path / "other", "7" * 64)
    made = blended(tmp_path / "made", [(one, 0.5), (moved, 0.5)])
    assert read_adapter(made).record.base_weights == "5" * 64
    with pytest.raises(InputError, match="trained on bases with different weights"):
        blended(tmp_path / "out", [(one, 0.5), (other, 0.5)], base_model_path="some/base")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refused(
    tiny: Path,
    biased: Path,
    small_base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Everything at once, and nothing is written."""
    dora = saved(adapted(tiny, use_dora=True), tmp_path / "dora")
    bias = saved(adapted(biased, lora_bias=True), tmp_path / "bias")
    pissa = renamed_base(adapters["plain"], tmp_path / "pissa", str(tiny))
    config = json.loads((pissa / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (pissa / "adapter_config.json").write_text(json.dumps(config))
    full = with_a_full_part(tiny, tmp_path / "full")
    parts = [dora, bias, full, pissa, tmp_path / "none"]
    line = [*(f"{part}=0" for part in parts), "x=nan", "no_weight", "=1", "y=a", "--rank", "0"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert blend_command([*line, "--output_path", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for words in (
        "11 problems:", "--output_path", "--rank 0: must be 1 or more", "x=nan: must be ADAPTER=WEIGHT",
        "no_weight: must be", "=1: must be", "y=a: must be", f"{dora}: cannot be blended: use_dora is True",
        f"{bias}: cannot be blended: lora_bias is True", f"{pissa}: init_lora_weights is 'pissa'",
        f"{tmp_path / 'none'}: is not an adapter", f"{full}: cannot be blended: audio self-attention was fully trained",
    ):  # fmt: skip
        assert words in error, (words, error)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="all weights are 0"):
        blended(tmp_path / "new", [(adapters["plain"], 0), (adapters["rslora"], -0.0)])
    with pytest.raises(InputError, match="is not finite in float32"):
        blended(tmp_path / "new", [(adapters["plain"], 1e39)])
    assert not (tmp_path / "new").exists()
    wide = random_base(small_base, tmp_path / "wide_base", torch.float32, intermediate_size=96)
    other = saved(adapted(wide, target_modules=["audio_mlp.up_proj"]), tmp_path / "wide")
    with pytest.raises(InputError) as caught:
        blended(tmp_path / "new", [(adapters["rslora"], 1), (other, 1)], base_model_path="base")
    up = [f"model.layers.{i}.audio_mlp.up_proj.weight" for i in (0, 1)]
    shapes = f"has different shapes: {adapters['rslora']}: (128, 64), {other}: (96, 64)"
    assert caught.value.problems == [f"{name} {shapes}" for name in up]
