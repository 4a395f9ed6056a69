"""Imports go downward only, and every module can be imported by itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

# From the bottom up: a module may import those of lower rows, and `may_share` of its own row.
ROWS = [
    ["errors"],
    ["config", "files", "quiet", "hub", "loss", "measures", "model.nf4", "model.offload"],
    ["command_line", "recognizers", "model.layout", "shards"],
    ["model.parts"],
    ["model.routed", "model.lora"],
    ["model.full"],
    ["distributed", "ds_config", "optimizers", "support", "report_to"],
    ["data.sample", "data.delay_pattern", "data.normalize", "data.formats.jsonio", "signals", "data.codec_layout"],
    ["data.templates", "data.audio", "data.codec", "data.prompt", "data.sampler", "data.prefetch"],
    ["data.formats.checks", "data.audio_codes", "data.hearing", "model.higgs"],
    ["data.formats.turns", "data.formats.recordings", "data.collate", "data.index", "tiny_random"],
    ["data.formats.chatml", "data.formats.csv_file", "data.formats.metadata", "data.formats.paired", "data.coder"],
    ["data.formats.native", "data.formats.swift", "data.formats.lists", "data.formats.table", "data.encode", "builtin"],
    ["data.formats.recognition", "activations", "relayout"],
    ["data.formats.reader", "data.summary", "data.dataset", "engine", "export", "planner"],
    ["data.survey", "bundle", "metrics", "validate", "trained", "dry_run", "prompts"],
    ["adapter"],
    ["convert"],
    ["checkpoint", "prepare", "generate", "verify", "loss_checks"],
    ["merge", "preflight", "inspection", "publish", "evaluate"],
    ["inputs"],
    ["overview"],
    ["startup", "complete"],
    ["report", "listen"],
    ["finish"],
    ["train"],
]
HEIGHT = {name: height for height, row in enumerate(ROWS) for name in row}
SOURCES = {
    ".".join(path.relative_to(PROJECT / "higgs_ds").with_suffix("").parts): path
    for path in sorted((PROJECT / "higgs_ds").rglob("*.py"))
    if path.name != "__init__.py"
}


def imports_of(path: Path) -> set[str]:
    """Modules of this project that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("higgs_ds"):
            module = node.module.removeprefix("higgs_ds").lstrip(".")
            names |= {module} if module in SOURCES else {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
    return names


def test_every_module_has_its_place() -> None:
    assert HEIGHT.keys() == SOURCES.keys()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module: str) -> None:
    for imported in imports_of(SOURCES[module]):
        assert HEIGHT[imported] < HEIGHT[module], f"{module} imports {imported}"


def test_data_and_model_do_not_know_each_other() -> None:
    for module, path in SOURCES.items():
        package = module.split(".")[0]
        other = {"data": "model.", "model": "data."}.get(package)
        if other:
            assert not any(name.startswith(other) for name in imports_of(path)), module


def users_of(library: str, name: str | None = None) -> set[str]:
    """Modules that import a library, or one name of it."""
    users = set()
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and name is None:
                found = any(alias.name.split(".")[0] == library for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library:
                found = name is None or any(alias.name == name for alias in node.names)
            else:
                continue
            users |= {module} if found else set()
    return users


def test_one_user_of_each_engine() -> None:
    assert users_of("deepspeed") == {"engine"}
    assert users_of("bitsandbytes") == {"model.nf4", "optimizers"}
    of_model = {"model.higgs", "model.parts", "tiny_random"}
    assert users_of("transformers", "HiggsAudioV2ForConditionalGeneration") == of_model
    assert users_of("transformers", "HiggsAudioV2TokenizerModel") == {"data.codec", "tiny_random"}


def test_config_and_formats_import_no_torch() -> None:
    code = (
        "import higgs_ds.config, higgs_ds.ds_config, higgs_ds.data.formats.reader, sys; "
        "assert not {'torch', 'transformers', 'deepspeed', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
