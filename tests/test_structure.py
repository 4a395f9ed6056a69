"""Subpackages import only downward, every module is small, and each large library is imported in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT

# From the bottom up: a subpackage imports only from itself and from those before it.
SUBPACKAGES = (
    "common", "options", "model", "data", "bases", "adapters", "checkpoints", "planning", "reporting", "speech",
    "slicing", "reviewing", "training",
)  # fmt: skip
MAX_LINES = 350
MAX_ROOT_MODULES = 3
PACKAGE = PROJECT / "higgs_ds"
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports_of(source: str) -> Iterator[str]:
    """Yield the modules of this project that a source imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("higgs_ds."):
                module = name.removeprefix("higgs_ds.")
                yield module if module in SOURCES else module.rpartition(".")[0]


def upward_imports(module: str, source: str) -> list[str]:
    """Return what a module imports from subpackages above its own."""
    subpackage = module.split(".")[0]
    if subpackage not in SUBPACKAGES:
        return []  # the commands, which are above all subpackages
    return [
        name
        for name in imports_of(source)
        if name.split(".")[0] not in SUBPACKAGES[: SUBPACKAGES.index(subpackage) + 1]
    ]


def cycle_among(imports: dict[str, set[str]]) -> list[str]:
    """Return the modules in or above an import cycle: those left after repeatedly removing modules without imports."""
    left = {module: set(names) & imports.keys() - {module} for module, names in imports.items()}
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module: str) -> None:
    assert upward_imports(module, SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("common.files", "from higgs_ds.model.loss import mean_losses", "model.loss"),
        ("checkpoints.save", "from higgs_ds.training.engine import Engine", "training.engine"),
        ("data.preparation", "def late() -> None:\n    from higgs_ds.bases import bundle", "bases.bundle"),
        ("reporting.publish", "import higgs_ds.speech.generate", "speech.generate"),
        ("common.errors", "from higgs_ds.cli import main", "cli"),
    ],
)
def test_planted_upward_import_is_found(module: str, line: str, found: str) -> None:
    source = SOURCES[module].read_text(encoding="utf-8")
    assert upward_imports(module, f"{source}\n{line}\n") == [found]


def test_no_import_cycles() -> None:
    imports = {module: set(imports_of(path.read_text(encoding="utf-8"))) for module, path in SOURCES.items()}
    assert cycle_among(imports) == []
    assert cycle_among(imports | {"common.errors": {"common.files"}}) != []


def test_subpackages_are_those_listed() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(SUBPACKAGES)
    assert len([path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]) <= MAX_ROOT_MODULES


@pytest.mark.parametrize("path", [*SOURCES.values(), *(PROJECT / "launch").glob("*.py")], ids=lambda path: path.name)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_data_imports_only_what_is_light_from_the_model() -> None:
    known = {
        name
        for module, path in SOURCES.items()
        if module.startswith("data.")
        for name in imports_of(path.read_text(encoding="utf-8"))
        if name.startswith("model.")
    }
    assert known == {"model.family", "model.labels", "model.prompt", "model.sample", "model.stream"}


def test_no_module_imports_private_names_of_another() -> None:
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("higgs_ds"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], module


def users_of(library: str, name: str | None = None) -> set[str]:
    """Return the modules that import a library, or one name of it."""
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


def test_large_libraries_are_imported_in_one_place() -> None:
    assert users_of("deepspeed") == {"training.engine", "training.deepspeed_start", "training.sharded_state"}
    assert users_of("bitsandbytes") == {"model.nf4", "training.optimizers"}
    of_model = {module for module in SOURCES if module.startswith("model.")} | {"bases.tiny_random"}
    of_codec = {"data.codec", "data.chunked_codec", "data.mixed_batch"}
    assert users_of("transformers", "HiggsAudioV2ForConditionalGeneration") <= of_model
    small_models = {"bases.tiny_random", "model.v2.tiny"}
    assert users_of("transformers", "HiggsAudioV2TokenizerModel") == of_codec | small_models


def test_options_and_formats_import_no_torch() -> None:
    code = (
        "import higgs_ds.cli, higgs_ds.options.ds_config, higgs_ds.data.formats.reader, sys; "
        "assert not {'torch', 'transformers', 'deepspeed', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
