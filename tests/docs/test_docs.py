"""The tests, files and options that the documents and the notebook name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import PROJECT

from higgs_ds.options.command_line import Parser, add_options
from higgs_ds.options.commands import (
    BlendOptions,
    ConvertOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    MergeOptions,
    PreferOptions,
    PrepareOptions,
)
from higgs_ds.options.reviewing import ReviewOptions
from higgs_ds.options.slicing import SliceOptions
from higgs_ds.options.train import TrainOptions

DOCUMENTS = [
    PROJECT / "README.md", PROJECT / "notebooks" / "first_voice.ipynb", *sorted((PROJECT / "docs").glob("*.md")),
]  # fmt: skip
# benchmarks.md and log.md also name options of other programs.
CURRENT = [path for path in DOCUMENTS if path.name not in ("benchmarks.md", "log.md")]
# Options of other programs, or of the commands that inspect folders, which define their own.
OTHERS = {
    "--hostfile", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--config", "--help", "--json",
    "--local-dir", "--repo-type", "--omni", "--port", "--module", "--word_timestamps", "--diarize",
    "--no-deps",
}  # fmt: skip


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"([\w/]+\.py)::(\w+)", (PROJECT / "docs" / "features.md").read_text())
    assert len(named) > 60
    for path, name in named:
        assert f"\ndef {name}(" in (PROJECT / "tests" / path).read_text(), f"{path}::{name}"


def known_options() -> set[str]:
    parser = Parser()
    for group in (*vars(TrainOptions()).values(), PrepareOptions()):
        add_options(parser, type(group))
    names = {f"--{name}" for name in parser.names()}
    for group_class in (
        MergeOptions, BlendOptions, ExportOptions, ConvertOptions, EvaluateOptions, GenerateOptions, SliceOptions,
        ReviewOptions, PreferOptions,
    ):  # fmt: skip
        group_parser = Parser()
        add_options(group_parser, group_class)
        names |= {f"--{name}" for name in group_parser.names()}
    return names | OTHERS


@pytest.mark.parametrize("document", CURRENT, ids=lambda path: path.name)
def test_every_option_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text)) - known_options()
    assert not unknown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / link).exists(), link


def test_the_first_screen_says_what_it_takes_and_what_is_not_known() -> None:
    first = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()[:25])
    for words in ("Nothing has been run on a GPU", "is not known", "planned memory per GPU", "GiB", "first_voice.md"):
        assert words in first
