"""Overfit, merged, loaded by plain transformers in a new process: the same codes, ending at the same frame."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, SYSTEM, speech_sample, write_manifest
from launcher import train_runs

from higgs_ds.data.audio import read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.codec_info import find_codec
from higgs_ds.model.sample import AudioClip

pytestmark = pytest.mark.slow

CLIPS = {
    "Good morning.": "anna_00.flac",
    "Turn left here.": "ben_00.flac",
    "Guten Abend.": "carla_00.flac",
    "I will call you back after lunch.": "ben_04.flac",
}
# Does not import this project. Prints, for each text, the rows of codes that it generates greedily.
PLAIN_TRANSFORMERS = """
import contextlib, json, sys
from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration
folder, system, *texts = sys.argv[1:]
with contextlib.chdir(folder):
    processor = AutoProcessor.from_pretrained(".")
model = HiggsAudioV2ForConditionalGeneration.from_pretrained(folder).eval()
result = {}
for text in texts:
    chat = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    result[text] = model.generate(**inputs, do_sample=False, max_new_tokens=200)[0].tolist()
json.dump(result, sys.stdout)
"""


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    folder = tmp_path_factory.mktemp("overfit")
    manifest = write_manifest(folder / "four.jsonl", [speech_sample(text, clip) for text, clip in CLIPS.items()])
    train_runs(
        1,
        [
            f"--train_manifest {manifest} --val_split 0 --output_dir {folder}/run --batch_size 4 --grad_accum 1 "
            "--max_steps 200 --lr 5e-3 --lora_dropout 0 --precision fp32 --merge_adapter_with_base".split()
        ],
    )
    command = [sys.executable, "-c", PLAIN_TRANSFORMERS, str(folder / "run" / "merged_model"), SYSTEM, *CLIPS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout)


@pytest.mark.parametrize("text", CLIPS)
def test_every_code_and_the_end(generated: dict[str, list[list[int]]], base: Path, text: str) -> None:
    waveform = read_audio(AudioClip(PROJECT / "samples" / "voices" / CLIPS[text]), 24000)
    codes = Codec(find_codec(base, None), torch.device("cpu")).encode(waveform)
    num_frames = codes.shape[1]
    rows = torch.tensor(generated[text])
    assert len(rows) == num_frames + 9  # BOS, the frames, EOS, the delay of 7: it stopped on its own
    for k in range(8):
        assert (rows[: k + 1, k] == 1024).all()
        assert rows[k + 1 : k + 1 + num_frames, k].equal(codes[k])
        assert (rows[k + 1 + num_frames :, k] == 1025).all()
