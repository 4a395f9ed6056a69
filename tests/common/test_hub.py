"""The revision that is requested for a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from higgs_ds.common import hub


@pytest.mark.parametrize("name", ["bosonai/higgs-audio-v2-generation-3B-base", "bosonai/higgs-tts-2-3b-base"])
@pytest.mark.parametrize(("given", "expected"), [(None, "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"), ("main", "main")])
def test_released_base_is_pinned_under_both_of_its_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, given: str | None, expected: str
) -> None:
    requested: list[Any] = []

    def download(repo_id: str, *file: str, revision: str | None) -> str:
        requested.append((repo_id, revision))
        return str(tmp_path / "file")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    hub.resolve_folder(name, "--base_ckpt", given)
    hub.resolve_config_folder(name, "--base_ckpt", given)
    assert requested == [(name, expected)] * 2
