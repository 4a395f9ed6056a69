"""What a model card says, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_manifest

from higgs_ds.common.run_files import METRICS_FILE, SUMMARY_FILE
from higgs_ds.model.parts import NO_PARTS
from higgs_ds.options.train import TrainOptions
from higgs_ds.reporting.publish import card_facts

SUMMARY = """{manifest}:
  samples: 3
  duplicates of an earlier sample: 1: {manifest}:2
  samples with clipped audio: 2: {manifest}:1, {manifest}:3
"""


@pytest.mark.parametrize("manifest", ["/home/jane/voice/m.jsonl", "data/m.jsonl", "m.jsonl"])
def test_no_folder_of_the_manifest_is_published(tmp_path: Path, manifest: str) -> None:
    (tmp_path / SUMMARY_FILE).write_text(SUMMARY.format(manifest=manifest))
    write_manifest(tmp_path / METRICS_FILE, [{"step": 4, "train/loss": 2.5}])
    facts = card_facts(tmp_path, "/home/jane/models/base", NO_PARTS, TrainOptions())
    assert facts["data"] == SUMMARY.format(manifest="m.jsonl")
    assert facts["base"] == "base"
    assert facts["losses"] == {"train/loss": "2.5", "step": 4}
