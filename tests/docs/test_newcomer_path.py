"""A newcomer's first three commands, as the README prints them, on an unknown voice and on the built-in samples.

The built-in base stands for the released one: a human voice, or any that its codec does not know, has to be warned of
wherever it is met, the built-in samples nowhere. Recordings of a human are not part of the project. The environment
variable HIGGS_DS_HUMAN_CLIPS names a folder with some (clips and their texts), for instance strings of digits.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import PROJECT, VOICES, VOICES_MANIFEST, read_metrics
from launcher import run_script
from test_documents import BASE, NEW_USERS
from torchaudio.functional import resample

pytestmark = pytest.mark.slow

HUMAN_CLIPS = os.environ.get("HIGGS_DS_HUMAN_CLIPS")
BUILT_IN_BASE = "is built in for trying out the trainer"
UNLIKE = r"warning: (\S+): 5 of 5 clips come back unlike themselves from the codec of speaking-base .*: (.*?)\. "
NO_STOP = "warning: stop rate 0 is bad"


def telephone(folder: Path) -> Path:
    """A folder of clips at 8 kHz, of a synthetic voice that the built-in base's codec does not know."""
    folder.mkdir()
    samples = [json.loads(line)["messages"] for line in VOICES_MANIFEST.read_text().splitlines()]
    for *_, text, speech in samples[:8]:
        name = Path(speech["content"]["audio_url"]).name
        waveform, rate = soundfile.read(VOICES / name, dtype="float32")
        at_8_khz = resample(torch.from_numpy(waveform), rate, 8000).numpy()
        soundfile.write(folder / f"{Path(name).stem}.wav", at_8_khz, 8000)
        (folder / f"{Path(name).stem}.txt").write_text(text["content"])
    return folder


@pytest.fixture
def say(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a command of the README, with some words replaced, and returns its output."""
    for name in ("launch", "ds_configs", "samples"):
        (tmp_path / name).symlink_to(PROJECT / name)

    def run(command: str, **words: str) -> str:
        for old, new in {BASE: "speaking-base", **words}.items():
            command = command.replace(old, new)
        script, options = re.findall(r"^\w+ launch/(\w+)\.py (.*)", command)[0]
        done = run_script(script, shlex.split(options), tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("kind", ["telephone", *(["human"] if HUMAN_CLIPS else [])])
def test_a_voice_that_the_base_cannot_learn(kind: str, say: Callable[..., str], tmp_path: Path) -> None:
    if kind == "telephone":
        telephone(tmp_path / "my_clips")
    else:
        assert HUMAN_CLIPS is not None
        (tmp_path / "my_clips").symlink_to(HUMAN_CLIPS)
    check, train, generate = NEW_USERS

    checked = say(check)
    assert f"warning: without --base_ckpt the base is speaking-base, which {BUILT_IN_BASE}" in checked
    assert_unlike(checked)
    trained = say(train)
    assert f"warning: --base_ckpt speaking-base {BUILT_IN_BASE}" in trained.partition("step 1 ")[0]
    assert_unlike(trained.partition("step 1 ")[0])
    assert "my_clips: 5 compared, similarity" in (tmp_path / "my_voice" / "data_summary.txt").read_text()
    assert_bad_is_called_bad(trained, tmp_path)
    assert (NO_STOP in say(generate)) == (NO_STOP in trained)
    assert NO_STOP in say(f"{generate} --max_new_tokens 10", **{"Hello.": "one two three four five"})


def assert_unlike(output: str) -> None:
    ((path, clips),) = re.findall(UNLIKE, output)
    assert path == "my_clips"
    found = [re.fullmatch(r"my_clips/\S+ (-?0\.\d\d)", clip) for clip in clips.split(", ")]
    assert len({match[0] for match in found if match and float(match[1]) < 0.5}) == 5


def assert_bad_is_called_bad(output: str, folder: Path) -> None:
    rates = [line["sample/stop_rate"] for line in read_metrics(folder / "my_voice") if "sample/stop_rate" in line]
    assert rates
    assert output.count(NO_STOP) == rates.count(0)


def test_built_in_samples(say: Callable[..., str], tmp_path: Path) -> None:
    check, train, generate = NEW_USERS
    outputs = [
        say(command, my_clips="samples/digits_held_out.jsonl", **{"Hello.": "one two three"})
        for command in (check, train, generate)
    ]
    assert not [line for text in outputs for line in text.splitlines() if line.startswith("warning:")]
    summary = (tmp_path / "my_voice" / "data_summary.txt").read_text()
    assert re.search(
        r"samples/digits_held_out\.jsonl: 5 compared, similarity 0\.9\d to 0\.9\d, median 0\.9\d$", summary, re.M
    )
