"""The sample voices: the committed files are valid, and the script in the project generates the same ones."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import soundfile
from conftest import PROJECT, VOICES, VOICES_MANIFEST

from higgs_ds.data.formats.reader import read_entries
from higgs_ds.options.train import DataOptions


def test_committed_voices() -> None:
    entries = list(read_entries(VOICES_MANIFEST, DataOptions()))
    assert [fault for entry in entries for fault in entry.faults] == []
    samples = [entry.sample for entry in entries if entry.sample]
    assert len(samples) == 24
    assert len({sample.speaker for sample in samples}) == 3
    assert {sample.clips[-1].path for sample in samples} == set(VOICES.iterdir())
    infos = {path.name: soundfile.info(path) for path in VOICES.iterdir()}
    assert {info.samplerate for info in infos.values()} == {22050, 24000, 44100}
    assert [name for name, info in infos.items() if info.channels == 2] == ["carla_03.flac"]
    assert all(1.0 <= info.duration <= 4.0 for info in infos.values())
    assert sum(path.stat().st_size for path in VOICES.iterdir()) < 2_500_000


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed (apt-get install espeak-ng)")
def test_made_by_the_script(tmp_path: Path) -> None:
    shutil.copy(PROJECT / "samples" / "make_voices.py", tmp_path)
    (tmp_path / "voices").mkdir()
    runpy.run_path(str(tmp_path / "make_voices.py"), run_name="__main__")
    made = [json.loads(line) for line in (tmp_path / "voices.jsonl").read_text(encoding="utf-8").splitlines()]
    committed = [json.loads(line) for line in VOICES_MANIFEST.read_text(encoding="utf-8").splitlines()]
    assert made == committed
    for path in VOICES.iterdir():
        again, kept = soundfile.info(tmp_path / "voices" / path.name), soundfile.info(path)
        assert (again.samplerate, again.channels) == (kept.samplerate, kept.channels)
        assert again.duration == pytest.approx(kept.duration, rel=0.1)  # versions of espeak-ng differ a little
