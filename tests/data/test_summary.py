"""The summary of a manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from higgs_ds.common.errors import InputError
from higgs_ds.data.index import Index
from higgs_ds.data.index_writer import CheckedClip, CheckedSample, PartWriter
from higgs_ds.data.quality import ClipQuality
from higgs_ds.data.spoken_text import examine_sample
from higgs_ds.data.summary import describe, histogram
from higgs_ds.model.sample import AudioClip, Message, Sample


def test_summary_lines(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, 0)
    for i in range(6):
        messages = (Message("user", (f"{i % 5}",)), Message("assistant", (AudioClip(Path("a.wav")),)))
        sample = Sample(messages, 0, None if i == 5 else f"s{i % 2}", f"m:{i + 1}", "en")
        sound = ClipQuality(i, i + 1.0, 0.25, 0.25, 0, -20.0 - i, 0, 0, 12000, 24000, 40)
        quality = examine_sample(sample, [sound])
        writer.add(CheckedSample(i, sample, 100 + i, (CheckedClip("ab" * 32, 25 * (i + 1)),), (), quality=quality))
    writer.close()
    lines = describe(Index(tmp_path), 25.0, 103).splitlines()
    assert lines == [
        "samples: 6",
        "clips: 6, 0.01 hours, 1.00 to 6.00 s, median 3.50 s, 95th percentile 5.75 s",
        "speakers: 2, s0 (3), s1 (2); 1 sample without a speaker",
        "languages: 1, en (6)",
        "tokens: 615, 100 to 105 per sample",
        "samples longer than --max_seq_len 103: 2: m:5, m:6",
        "duplicates of an earlier sample: 1: m:6",
        "characters per second: median 0.34, 5th percentile 0.19, 95th percentile 1.67",
        "level: median -22.50 dBFS, 5th percentile -24.75 dBFS, 95th percentile -20.25 dBFS",
        "clip lengths:",
        "    1 to   2 s          1 ##############",
        "    2 to   4 s          2 ###########################",
        "    4 to   8 s          3 ########################################",
    ]


def test_an_index_that_is_deleted_while_it_is_open(tmp_path: Path) -> None:
    """What is mapped can still be read; the rest is an input error."""
    writer = PartWriter(tmp_path, 0)
    messages = (Message("user", ("Hello.",)), Message("assistant", (AudioClip(Path("a.wav")),)))
    writer.add(CheckedSample(0, Sample(messages, 0, None, "m:1", "en"), 100, (CheckedClip("ab" * 32, 25),), ()))
    writer.close()
    index = Index(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    assert index.sources([0]) == ["m:1"]
    with pytest.raises(InputError, match="has no quality; the cache was deleted while it was in use"):
        describe(index, 25.0, None)


def test_histogram_ends() -> None:
    assert histogram(np.zeros(0)) == []
    assert histogram(np.array([1000.0]))[1:] == ["  300 s or more         1 " + "#" * 40]


def test_empty_manifest(tmp_path: Path) -> None:
    PartWriter(tmp_path, 0).close()
    assert describe(Index(tmp_path), 25.0, None) == "samples: 0"
