"""What a model card says, and what it keeps to itself."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import write_manifest
from hub_server import TOKEN, local_hub

from higgs_ds.adapters.card import adapter_card
from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.bases.licence import Licence, licence_of
from higgs_ds.common.errors import InputError
from higgs_ds.common.run_files import METRICS_FILE, SUMMARY_FILE
from higgs_ds.model.parts import NO_PARTS, Parts
from higgs_ds.model.v2.family import HiggsAudioV2
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.run import RunOptions
from higgs_ds.options.train import TrainOptions
from higgs_ds.reporting.model_card import ADAPTER, MERGED, CardFacts, card_facts, write_card
from higgs_ds.reporting.publish import check_licence, check_login

SUMMARY = """{manifest}:
  samples: 3
  duplicates of an earlier sample: 1: {manifest}:2
  samples with clipped audio: 2: {manifest}:1, {manifest}:3
"""
RELEASED = "bosonai/higgs-audio-v2-generation-3B-base"


@pytest.fixture(scope="module")
def bundle(base: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A base in a folder of this machine, without a card."""
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("jane") / "my-base"))
    return open_bundle(str(folder), None, None, cache_dir)


def facts_of(run: Path, bundle: Bundle, options: TrainOptions, manifest: str = "m.jsonl") -> CardFacts:
    (run / SUMMARY_FILE).write_text(SUMMARY.format(manifest=manifest))
    write_manifest(run / METRICS_FILE, [{"step": 4, "train/loss": 2.5}])
    return card_facts(run, bundle, NO_PARTS, options)


def text_of(folder: Path, kind: str, facts: CardFacts) -> str:
    write_card(folder, kind, facts)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("manifest", ["/home/jane/voice/m.jsonl", "data/m.jsonl", "m.jsonl"])
def test_no_folder_is_published(bundle: Bundle, tmp_path: Path, manifest: str) -> None:
    facts = facts_of(tmp_path, bundle, TrainOptions(), manifest)
    assert facts.data == SUMMARY.format(manifest="m.jsonl")
    assert facts.base.name == "my-base"
    assert facts.losses == {"train/loss": "2.5", "step": 4}
    for kind in (ADAPTER, MERGED):
        text = text_of(tmp_path, kind, facts)
        assert "from `my-base`" in text
        assert str(bundle.folder.parent) not in text
    early = adapter_card(bundle.name, bundle.family, "Trained.\n")
    assert "`my-base`" in early
    assert str(bundle.folder.parent) not in early


def test_settings_are_options_that_train_alike(bundle: Bundle, tmp_path: Path) -> None:
    """Switches have no value, values with spaces are quoted, and what only this machine has is left out."""
    line = (
        "--finetune lora --use_dora --load_in_4bit --lora_targets attention audio_mlp --group_lr attention=1e-4 "
        "--codebook_weights 1 1 1 1 0.5 0.5 0.5 0.5 --mix 1 2 --train_manifest /a/b.jsonl /c/d.jsonl "
        "--merge_adapter_with_base --max_steps 7 --base_revision 'a b'"
    )
    options, _ = parse_train_options(shlex.split(line))
    text = text_of(tmp_path, ADAPTER, facts_of(tmp_path, bundle, options))
    settings = text.split("## Settings\n\n")[1]
    assert not re.search("True|/a/|manifest", settings)
    again, _ = parse_train_options([*shlex.split(settings), "--train_manifest", "/a/b.jsonl", "/c/d.jsonl"])
    assert again == options


def test_a_base_that_a_card_cannot_lead_to(bundle: Bundle, tmp_path: Path) -> None:
    """The reader is told which folder to give, and code and commands name it alike."""
    text = text_of(tmp_path, ADAPTER, facts_of(tmp_path, bundle, TrainOptions()))
    assert "BASE is the folder of the base, `my-base`, which this card cannot lead to." in text
    assert "launch/merge.py --base_model_path BASE --lora_adapter_path THIS_FOLDER --output_path merged" in text
    assert 'base = "BASE"' in text
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])


def test_a_revision_of_a_base_on_the_hub(bundle: Bundle, tmp_path: Path) -> None:
    facts = facts_of(tmp_path, replace(bundle, name="owner/base"), TrainOptions().replace(base_revision="v2"))
    text = text_of(tmp_path, ADAPTER, facts)
    assert "\nhf download owner/base --revision v2 --local-dir BASE\n" in text
    assert "launch/merge.py --base_model_path BASE " in text
    assert 'base = snapshot_download("owner/base", revision="v2")' in text


def test_parts_have_no_place_in_transformers(bundle: Bundle, tmp_path: Path) -> None:
    facts = replace(facts_of(tmp_path, bundle, TrainOptions()), parts=Parts(audio_self_attention=True))
    text = text_of(tmp_path, ADAPTER, facts)
    assert "```python" not in text
    assert "--export_layout original" in text


def test_licences(bundle: Bundle, tmp_path: Path) -> None:
    """Of known bases by their names, of others by their cards."""
    released = licence_of(RELEASED)
    assert released is not None
    assert released.header()["license"] == "other"
    card = adapter_card(RELEASED, HiggsAudioV2(), "Trained.\n")
    assert "Built with Higgs Materials licensed from Boson AI USA, Inc." in card
    assert licence_of("/anywhere/cache/speaking-base") == Licence("apache-2.0")
    assert licence_of(str(tmp_path)) is None
    for header, expected in (
        ("license: mit", Licence("mit")),
        ("license: other\nlicense_name: own\nlicense_link: LICENSE", Licence("other", "own")),
        ("license: other\nlicense_link: https://own.org/l", Licence("other", None, "https://own.org/l")),
        ("license: [mit, other]", None),
        ("license: {", None),
        ("tags: []", None),
    ):
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\n\n# A base\n")
        assert licence_of(str(tmp_path)) == expected
        assert licence_of("owner/base", tmp_path) == expected


def test_a_licence_that_is_not_known_is_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the licence of the base \S+ is not known; name the one to publish under"):
        check_licence(RunOptions(push_to_hub=True, hub_repo_id="a/b"), bundle)
    check_licence(RunOptions(), bundle)
    given = TrainOptions().replace(push_to_hub=True, hub_repo_id="a/b", hub_license="cc-by-4.0")
    check_licence(given.run, bundle)
    text = text_of(tmp_path, ADAPTER, facts_of(tmp_path, bundle, given))
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "cc-by-4.0"
    assert "Published under cc-by-4.0." in text
    assert "is not known" in text_of(tmp_path, ADAPTER, facts_of(tmp_path, bundle, TrainOptions()))


def test_the_hub_is_asked_whether_it_has_a_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    with local_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        check_login(RunOptions(push_to_hub=True, hub_repo_id="a/b", hub_license="apache-2.0"))
        with pytest.raises(InputError, match=r"--hub_license apache2: the hub does not accept it \(.*must be one of"):
            check_login(RunOptions(push_to_hub=True, hub_repo_id="a/b", hub_license="apache2"))
