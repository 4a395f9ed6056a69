"""The summary of a manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from higgs_ds.data.index import CheckedClip, CheckedSample, Index, PartWriter
from higgs_ds.data.sample import AudioClip, Message, Sample
from higgs_ds.data.summary import describe, histogram


def test_summary_lines(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, 0)
    for i in range(6):
        messages = (Message("user", (f"{i % 5}",)), Message("assistant", (AudioClip(Path("a.wav")),)))
        sample = Sample(messages, 0, None if i == 5 else f"s{i % 2}", f"m:{i + 1}", "en")
        writer.add(CheckedSample(i, sample, 100 + i, (CheckedClip("ab" * 32, 25 * (i + 1)),), ()))
    writer.close()
    lines = describe(Index(tmp_path), 25.0, 103, ["m:2"], 1).splitlines()
    assert lines == [
        "samples: 6",
        "clips: 6, 0.01 hours, 1.00 to 6.00 s, median 3.50 s",
        "speakers: 2, s0 (3), s1 (2); 1 samples without a speaker",
        "languages: 1, en (6)",
        "tokens: 615, 100 to 105 per sample",
        "samples longer than --max_seq_len 103: 2: m:5, m:6",
        "duplicates of an earlier sample: 1: m:6",
        "samples with clipped audio: 1: m:2",
        "clip lengths:",
        "    1 to   2 s          1 ##############",
        "    2 to   4 s          2 ###########################",
        "    4 to   8 s          3 ########################################",
    ]


def test_histogram_ends() -> None:
    assert histogram(np.zeros(0)) == []
    assert histogram(np.array([1000.0]))[1:] == ["  300 s or more         1 " + "#" * 40]


def test_empty_manifest(tmp_path: Path) -> None:
    PartWriter(tmp_path, 0).close()
    assert describe(Index(tmp_path), 25.0, None, [], 0) == "samples: 0"
