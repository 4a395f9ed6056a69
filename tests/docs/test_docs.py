"""What the documents name exists: tests, files, options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import PROJECT

from higgs_ds.options.command_line import Parser, add_options
from higgs_ds.options.commands import (
    ConvertOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    MergeOptions,
    PrepareOptions,
)
from higgs_ds.options.train import TrainOptions

DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
OF_NOW = [path for path in DOCUMENTS if path.name not in ("benchmarks.md", "log.md")]  # which tell of other programs
# Of other programs, or that the commands which look at folders have by themselves.
OTHERS = {
    "--hostfile", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--config", "--help", "--json",
    "--local", "--repo", "--omni", "--port",
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
    for group_class in (MergeOptions, ExportOptions, ConvertOptions, EvaluateOptions, GenerateOptions):
        one = Parser()
        add_options(one, group_class)
        names |= {f"--{name}" for name in one.names()}
    return names | OTHERS


@pytest.mark.parametrize("document", OF_NOW, ids=lambda path: path.name)
def test_every_option_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    unknown = set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) - known_options()
    assert not unknown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / link).exists(), link
