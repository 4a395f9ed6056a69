"""A base without its weights: what is read without transformers must be what transformers reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import VOICES_MANIFEST
from transformers import AutoTokenizer, HiggsAudioV2Config, HiggsAudioV2TokenizerConfig

from higgs_ds.bases import tokenizer as tokenizers
from higgs_ds.bases.builtin import builtin_base
from higgs_ds.bases.bundle import open_bundle
from higgs_ds.bases.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE, read_tokenizer
from higgs_ds.common.errors import InputError
from higgs_ds.data.codec_info import find_codec, read_codec_info
from higgs_ds.model.v2.family import DEFAULTS

TEXTS = ["", " Hello,  world!\n", "<|begin_of_text|>Zwölf<|eot_id|>", "<|AUDIO_OUT|><|reserved_special_token_6|>x"]


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    edit(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def same_as_transformers(folder: Path) -> bool:
    ours, theirs = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, VOICES_MANIFEST.read_text(encoding="utf-8")]
    ids = [ours.encode(text, add_special_tokens=False).ids for text in texts]
    assert ids == [theirs.encode(text, add_special_tokens=False) for text in texts]
    return bool(ours.get_vocab() == theirs.get_vocab())


@pytest.mark.parametrize("name", ["speaking-base", "tiny-random-base"])
def test_tokenizer_of_a_built_in_base(name: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = builtin_base(name, cache_dir)
    assert same_as_transformers(folder)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    read_tokenizer(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.update(unk_token="<|new|>"),
        lambda config: config.update(extra_special_tokens=["<|one|>", "<|two|>"]),
        lambda config: config.update(extra_special_tokens={"image_token": "<|image|>"}),
        lambda config: config.update(tokenizer_class="LlamaTokenizer"),
    ],
)
def test_tokenizer_that_transformers_changes(own_base: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    change(own_base / TOKENIZER_CONFIG, edit)
    assert not tokenizers._is_plain(own_base)
    assert same_as_transformers(own_base)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', '{"model": {"type": "none"}}'])
def test_damaged_tokenizer(own_base: Path, content: str) -> None:
    (own_base / TOKENIZER_FILE).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=f"{own_base}: its tokenizer does not load"):
        open_bundle(str(own_base), None, None, own_base)


def test_added_tokens_of_older_versions(own_base: Path) -> None:
    (own_base / "added_tokens.json").write_text('{"<|late|>": 900}', encoding="utf-8")
    assert not tokenizers._is_plain(own_base)


def test_no_tokenizer(own_base: Path) -> None:
    (own_base / TOKENIZER_FILE).unlink()
    with pytest.raises(InputError, match="its tokenizer does not load"):
        read_tokenizer(own_base)


def test_defaults_are_those_of_transformers() -> None:
    config = HiggsAudioV2Config()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_codebooks", "8", "num_codebooks is '8'; it must be a whole number"),
        ("audio_stream_eos_id", None, "audio_stream_eos_id is None; it must be a whole number"),
        ("audio_token_id", True, "audio_token_id is True; it must be a whole number"),
    ],
)
def test_values_of_a_wrong_type(own_base: Path, name: str, value: object, words: str) -> None:
    change(own_base / "config.json", lambda config: config.update({name: value}))
    with pytest.raises(InputError, match=words):
        open_bundle(str(own_base), None, None, own_base)


def test_values_that_only_transformers_checks(own_base: Path) -> None:
    change(own_base / "config.json", lambda config: config.update(hidden_size="wide"))
    bundle = open_bundle(str(own_base), None, None, own_base)
    with pytest.raises(InputError, match=r"config\.json: .*hidden_size"):
        _ = bundle.config


CODECS: list[dict[str, Any]] = [
    {},
    {"sample_rate": 48000, "downsample_factor": 160},
    {"target_bandwidths": [2], "codebook_size": 512},
    {"acoustic_model_config": {"model_type": "dac", "downsampling_ratios": [8, 5, 3]}},
    {
        "semantic_sample_rate": 24000,
        "semantic_model_config": {"model_type": "hubert", "conv_stride": [5, 2, 2, 2, 2, 2, 1]},
    },
]


@pytest.mark.parametrize("values", CODECS)
def test_codec_is_read_as_by_transformers(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "higgs_audio_v2_tokenizer"} | values))
    same_properties(tmp_path)


@pytest.mark.parametrize("name", ["speaking-base", "tiny-random-base"])
def test_built_in_codec_is_read_as_by_transformers(name: str, cache_dir: Path) -> None:
    same_properties(find_codec(builtin_base(name, cache_dir), None))


def same_properties(folder: Path) -> None:
    ours, theirs = read_codec_info(folder), HiggsAudioV2TokenizerConfig.from_pretrained(folder)
    semantic = theirs.semantic_model_config
    assert (ours.sample_rate, ours.hop_length) == (theirs.sample_rate, theirs.hop_length)
    assert (ours.num_codebooks, ours.codebook_size) == (theirs.num_quantizers, theirs.codebook_size)
    assert ours.semantic_convolutions == tuple(zip(semantic.conv_kernel, semantic.conv_stride, strict=True))
    assert (ours.semantic_sample_rate, ours.semantic_hop) == (
        theirs.semantic_sample_rate,
        theirs.semantic_downsample_factor,
    )


@pytest.mark.parametrize("values", [{"sample_rate": "fast"}, {"target_bandwidths": []}, {"codebook_size": 0}])
def test_codec_of_wrong_values(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="is not the configuration of an audio codec"):
        read_codec_info(tmp_path)
