"""launch/slice.py on a recording joined from 60 sample clips: nothing is cut, lost, or changed by a kill."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile
import torch
import torchaudio
from conftest import PROJECT
from launcher import run_script
from long_recording import RATE, VOCABULARY, Spoken, srt_of, write_recording
from silero_vad import get_speech_timestamps, load_silero_vad

from higgs_ds import cli
from higgs_ds.data.audio import read_audio
from higgs_ds.model.sample import AudioClip
from higgs_ds.slicing import voice_activity
from higgs_ds.speech.measures import word_errors, words_of
from higgs_ds.speech.recognizers import open_recognizer

pytestmark = pytest.mark.slow

HEARD = ["--recognizer", "pocketsphinx", "--vocabulary", *VOCABULARY, "--speaker", "finn"]
WER_MARGIN = 0.02  # of all words; the clips have other pauses and noise around them than the samples


HOLD = """
import sys, time
from pathlib import Path
from higgs_ds.common.lock import OutputLock
OutputLock(Path(sys.argv[1]), "--output_dir of another command").acquire(print)
print("held", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Sliced:
    folder: Path
    printed: str

    @property
    def clips(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metadata.jsonl").read_text("utf-8").splitlines()]


def slice_in_process(options: list[str], code: int = 0) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert cli.slice(options) == code, err.getvalue()
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sliced")


@pytest.fixture(scope="module")
def spoken(folder: Path) -> list[Spoken]:
    """The recording and its subtitles, whose times are off by up to 0.3 s; return what is said in it."""
    spoken = write_recording(folder / "recording.flac")
    (folder / "recording.srt").write_text(srt_of(spoken), encoding="utf-8")
    return spoken


@pytest.fixture(scope="module")
def by_subtitles(folder: Path, spoken: list[Spoken]) -> Sliced:
    options = ["--subtitles", str(folder / "recording.srt"), "--output_dir", str(folder / "srt"), "--loudness", "-23"]
    return Sliced(folder / "srt", slice_in_process([str(folder / "recording.flac"), *options])[0])


@pytest.fixture(scope="module")
def by_voice(folder: Path, spoken: list[Spoken]) -> Sliced:
    options = [str(folder / "recording.flac"), *HEARD, "--output_dir", str(folder / "heard")]
    return Sliced(folder / "heard", slice_in_process(options)[0])


def inside(clip: dict, spoken: list[Spoken]) -> list[Spoken]:
    return [part for part in spoken if part.start_s < clip["end"] and part.end_s > clip["start"]]


@pytest.mark.parametrize("how", ["by_subtitles", "by_voice"])
def test_no_word_is_cut_and_speech_is_kept(how: str, spoken: list[Spoken], request: pytest.FixtureRequest) -> None:
    sliced = request.getfixturevalue(how)
    kept = [part for clip in sliced.clips for part in inside(clip, spoken)]
    for clip in sliced.clips:
        assert 2 <= clip["end"] - clip["start"] <= 20
        for part in inside(clip, spoken):
            assert clip["start"] <= part.start_s
            assert part.end_s <= clip["end"]
    assert len(set(kept)) == len(kept)
    seconds = [sum(part.end_s - part.start_s for part in parts) for parts in (kept, spoken)]
    assert seconds[0] >= 0.95 * seconds[1]
    assert f"clips: {len(sliced.clips)}, listed in {sliced.folder / 'metadata.jsonl'}" in sliced.printed


def test_clips_are_the_recording_between_their_times(folder: Path, by_voice: Sliced) -> None:
    samples, _ = soundfile.read(folder / "recording.flac", dtype="int16")
    for clip in by_voice.clips:
        found, rate = soundfile.read(by_voice.folder / clip["file_name"], dtype="int16")
        assert rate == RATE
        assert (found == samples[round(clip["start"] * RATE) : round(clip["end"] * RATE)]).all()


def test_texts_are_the_subtitles(spoken: list[Spoken], by_subtitles: Sliced) -> None:
    for clip in by_subtitles.clips:
        assert clip["text"] == " ".join(part.text for part in inside(clip, spoken))
        assert "speaker" not in clip


def test_words_come_back(spoken: list[Spoken], by_voice: Sliced) -> None:
    recognize = open_recognizer("pocketsphinx", VOCABULARY)
    said = [words_of(part.text) for part in spoken]
    alone = [recognize(read_audio(AudioClip(part.clip), RATE), RATE) for part in spoken]
    errors = sum(word_errors(*pair) for pair in zip(said, alone, strict=True))
    errors_sliced = sum(
        word_errors([word for part in inside(clip, spoken) for word in words_of(part.text)], words_of(clip["text"]))
        for clip in by_voice.clips
    )
    assert errors_sliced <= errors + WER_MARGIN * sum(map(len, said))
    assert {clip["speaker"] for clip in by_voice.clips} == {"finn"}


def test_loudness(by_subtitles: Sliced) -> None:
    """Measured by torchaudio's own implementation of ITU-R BS.1770."""
    for clip in by_subtitles.clips[:12]:
        waveform = read_audio(AudioClip(by_subtitles.folder / clip["file_name"]), RATE)
        assert float(torchaudio.functional.loudness(waveform[None], RATE)) == pytest.approx(-23, abs=0.3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_and_started_again(folder: Path, by_voice: Sliced) -> None:
    output = folder / "killed"
    options = [str(folder / "recording.flac"), *HEARD, "--output_dir", str(output)]
    command = [sys.executable, str(PROJECT / "launch" / "slice.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while len(list(output.glob("*.flac"))) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGKILL
    written = {path: path.stat().st_mtime_ns for path in output.glob("*.flac")}
    assert 8 <= len(written) < len(by_voice.clips)
    assert not (output / "metadata.jsonl").exists()
    # A kill can also come while a line or a file is being written.
    with (output / ".slicing" / "recording.written.jsonl").open("a") as file:
        file.write('["seven fi')
    shutil.copy(next(iter(written)), output / ".recording_00020.flac.abcd.tmp")
    slice_in_process(options)
    assert contents(output) == contents(by_voice.folder)
    again = [path for path, at in written.items() if path.stat().st_mtime_ns != at]
    assert len(again) <= 1  # the last one, if it was not yet recorded
    printed, _ = slice_in_process(options)
    assert printed == f"{output / 'metadata.jsonl'} is complete: nothing to do\n"


def test_other_options_in_the_same_folder_are_refused(folder: Path, by_voice: Sliced) -> None:
    options = [str(folder / "recording.flac"), *HEARD, "--output_dir", str(by_voice.folder), "--max_clip_s", "10"]
    before = contents(by_voice.folder)
    assert "the same max_clip_s; choose another folder" in slice_in_process(options, 2)[1]
    assert contents(by_voice.folder) == before


def test_one_writer(folder: Path, spoken: list[Spoken], tmp_path: Path) -> None:
    options = [str(folder / "recording.flac"), *HEARD, "--output_dir", str(tmp_path)]
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".slicing.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        assert re.search(
            f"--output_dir {tmp_path}: process {other.pid} .*is writing there", slice_in_process(options, 2)[1]
        )
        other.kill()
    assert [path.name for path in tmp_path.iterdir()] == [".slicing.lock"]


def test_trains(by_subtitles: Sliced, tmp_path: Path) -> None:
    options = (
        f"--base_ckpt tiny-random-base --train_manifest {by_subtitles.folder} --output_dir run --max_steps 2 "
        "--batch_size 1 --grad_accum 1 --precision fp32 --val_split 0 --no_report"
    )
    done = run_script("train", options.split(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{len(by_subtitles.clips)} training samples" in " ".join(done.stdout.split())


def test_in_blocks_as_the_whole(folder: Path, spoken: list[Spoken], monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampled in chunks, and speech found by the chunk: as read and given to silero-vad at once."""
    path = folder / "odd.wav"
    samples, _ = soundfile.read(folder / "recording.flac", stop=40 * RATE, dtype="float32")
    soundfile.write(path, torch.tensor([[0.5], [0.25]]).mul(torch.from_numpy(samples)).T.numpy(), 22050)
    monkeypatch.setattr("higgs_ds.data.audio.BLOCK_NUMBERS", 50000)
    chunks = list(voice_activity.resampled(path))
    assert [len(chunk) for chunk in chunks[:-1]] == [voice_activity.CHUNK_S * voice_activity.RATE]
    whole = read_audio(AudioClip(path), voice_activity.RATE)
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=0, atol=1e-6)
    expected = get_speech_timestamps(
        whole, load_silero_vad(), min_silence_duration_ms=200, min_speech_duration_ms=100, speech_pad_ms=0
    )
    advanced: list[float] = []
    found = voice_activity.find_pauses(path, 0.2, advanced.append)
    assert sum(advanced) == pytest.approx(len(whole) / voice_activity.RATE)
    assert found.duration_s == len(whole) / voice_activity.RATE
    speech = [(left.end_s, right.start_s) for left, right in zip(found.pauses, found.pauses[1:], strict=False)]
    assert speech == [(part["start"] / 16000, part["end"] / 16000) for part in expected]
    assert all(pause.start_s <= pause.cut_s <= pause.end_s for pause in found.pauses)


def test_what_cannot_be_sliced(folder: Path, spoken: list[Spoken], tmp_path: Path) -> None:
    """All problems at once; nothing is written."""
    (tmp_path / "other.flac").write_bytes(b"no sound")
    recordings = [str(folder / "recording.flac"), str(tmp_path / "none.wav")]
    options = ["--output_dir", str(tmp_path / "new"), "--subtitles", str(folder / "recording.srt")]
    options += ["--min_clip_s", "0.1", "--max_clip_s", "0", "--recognizer", "pocketsphinx"]
    _, error = slice_in_process([*recordings, *options], 2)
    for message in (
        "--min_clip_s 0.1: must be", "--max_clip_s 0.0: must be", "with --subtitles, the texts are theirs",
        "needs --vocabulary", "none.wav: no such recording", "--subtitles: 1 for 2 recordings",
    ):  # fmt: skip
        assert message in error
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    options = ["--output_dir", str(tmp_path / "full"), "--subtitles", str(folder / "recording.srt")]
    assert "not of an earlier slicing" in slice_in_process([recordings[0], *options], 2)[1]


def test_silence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", torch.zeros(3 * RATE).numpy(), RATE)
    options = [str(tmp_path / "silent.wav"), *HEARD, "--output_dir", str(tmp_path / "new")]
    assert "there is no clip" in slice_in_process(options, 2)[1]


def test_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    monkeypatch.setenv("PATH", str(tmp_path))
    _, error = slice_in_process([str(tmp_path / "film.mp4"), *HEARD, "--output_dir", str(tmp_path / "new")], 2)
    assert "film.mp4: soundfile cannot read it as audio, and FFmpeg" in error


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs FFmpeg")
def test_video(folder: Path, spoken: list[Spoken], by_subtitles: Sliced, tmp_path: Path) -> None:
    video, sound = tmp_path / "film.mkv", folder / "recording.flac"
    picture = ["-f", "lavfi", "-i", "color=size=16x16:rate=1"]
    make = ["ffmpeg", "-v", "error", *picture, "-i", str(sound), "-shortest", "-c:a", "flac", str(video)]
    subprocess.run(make, check=True)
    options = ["--subtitles", str(folder / "recording.srt"), "--output_dir", str(tmp_path / "new"), "--loudness", "-23"]
    slice_in_process([str(video), *options])
    for clip, same in zip(Sliced(tmp_path / "new", "").clips, by_subtitles.clips, strict=True):
        assert (clip["text"], clip["start"], clip["end"]) == (same["text"], same["start"], same["end"])
        found, expected = (soundfile.read(path)[0] for path in (
            tmp_path / "new" / clip["file_name"], by_subtitles.folder / same["file_name"]
        ))  # fmt: skip
        assert abs(found - expected).max() < 1e-3
    (tmp_path / "broken.mp4").write_bytes(os.urandom(1000))
    broken = [str(tmp_path / "broken.mp4"), *HEARD, "--output_dir", str(tmp_path / "none")]
    assert "FFmpeg cannot read its sound" in slice_in_process(broken, 2)[1]
