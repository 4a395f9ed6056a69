"""launch/prefer.py: its clips have the codes that were sampled, and neither ranks nor interruptions change a byte."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from conftest import PROJECT, VOICES, speech_sample, write_manifest
from launcher import free_port, run_script
from safetensors import safe_open

from higgs_ds.bases.bundle import Bundle, open_bundle
from higgs_ds.data.audio import read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.formats import chatml
from higgs_ds.data.survey import Checker
from higgs_ds.model.sample import AudioClip, Sample
from higgs_ds.options.train import DataOptions
from higgs_ds.reviewing.pieces import entry_of
from higgs_ds.speech.batched import BatchPrompt, sampling_of, seed_of, speak_batch
from higgs_ds.speech.generate import GenerationModel, load_generation_model
from higgs_ds.speech.preference_files import PreferenceFolder

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
RENDERINGS, BATCH_SIZE, SEED = 3, 4, 7
TARGETS = [("anna_00.flac", 0.5), ("ben_00.flac", 0.4), ("ben_01.flac", 0.3)]


def manifest_in(folder: Path) -> Path:
    """Three texts: without a reference, with a part of a file, with a clip that is embedded."""
    entries = [speech_sample(f"Text {i}.", clip, duration=seconds) for i, (clip, seconds) in enumerate(TARGETS)]
    embedded = base64.b64encode((VOICES / "carla_00.flac").read_bytes()).decode()
    part = {"type": "audio", "audio_url": str(VOICES / "ben_04.flac"), "offset": 0.25, "duration": 0.5}
    for entry, clip in zip(entries[1:], (part, {"type": "audio", "raw_audio": embedded}), strict=True):
        before = [{"role": "user", "content": "Said before."}, {"role": "assistant", "content": clip}]
        entry["messages"][1:1] = before
        entry |= {"start_index": 3, "speaker": "ben"}
    return write_manifest(folder / "texts.jsonl", entries)


def options(base: str, output: str, **others: Any) -> list[str]:
    given = {
        "manifest": "texts.jsonl", "base_model_path": base, "output_dir": output, "renderings": RENDERINGS,
        "batch_size": BATCH_SIZE, "seed": SEED, "min_margin": 0.0001, **others,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def contents(folder: Path) -> dict[str, Any]:
    """Return the content of each file; the order of a code file's metadata differs from process to process."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content: Any = path.read_bytes()
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                content = file.metadata(), file.get_tensor("codes").tolist()
        found[str(path.relative_to(folder))] = content
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Made:
    base: str
    folder: Path
    stdout: str
    stderr: str

    @property
    def output(self) -> Path:
        return self.folder / "pairs"


@pytest.fixture(scope="module", params=["tiny-random-base", "tiny-random-base-v3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("preferred")
    manifest_in(folder)
    done = run_script("prefer", options(request.param, "pairs"), folder, environment=one_thread())
    assert done.returncode == 0, done.stderr
    return Made(request.param, folder, done.stdout, done.stderr)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def samples_of(made: Made) -> list[Sample]:
    """The pairs as the reader of ChatML reads them, with what was chosen as their target."""
    found = []
    for pair in lines_of(made.output / "pairs.jsonl"):
        value = {"messages": pair["prompt"] + pair["chosen"], "start_index": len(pair["prompt"])}
        entry = entry_of(value, made.output / "pairs.jsonl", chatml.build)
        assert entry.sample, entry.faults
        found.append(entry.sample)
    return found


def opened(made: Made) -> Bundle:
    return open_bundle(made.base, None, None, Path(os.environ["HIGGS_DS_CACHE"]))


def test_stored_codes_are_those_that_were_sampled(made: Made) -> None:
    """Speaking again, from the messages and the references of the pairs, gives the stored codes of all renderings."""
    bundle, codes_of = opened(made), {}
    cache = bundle.coder(made.output).cache
    model, codec = load_generation_model(GenerationModel(bundle, None, None), CPU), Codec(bundle.codec.folder, CPU)
    prompts = []
    samples = samples_of(made)
    assert len(samples) == 3
    for sample, (clip, seconds) in zip(samples, TARGETS, strict=True):
        given = [cache.load(cache.key(clip), 8) for clip in sample.clips[:-1]]
        target = codec.encode(read_audio(AudioClip(VOICES / clip, 0.0, seconds), codec.sample_rate))
        references = [cached.codes.long() for cached in given if cached]
        prompts.append((list(sample.messages[:-1]), references, 2 * target.shape[1] + 25))
    assert [len(references) for _, references, _ in prompts] == [0, 1, 1]
    places = [(n, k) for n in range(3) for k in range(RENDERINGS)]
    for start in range(0, len(places), BATCH_SIZE):
        batch = places[start : start + BATCH_SIZE]
        asked = [BatchPrompt(*prompts[n], seed_of(SEED, n, k)) for n, k in batch]
        for place, speech in zip(
            batch, speak_batch(model, bundle, asked, sampling_of(model, 1.0, None, None)), strict=True
        ):
            codes_of[place] = speech.codes.clamp(max=1023)
    for line in lines_of(made.output / "renderings.jsonl"):
        codes = codes_of[line["prompt"], line["rendering"]]
        assert line["frames"] == codes.shape[1]
        if line["wav"] is None:
            assert line["frames"] == 0
            continue
        stored = cache.load(cache.key(AudioClip(made.output / line["wav"])), 8)
        assert stored
        assert stored.codes.long().equal(codes)
        heard, _ = soundfile.read(made.output / line["wav"], dtype="float32")
        torch.testing.assert_close(torch.from_numpy(heard), codec.decode(codes).clamp(-1, 1), rtol=0, atol=1e-4)


def test_references_have_the_codes_of_the_recordings(made: Made) -> None:
    """Not those of their decoded sound: the codes of the part of a file, and of the embedded file."""
    bundle = opened(made)
    cache, codec = bundle.coder(made.output).cache, Codec(bundle.codec.folder, CPU)
    recordings = [AudioClip(VOICES / "ben_04.flac", 0.25, 0.5), AudioClip(VOICES / "carla_00.flac")]
    for sample, recording in zip(samples_of(made)[1:], recordings, strict=True):
        stored = cache.load(cache.key(sample.clips[0]), 8)
        assert stored
        assert stored.codes.long().equal(codec.encode(read_audio(recording, codec.sample_rate)))


def test_preparation_accepts_the_codes(made: Made) -> None:
    """With the folder as the cache, all clips of the pairs count as encoded, whatever the default options check."""
    checker = Checker(DataOptions(), opened(made).coder(made.output))
    for sample in samples_of(made):
        for clip in sample.clips:
            facts = checker.facts(clip, False)
            assert facts.is_cached
            assert facts.quality.rate_hz == 24000


def test_pairs_are_the_best_and_the_worst(made: Made) -> None:
    renderings = lines_of(made.output / "renderings.jsonl")
    assert [(one["prompt"], one["rendering"]) for one in renderings] == [(n, k) for n in range(3) for k in range(3)]
    for number, pair in enumerate(lines_of(made.output / "pairs.jsonl")):
        scores = {one["wav"]: one["score"] for one in renderings if one["prompt"] == number and one["wav"]}
        chosen, rejected = (pair[name][0]["content"]["audio_url"] for name in ("chosen", "rejected"))
        assert (scores[chosen], scores[rejected]) == (max(scores.values()), min(scores.values()))
        assert pair["margin"] == pytest.approx(scores[chosen] - scores[rejected])
        assert pair["scores"]["chosen"]["score"] == scores[chosen]
        assert pair["source"] == f"texts.jsonl:{number + 1}"
        assert pair.get("speaker") == ("ben" if number else None)
        assert pair["prompt"][-1] == {"role": "user", "content": f"Text {number}."}
    assert "warning: no --recognizer is given" in made.stdout + made.stderr
    assert "3 texts, 9 renderings; mean score of the best " in made.stdout
    assert "pairs: pairs/pairs.jsonl (3 pairs)\n" in made.stdout


def test_other_codes_of_the_same_sound(tmp_path: Path) -> None:
    """Silence has its own codes in each clip; they can be read back, and preparation accepts a silent clip."""
    folder = PreferenceFolder(tmp_path, "codec", 24000)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randint(1024, (8, 5), generator=generator) for _ in range(2)]
    keys = [folder.store_clip(f"clips/0-{k}.wav", torch.zeros(4800), codes) for k, codes in enumerate(given)]
    assert keys[0] != keys[1]
    for key, codes in zip(keys, given, strict=True):
        stored = folder.cache.load(key, 8)
        assert stored
        assert stored.quality
        assert stored.codes.long().equal(codes)
        assert folder.cache.facts(key, 8) == (5, stored.quality)
    assert folder.store_clip("clips/1-0.wav", torch.zeros(4800), given[0]) == keys[0]


def test_measured(tmp_path: Path) -> None:
    """The built-in base says some digits wrong at this temperature; its scores are the sums of their parts."""
    held_out = str(PROJECT / "samples" / "digits_held_out.jsonl")
    given = options("speaking-base", "out", manifest=held_out, temperature=1.3, num_samples=1, batch_size=3)
    given += ["--recognizer", "pocketsphinx", "--measures", "similarity"]
    done = run_script("prefer", given, tmp_path, environment=one_thread())
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr
    for line in lines_of(tmp_path / "out" / "renderings.jsonl"):
        measures = line["measures"]
        assert 0 < measures["similarity"] < 1
        expected = 1 - measures["word_error_rate"] + measures["similarity"] - (not measures["stopped"])
        assert line["score"] == pytest.approx(expected, abs=1e-5)
    (pair,) = lines_of(tmp_path / "out" / "pairs.jsonl")
    assert pair["scores"]["chosen"]["word_error_rate"] < pair["scores"]["rejected"]["word_error_rate"]


def test_ranks_change_nothing(made: Made) -> None:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    launcher = [torchrun, "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*launcher, str(PROJECT / "launch" / "prefer.py"), *options(made.base, "on_two")]
    done = subprocess.run(command, cwd=made.folder, capture_output=True, text=True, check=False, env=one_thread())
    assert done.returncode == 0, done.stderr
    assert contents(made.folder / "on_two") == contents(made.output)


def test_interrupted_and_started_again(made: Made) -> None:
    """With a half line, a batch that is not complete and clips that are missing, the files become the same."""
    output = shutil.copytree(made.output, made.folder / "interrupted")
    lines = (output / "renderings.jsonl").read_text().splitlines(keepends=True)
    (output / "renderings.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    (output / "pairs.jsonl").unlink()
    for name in ("clips/0-1.wav", "clips/2-0.wav"):
        (output / name).unlink()
    done = run_script("prefer", options(made.base, "interrupted"), made.folder, environment=one_thread())
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(made.output)


def test_ties_are_left_out(made: Made) -> None:
    """Another margin needs no other renderings."""
    output = shutil.copytree(made.output, made.folder / "ties")
    done = run_script("prefer", options(made.base, "ties", min_margin=100), made.folder)
    assert done.returncode == 0, done.stderr
    assert (output / "pairs.jsonl").read_text() == ""
    assert "(0 pairs; 3 texts left out, no two renderings differ by 100 or more)" in done.stdout
    assert "warning: there is no pair" in done.stdout + done.stderr


def test_other_settings_are_refused(made: Made) -> None:
    output, before = made.output, contents(made.output)
    done = run_script("prefer", options(made.base, "pairs", seed=1, temperature=0.5), made.folder)
    assert done.returncode == 2
    assert "--output_dir pairs: was begun with other settings: temperature 1.0, seed 7; choose" in done.stderr
    lines = (made.folder / "texts.jsonl").read_text().replace("Text 0.", "Text zero.")
    (made.folder / "others.jsonl").write_text(lines)
    done = run_script("prefer", options(made.base, "pairs", manifest="others.jsonl"), made.folder)
    assert (done.returncode, "other settings: manifest; choose" in done.stderr) == (2, True)
    (output / "pairs.jsonl.orig").write_text("")
    done = run_script("prefer", options(made.base, "pairs"), made.folder)
    (output / "pairs.jsonl.orig").unlink()
    assert (done.returncode, "pairs.jsonl was changed by a review" in done.stderr) == (2, True)
    assert contents(output) == before


def test_all_problems_at_once(tmp_path: Path) -> None:
    write_manifest(tmp_path / "texts.jsonl", [speech_sample("Text.", "none.flac")])
    (tmp_path / "out" / "clips").mkdir(parents=True)
    given = options(
        "nowhere", "out", renderings=1, temperature=0, batch_size=0, top_k=0, top_p=2, min_margin=-1, lora_scale=2
    )
    done = run_script("prefer", given, tmp_path)
    assert done.returncode == 2
    for problem in (
        "--renderings 1: must be 2 or more", "--temperature 0.0: must be above 0", "--batch_size 0: must be 1 or more",
        "--top_k 0: must be 1 or more", "--top_p 2.0: must be above 0", "--min_margin -1.0: must be 0 or above",
        "--lora_scale 2.0: needs --lora_adapter_path", "nowhere: ", "none.flac: no such file",
        "--output_dir out: has clips, but no prefer.json; choose another folder",
    ):  # fmt: skip
        assert problem in done.stderr
    assert "Traceback" not in done.stderr
