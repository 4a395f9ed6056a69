"""Preference tuning from the command line: ranks and stages agree, it resumes, it learns, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import PROJECT, SYSTEM, native_inputs, read_metrics, write_manifest
from launcher import run_script, train_runs
from peft import PeftModel
from safetensors.numpy import load_file
from test_invariance import LAYOUTS, STAGES, UPDATES
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_ds.adapters.speakers import read_speakers
from higgs_ds.bases.builtin import RANDOM_BASE
from higgs_ds.bases.bundle import open_bundle
from higgs_ds.data.code_cache import CachedCodes, CodeCache
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.preparation import Preparation
from higgs_ds.data.survey import Checker
from higgs_ds.model.sample import AudioClip
from higgs_ds.options.train import DataOptions

pytestmark = pytest.mark.slow

REFERENCE = "reference_log_probs.safetensors"
# Log-probabilities are sums over hundreds of targets, whose rounding is multiplied by beta.
LOSS, GRADIENT_NORM = 1e-4, 1e-3


def pair(text: str, chosen: str, rejected: str, chosen_s: float = 0.4, rejected_s: float = 0.6) -> dict[str, Any]:
    def answer(clip: str, seconds: float) -> list[dict[str, Any]]:
        url = str(PROJECT / "samples" / "voices" / clip)
        return [{"role": "assistant", "content": {"type": "audio", "audio_url": url, "duration": seconds}}]

    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"prompt": prompt, "chosen": answer(chosen, chosen_s), "rejected": answer(rejected, rejected_s)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pairs: the chosen sample is Anna's, the rejected one Ben's, and of another length."""
    entries = [
        pair(f"Sentence {i}.", f"anna_0{i % 5}.flac", f"ben_0{i % 5}.flac", 0.3 + 0.03 * i, 0.5 - 0.02 * i)
        for i in range(9)
    ]
    return write_manifest(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", entries)


def options(pairs: Path, deepspeed: Path, folder: Path, more: str = "", layout: str = "1x1x4") -> list[str]:
    """Return the options of a run over nine pairs in windows of 4, 4 and 1, twice."""
    _, batch_size, grad_accum = LAYOUTS[layout]
    return (
        f"--objective dpo --pairs {pairs} --val_manifest {pairs} --deepspeed {deepspeed} --output_dir {folder} "
        f"--precision fp32 --batch_size {batch_size} --grad_accum {grad_accum} --epochs 2 --lr 1e-3 --log_steps 1 "
        f"--val_steps 3 --save_steps 3 {more}"
    ).split()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, pairs: Path, ds_file: Callable[[int], Path]) -> Path:
    """Output folders STAGE-LAYOUT of v2, v3-STAGE-LAYOUT, 4bit, resumed."""
    root = tmp_path_factory.mktemp("dpo")
    for world_size in (1, 2):
        layouts = [layout for layout, (ranks, _, _) in LAYOUTS.items() if ranks == world_size]
        runs = [
            options(pairs, ds_file(stage), root / f"{stage}-{layout}", layout=layout)
            for layout in layouts
            for stage in STAGES
        ]
        v3 = f"--base_ckpt {RANDOM_BASE}-v3"
        runs += [
            options(pairs, ds_file(stage), root / f"v3-{stage}-{layouts[-1]}", v3, layouts[-1])
            for stage in ((0, 2) if world_size == 1 else (2, 3))
        ]
        if world_size == 1:
            runs.append(options(pairs, ds_file(2), root / "4bit", "--load_in_4bit"))
        train_runs(world_size, runs)
    return root


def compare(expected_run: Path, found_run: Path) -> None:
    expected, found = read_metrics(expected_run), read_metrics(found_run)
    assert [line["step"] for line in expected] == [1, 2, 3, 3, 4, 5, 6, 6]
    for line, other in zip(expected, found, strict=True):
        kind = "val" if "val/loss" in line else "train"
        names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
        for name in names:
            assert other[f"{kind}/{name}"] == pytest.approx(line[f"{kind}/{name}"], rel=LOSS, abs=LOSS), name
        if kind == "train":
            assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=GRADIENT_NORM)
    longest = sum(line["lr"] for line in expected if "lr" in line)
    adapters = [load_file(run / "lora_adapters" / "adapter_model.safetensors") for run in (expected_run, found_run)]
    for name, tensor in adapters[0].items():
        assert abs(adapters[1][name] - tensor).max() <= UPDATES * longest, name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_accumulation_and_stages_agree(results: Path, stage: int, layout: str) -> None:
    compare(results / "0-1x1x4", results / f"{stage}-{layout}")


@pytest.mark.parametrize("name", ["v3-2-1x1x4", "v3-2-2x2x1", "v3-3-2x2x1"])
def test_v3_agrees(results: Path, name: str) -> None:
    compare(results / "v3-0-1x1x4", results / name)


@pytest.mark.parametrize("name", ["0-1x1x4", "3-2x2x1", "v3-0-1x1x4", "4bit"])
def test_it_learns_to_prefer(results: Path, name: str) -> None:
    """At first no sample is preferred; after six steps, most chosen ones are."""
    lines = read_metrics(results / name)
    first, last = lines[0], lines[-1]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["train/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert last["val/loss"] < 0.5
    assert last["val/rewards/accuracies"] > 0.8
    assert last["val/rewards/margins"] == pytest.approx(
        last["val/rewards/chosen"] - last["val/rewards/rejected"], abs=1e-6
    )


def test_the_reference_is_the_model_at_the_start(
    base: Path, pairs: Path, ds_file: Callable[[int], Path], cache_dir: Path, tmp_path: Path
) -> None:
    """The base with the adapter of --init_from, by transformers and PEFT alone; dropout changes nothing of it.

    The result keeps the adapter's record of speakers, whose prompts the pairs have.
    """
    first = f"--deepspeed {ds_file(2)} --output_dir {tmp_path / 'sft'} --precision fp32 --max_steps 2 --lr 5e-3"
    first += " --speaker_prompt tag"
    more = f"--init_from {tmp_path / 'sft'} --lora_dropout 0.2 --max_steps 1"
    train_runs(1, [first.split(), options(pairs, ds_file(2), tmp_path / "run", more)])
    bundle = open_bundle(str(base), None, None, cache_dir)
    with Preparation(DataOptions(format="pairs"), bundle.coder(cache_dir), cache_dir) as preparation:
        index = preparation.keep(preparation.check(pairs))
        assert preparation.coder
        batch = Dataset(index, np.arange(18), preparation.coder).batch(range(18))
    native = HiggsAudioV2ForConditionalGeneration.from_pretrained(base, use_text_head=True, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(native, tmp_path / "sft" / "lora_adapters").eval()
    expected = torch.zeros(18, dtype=torch.float64)
    with torch.no_grad():
        inputs = native_inputs(batch, native.config.audio_token_id)
        hidden = native.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        for head, places, targets in (
            (native.text_lm_head, batch.text_places, batch.text_targets[:, None]),
            (native.audio_lm_head, batch.audio_places, batch.audio_targets),
        ):
            positions = batch.positions[places]
            log_probs = head(hidden[positions]).view(*targets.shape, -1).log_softmax(-1)
            found = log_probs.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
            expected.index_add_(0, positions // batch.places.shape[1], found.double().sum(1))
    assert adapted.active_adapter
    saved = load_file(tmp_path / "run" / REFERENCE)
    assert saved["train"] == pytest.approx(expected.numpy(), rel=1e-6)
    assert saved["val"] == pytest.approx(saved["train"], rel=1e-6)
    records = [read_speakers(tmp_path / run / "lora_adapters") for run in ("sft", "run")]
    assert records[0] == records[1]
    assert {"anna", "ben"} <= records[1].voices.keys()
    with adapted.disable_adapter(), torch.no_grad():
        without = native.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    assert (without - hidden).abs().max() > 1e-3  # the adapter does something


def test_resumed_as_if_uninterrupted(results: Path, pairs: Path, ds_file: Callable[[int], Path]) -> None:
    """From step 3, with the log-probabilities of the first start; without them, or with other pairs, it is refused."""
    runs = {name: results / name for name in ("resumed", "lost", "others")}
    for folder in runs.values():
        shutil.copytree(results / "2-1x1x4", folder)
        shutil.rmtree(folder / "checkpoint-6")
    train_runs(1, [options(pairs, ds_file(2), runs["resumed"], "--resume auto")])
    lines = [
        [
            {k: v for k, v in line.items() if "loss" in k or "rewards" in k or k == "grad_norm"}
            for line in read_metrics(f)
        ]
        for f in (results / "2-1x1x4", runs["resumed"])
    ]
    assert lines[0] == lines[1]
    adapters = [
        load_file(results / name / "lora_adapters" / "adapter_model.safetensors") for name in ("2-1x1x4", "resumed")
    ]
    assert all((tensor == adapters[1][name]).all() for name, tensor in adapters[0].items())

    (runs["lost"] / REFERENCE).unlink()
    fewer = write_manifest(
        pairs.parent / "fewer.jsonl", [json.loads(line) for line in pairs.read_text().splitlines()[:5]]
    )
    for name, manifest, message in (
        ("lost", pairs, "cannot be resumed without the log-probabilities"),
        ("others", fewer, "is of other pairs (val)"),
    ):
        run = options(pairs, ds_file(2), runs[name], "--resume auto --base_ckpt tiny-random-base")
        run[run.index("--val_manifest") + 1] = str(manifest)
        found = run_script("train", run, pairs.parent)
        assert found.returncode == 2
        assert message in found.stderr


def test_codes_beside_the_pairs_are_trained_on(
    base: Path, pairs: Path, ds_file: Callable[[int], Path], cache_dir: Path, tmp_path: Path
) -> None:
    """Not those that the codec makes of the sound: with other codes there, the log-probabilities are other ones."""
    clips, entries = tmp_path / "clips", []
    clips.mkdir()
    for number, name in enumerate(("anna", "ben", "carla", "anna")):
        waveform, rate = soundfile.read(PROJECT / "samples" / "voices" / f"{name}_0{number}.flac")
        soundfile.write(clips / f"{number}.wav", waveform[: rate // 2], rate)
    for number in (0, 2):
        entry = pair("Hello.", "anna_00.flac", "ben_00.flac")
        for key, clip in (("chosen", number), ("rejected", number + 1)):
            entry[key][0]["content"] = {"type": "audio", "audio_url": f"clips/{clip}.wav"}
        entries.append(entry)
    manifest = write_manifest(tmp_path / "pairs.jsonl", entries)
    bundle = open_bundle(str(base), None, None, cache_dir)
    coder, draw = bundle.coder(cache_dir), torch.Generator().manual_seed(0)
    beside, codes = CodeCache(tmp_path, coder.cache.codec_digest), []
    for number in range(4):
        clip = AudioClip(clips / f"{number}.wav")
        facts = Checker(DataOptions(), coder).facts(clip, is_heard=False)
        codes.append(torch.randint(1024, (8, facts.num_frames), generator=draw))
        beside.store(coder.cache.key(clip), CachedCodes(codes[-1], facts.quality))
    train_runs(1, [options(manifest, ds_file(2), tmp_path / "run", "--max_steps 1 --val_split 0.5")])
    for number in range(4):
        cached = coder.cache.load(coder.cache.key(AudioClip(clips / f"{number}.wav")), 8)
        assert cached is not None
        assert cached.codes.long().equal(codes[number])


def test_what_is_refused(pairs: Path, tmp_path: Path) -> None:
    """Everything at once: options that do not go together, and lines that are no pairs, each with its line."""
    common = ["--base_ckpt", "tiny-random-base", "--output_dir", str(tmp_path / "run")]
    given = "--objective dpo --mix 2 --split_by speaker --reference random --beta 0 --label_smoothing 0.6".split()
    found = run_script("train", [*common, *given], tmp_path).stderr
    for option in ("--pairs FILE", "--mix 2", "--split_by speaker", "--reference random", "--beta 0.0", "0.6"):
        assert option in found, found
    found = run_script("train", [*common, "--beta", "0.5", "--pairs", str(pairs)], tmp_path).stderr
    assert "--beta: needs --objective dpo" in found
    assert "--pairs: needs --objective dpo" in found
    found = run_script("train", [*common, "--train_manifest", str(pairs)], tmp_path).stderr
    assert "has pairs of a chosen and a rejected sample; train on them with --objective dpo --pairs" in found
    good, bad = json.loads(pairs.read_text().splitlines()[0]), tmp_path / "bad.jsonl"
    without = {key: value for key, value in good.items() if key != "rejected"}
    silent = good | {"chosen": [{"role": "assistant", "content": "no audio"}]}
    lost = json.loads(json.dumps(good).replace("ben_00", "gone"))
    bad.write_text("\n".join(["{", "[1]", *map(json.dumps, (without, silent, lost))]))
    found = run_script("train", [*common, "--objective", "dpo", "--pairs", str(bad)], tmp_path).stderr
    for line, problem in {
        1: "not JSON", 2: "pair: must be an object", 3: "rejected: must be a list of one or more messages",
        4: "no target audio", 5: "gone.flac",
    }.items():  # fmt: skip
        (shown,) = [text for text in found.splitlines() if f"bad.jsonl:{line}:" in text]
        assert problem in shown
    assert not (tmp_path / "run" / "lora_adapters").exists()
