"""--lora_scale: W + strength x the adapter's change, in merge, generate and evaluate, compared with plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import speech_sample, write_manifest
from launcher import run_script
from test_blend import KINDS, change, with_a_full_part
from test_kinds_of_lora import adapted, biased, load, saved, tiny

from higgs_ds.adapters.load import BaseWeights, read_adapter
from higgs_ds.adapters.merge import merge
from higgs_ds.adapters.verify import compare_with_peft
from higgs_ds.cli import generate
from higgs_ds.cli import merge as merge_command
from higgs_ds.common.errors import InputError, SaveError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
__all__ = ["biased", "tiny"]  # fixtures


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on all linear layers, with several ranks and alphas, and scalings of rsLoRA."""
    options = KINDS["everything"] | {"use_rslora": True}
    return saved(adapted(tiny, **options), tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.mark.parametrize("strength", [0.5, -1.5, 0.0, 3.0])
def test_merged(tiny: Path, adapter: Path, tmp_path: Path, strength: float) -> None:
    """The weights are the base's plus strength times the change; the merge's own checks agree."""
    report = merge(tiny, adapter, tmp_path / "merged", strength=strength)
    assert report.agreement is not None
    assert report.agreement.relative < 1e-5
    found, changes = load(tmp_path / "merged").state_dict(), change(adapter)
    assert len(changes) > 20
    for name, weight in load(tiny).state_dict().items():
        expected = weight + strength * changes[name].float() if name in changes else weight
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
        assert strength or found[name].equal(weight)


def test_merged_biases(biased: Path, tmp_path: Path) -> None:
    adapter = saved(adapted(biased, lora_bias=True), tmp_path / "adapter")
    base, whole, half = (
        load(biased).state_dict(),
        *(
            load(tmp_path / name).state_dict()
            for name, strength in (("whole", 1.0), ("half", 0.5))
            if merge(biased, adapter, tmp_path / name, strength=strength)
        ),
    )
    moved = [name for name in base if not whole[name].equal(base[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"weight", "bias"}
    for name in moved:
        torch.testing.assert_close(half[name], (base[name] + whole[name]) / 2, rtol=0, atol=1e-6)


def test_merged_into_a_dequantized_base(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    """The strength multiplies the change, not the rounding of the base to 4 bits."""
    none, half, whole = (
        load(tmp_path / str(strength)).state_dict()
        for strength in (0.0, 0.5, 1.0)
        if merge(tiny, adapter, tmp_path / str(strength), "dequantized", strength=strength)
    )
    assert not none["model.layers.0.mlp.up_proj.weight"].equal(
        load(tiny).state_dict()["model.layers.0.mlp.up_proj.weight"]
    )
    for name, weight in none.items():
        torch.testing.assert_close(half[name], (weight + whole[name]) / 2, rtol=0, atol=1e-6)


def test_self_check_sees_another_strength(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    merge(tiny, adapter, tmp_path / "merged", strength=0.5)
    own = BaseWeights(None, dequantized=False)
    compare_with_peft(tiny, tmp_path / "merged", adapter, read_adapter(adapter, 0.5), own)
    for strength in (1.0, 0.49):
        with pytest.raises(SaveError, match="differs from what PEFT makes of"):
            compare_with_peft(tiny, tmp_path / "merged", adapter, read_adapter(adapter, strength), own)


@pytest.mark.slow
def test_generated(base: Path, tmp_path: Path) -> None:
    """The base with the adapter says what the merged model says, and at strength 0 what the base says."""
    adapter = saved(adapted(base, target_modules=["self_attn.v_proj", "audio_mlp.up_proj"]), tmp_path / "adapter")
    load(base).save_pretrained(tmp_path / "float")
    for path in base.iterdir():
        if not (tmp_path / "float" / path.name).exists() and path.suffix != ".safetensors":
            (tmp_path / "float" / path.name).write_bytes(path.read_bytes())
    merge(tmp_path / "float", adapter, tmp_path / "merged", strength=0.5)

    def said(model: str, *options: str) -> bytes:
        line = ["--text", "Hello.", "--base_model_path", str(tmp_path / model), "--output", str(tmp_path / "a.wav")]
        assert generate([*line, "--max_new_tokens", "24", "--temperature", "0", *options]) == 0
        return (tmp_path / "a.wav").read_bytes()

    scaled = [said("float", "--lora_adapter_path", str(adapter), "--lora_scale", scale) for scale in ("0", "0.5", "1")]
    assert len(set(scaled)) == 3
    assert scaled[0] == said("float")
    assert scaled[1] == said("merged")
    assert scaled[2] == said("float", "--lora_adapter_path", str(adapter))


@pytest.mark.slow
def test_evaluated(base: Path, tmp_path: Path) -> None:
    """evaluation.json and the table have the strength, so that evaluations can be told apart."""
    adapter = saved(adapted(base), tmp_path / "adapter")
    manifest = write_manifest(tmp_path / "m.jsonl", [speech_sample("Hello.", "anna_00.flac", duration=0.3)])
    line = ["--test_manifest", str(manifest), "--base_model_path", str(base)]
    results: dict[str, Any] = {}
    for scale in ("0", "0.5"):
        options = ["--lora_adapter_path", str(adapter), "--lora_scale", scale, "--output_dir", scale]
        done = run_script("evaluate", [*line, *options], tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0].split() == ["lora", "scale", scale]
        results[scale] = json.loads((tmp_path / scale / "evaluation.json").read_text())
        assert results[scale].pop("lora_scale") == float(scale)
    assert run_script("evaluate", [*line, "--output_dir", "base"], tmp_path).returncode == 0
    assert results["0"] == json.loads((tmp_path / "base" / "evaluation.json").read_text()) != results["0.5"]


def test_printed(tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--base_model_path", str(tiny), "--lora_adapter_path", str(adapter), "--output_path", str(tmp_path / "m")]
    assert merge_command([*line, "--lora_scale", "0.5", "--no_verify"]) == 0
    assert "Strength: the adapter's change times 0.5 (--lora_scale)" in capsys.readouterr().out.splitlines()


def test_what_has_no_strength(tiny: Path, tmp_path: Path) -> None:
    """DoRA's norms and fully trained parts; at 1 they are as before."""
    dora = saved(adapted(tiny, use_dora=True), tmp_path / "dora")
    full = with_a_full_part(tiny, tmp_path / "full")
    heads = saved(adapted(tiny, modules_to_save=["audio_lm_head", "text_lm_head"]), tmp_path / "heads")
    for adapter, reason in (
        (dora, "use_dora is True, and DoRA, which also sets the norms of rows, has no strength but 1"),
        (heads, "heads was fully trained with the adapter, and has no strength but 1"),
        (full, "audio self-attention was fully trained with the adapter, and has no strength but 1"),
    ):
        read_adapter(adapter, 1.0)
        with pytest.raises(InputError) as caught:
            merge(tiny, adapter, tmp_path / "out", strength=0.5)
        assert str(caught.value) == f"{adapter}: --lora_scale 0.5: {reason}"


@pytest.mark.slow
def test_refused(tiny: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the other problems, before anything is loaded."""
    assert generate(["--text", "", "--base_model_path", str(tiny), "--lora_scale", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "--lora_scale 0.5: needs --lora_adapter_path" in error
    assert "--text: is empty" in error
    manifest = write_manifest(tmp_path / "m.jsonl", [speech_sample("Hello.", "anna_00.flac")])
    evaluated = ["--test_manifest", str(manifest), "--num_samples", "0", "--base_model_path", str(tiny)]
    done = run_script("evaluate", [*evaluated, "--lora_scale", "2"], tmp_path)
    assert done.returncode == 2
    assert "--lora_scale 2.0: needs --lora_adapter_path" in done.stderr
    assert "--num_samples 0" in done.stderr
    merged = ["--base_model_path", str(tiny), "--lora_adapter_path", str(adapter), "--output_path", str(tmp_path / "m")]
    for value in ("nan", "inf"):
        assert merge_command([*merged, "--lora_scale", value]) == 2
        assert f"--lora_scale {value}: must be a finite number" in capsys.readouterr().err
