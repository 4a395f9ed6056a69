"""The commands of pretraining/README.md at a small size: from espeak-ng to a base that the package could ship."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import PROJECT
from corpus import WORDS
from launcher import train_runs
from safetensors.torch import load_file
from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration, HiggsAudioV2TokenizerModel

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")]
STEPS = ("--steps", "2", "3", "2", "1", "1", "1", "--batch_size", "2", "--save_steps", "1")


def run(folder: Path, script: str, *options: str) -> str:
    command = [sys.executable, str(PROJECT / "pretraining" / f"{script}.py"), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    run(folder, "corpus", "corpus", "--share", "0.012")
    run(folder, "codec", "corpus", "codec", *STEPS)
    run(folder, "base", "corpus", "codec/speaking-codec", "untrained-base")
    train_runs(
        1,
        [
            f"--base_ckpt {folder}/untrained-base --train_manifest {folder}/corpus/base_train.jsonl --finetune full "
            f"--output_dir {folder}/run --batch_size 4 --grad_accum 1 --max_steps 2 --precision fp32 --lr 2e-3".split()
        ],
    )
    run(folder, "ship", "codec/speaking-codec", "run/final_model", "--assets", "assets")
    return folder


def samples(folder: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "corpus" / f"{part}.jsonl").read_text().splitlines()]


def test_corpus(folder: Path) -> None:
    """Clips have whole frames, as many as their words, and no held-out text occurs in training."""
    texts_by_part: dict[str, set[str]] = {}
    clips: dict[str, list[tuple[list[int], int]]] = {}
    for part in ("codec_held_out", "base_held_out", "new_voice_held_out", "base_train", "new_voice_train"):
        for sample in samples(folder, part):
            *_, words, speech = sample["messages"]
            clip = soundfile.info(folder / "corpus" / speech["content"]["audio_url"])
            assert clip.samplerate == 24000
            assert clip.frames % 960 == 0
            texts_by_part.setdefault(part, set()).add(words["content"])
            counts = [words["content"].split().count(word) for word in WORDS]
            clips.setdefault(sample["speaker"], []).append((counts, clip.frames))
    trained = texts_by_part["base_train"] | texts_by_part["new_voice_train"]
    for part, texts in texts_by_part.items():
        assert part.endswith("train") or not texts & trained
    assert len(clips) == 4
    for voice in ("emil", "dora"):
        assert len(clips[voice]) > 5 * len(WORDS)
        counts, frames = (torch.tensor(column, dtype=torch.float64) for column in zip(*clips[voice], strict=True))
        # A word takes the same time at every position: one length per word explains the lengths of all clips.
        per_word = torch.linalg.lstsq(counts, frames, driver="gelsd").solution
        torch.testing.assert_close(counts @ per_word, frames, rtol=0, atol=1e-3)
    run(folder, "corpus", "again", "--share", "0.012")
    for path in (folder / "corpus").rglob("*.*"):
        assert (folder / "again" / path.relative_to(folder / "corpus")).read_bytes() == path.read_bytes()


def test_codec_goes_on_where_it_was_stopped(folder: Path) -> None:
    whole = load_file(folder / "codec" / "speaking-codec" / "model.safetensors")
    stopped = subprocess.Popen(
        [sys.executable, str(PROJECT / "pretraining" / "codec.py"), "corpus", "stopped", *STEPS],
        cwd=folder, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert stopped.stdout
    while "codebooks 2/3" not in stopped.stdout.readline():
        assert stopped.poll() is None
    stopped.kill()
    stopped.wait()
    assert not (folder / "stopped" / "speaking-codec").exists()
    output = run(folder, "codec", "corpus", "stopped", *STEPS)
    assert "autoencoder" not in output
    resumed = load_file(folder / "stopped" / "speaking-codec" / "model.safetensors")
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_codec_is_transformers_own(folder: Path) -> None:
    """A clip's codes depend only on nearby speech, and the later codebooks are unused."""
    codec = HiggsAudioV2TokenizerModel.from_pretrained(folder / "codec" / "speaking-codec").eval()
    speech = samples(folder, "base_held_out")[0]["messages"][-1]["content"]["audio_url"]
    clip = torch.from_numpy(soundfile.read(folder / "corpus" / speech, dtype="float32")[0])
    other = clip.clone()
    other[len(clip) // 2 :] = 0
    with torch.no_grad():
        codes, other_codes = (codec.encode(sound[None, None]).audio_codes[0] for sound in (clip, other))
        assert codec.decode(codes[None]).audio_values.shape == (1, 1, len(clip))
    assert codes.shape == (8, len(clip) // 960)
    assert not codes[3:].any()
    near = len(clip) // 960 // 2 - 2
    assert codes[:, :near].equal(other_codes[:, :near])
    assert not codes[:, near:].equal(other_codes[:, near:])


def test_shipped(folder: Path) -> None:
    """The shipped weights are the trained ones in float16, with every file that a base needs except the processor."""
    for name, source in (("speaking-codec", "codec/speaking-codec"), ("speaking-base", "run/final_model")):
        shipped = load_file(folder / "assets" / name / "model.safetensors")
        for key, tensor in load_file(folder / source / "model.safetensors").items():
            torch.testing.assert_close(shipped[key], tensor.half(), rtol=0, atol=0)
        assert json.loads((folder / "assets" / name / "config.json").read_text())["dtype"] == "float16"
    processor = AutoProcessor.from_pretrained(folder / "untrained-base")
    assert processor.tokenizer.tokenize(" seven seven") == ["Ġseven", "Ġseven"]
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder / "assets" / "speaking-base")
    assert model.config.audio_token_id == processor.tokenizer.convert_tokens_to_ids("<|AUDIO_OUT|>")
