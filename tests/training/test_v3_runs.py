"""Whole runs of Higgs Audio v3: overfitting, numbers of ranks, ZeRO stages, 4 bits, resuming, full fine-tuning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, SYSTEM, read_metrics, speech_sample, write_manifest
from launcher import run_script, train_runs
from mutants import V3_MUTANTS
from plain_v3 import PlainModel, delayed
from safetensors.torch import load_file
from test_invariance import LAYOUTS, STAGES, differences
from transformers import AutoTokenizer

from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base
from higgs_ds.bases.bundle import open_bundle
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.data.audio import read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.model.loading import load_base
from higgs_ds.model.sample import ASSISTANT, USER, AudioClip, Message
from higgs_ds.speech.generate import speak

pytestmark = pytest.mark.slow

CLIPS = {
    "Good morning.": "anna_00.flac",
    "Turn left here.": "ben_00.flac",
    "Guten Abend.": "carla_00.flac",
    "I will call you back after lunch.": "ben_04.flac",
}
REFERENCE = ("The kettle is on, would you like some tea?", "anna_01.flac")  # of the last clip
BASE = f"{RANDOM_BASE}-v3"
OVERFIT = "--val_split 0 --batch_size 4 --grad_accum 1 --max_steps 200 --lr 5e-3 --lora_dropout 0 --precision fp32"


def entries() -> list[dict[str, Any]]:
    """Samples with a system turn, which this model has no place for; the last one has a reference, too."""
    samples = [speech_sample(text, clip) for text, clip in CLIPS.items()]
    words, spoken = speech_sample(*REFERENCE)["messages"][1:]
    samples[-1]["messages"][1:1] = [words, spoken]
    samples[-1]["start_index"] = 3
    return samples


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("v3") / "four.jsonl", entries())


@pytest.fixture(scope="module")
def codes() -> dict[str, torch.Tensor]:
    codec = Codec(builtin_base(BASE, default_cache_dir()) / "audio_tokenizer", torch.device("cpu"))
    voices = PROJECT / "samples" / "voices"
    return {text: codec.encode(read_audio(AudioClip(voices / clip), 24000)) for text, clip in CLIPS.items()}


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    codec = Codec(builtin_base(BASE, default_cache_dir()) / "audio_tokenizer", torch.device("cpu"))
    return codec.encode(read_audio(AudioClip(PROJECT / "samples" / "voices" / REFERENCE[1]), 24000))


def overfit(manifest: Path, folder: Path, *more: str) -> Path:
    run = f"--base_ckpt {BASE} --train_manifest {manifest} --output_dir {folder} {OVERFIT} --merge_adapter_with_base"
    train_runs(1, [[*run.split(), *more]])
    return folder


@pytest.fixture(scope="module")
def merged(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return overfit(manifest, tmp_path_factory.mktemp("overfit") / "run") / "merged_model"


def spoken_rows(merged: Path, reference: torch.Tensor, text: str | None) -> torch.Tensor:
    """Return the rows that plain torch speaks with the merged files; without a text, in the place of the reference."""
    tokenizer = AutoTokenizer.from_pretrained(merged)

    def ids_of(*pieces: str) -> list[int]:
        return [number for piece in pieces for number in tokenizer.encode(piece, add_special_tokens=False)]

    model, ids, rows, columns = PlainModel(merged), ids_of("<|tts|>"), torch.zeros(0, 8, dtype=torch.long), []
    if text in (None, list(CLIPS)[-1]):
        ids += ids_of("<|ref_text|>", REFERENCE[0], "<|ref_audio|>")
    if text is None:
        return model.speak(ids, rows, columns, longest=200)
    if text == list(CLIPS)[-1]:
        rows = delayed(reference)
        columns = list(range(len(ids), len(ids) + len(rows)))
        ids += [0] * len(rows)
    ids += ids_of("<|text|>", text, "<|audio|>")
    return model.speak(ids, rows, columns, longest=200)


def wrong(merged: Path, codes: dict[str, torch.Tensor], reference: torch.Tensor) -> list[str]:
    """Return the texts whose codes and end the merged model does not speak, and whether it learned the reference."""
    found = [text for text, clip in codes.items() if not spoken_rows(merged, reference, text).equal(delayed(clip))]
    rows, learned = spoken_rows(merged, reference, None), delayed(reference)
    shared = min(len(rows), len(learned))
    same = (rows[:shared] == learned[:shared]) & (learned[:shared] < 1024)
    return found + (["the reference"] if same.sum() > 0.5 * reference.numel() else [])


def test_every_code_and_the_end(merged: Path, codes: dict[str, torch.Tensor], reference: torch.Tensor) -> None:
    assert wrong(merged, codes, reference) == []


def test_generation_says_the_same(merged: Path, codes: dict[str, torch.Tensor], reference: torch.Tensor) -> None:
    """This project's own generation, with a cache, in float32: every code up to the row with the end.

    The rows after it are not those of a clip, because the runtimes force codebook 1 to EOC one row late: codes of the
    other codebooks there, the last seven frames, may be other ones.
    """
    bundle = open_bundle(str(merged), None, None, default_cache_dir())
    model = load_base(merged, torch.float32).eval()
    settings = {"do_sample": False, "max_new_tokens": 200}
    for text, expected in codes.items():
        with_reference = text == list(CLIPS)[-1]
        spoken = [Message(USER, (REFERENCE[0],)), Message(ASSISTANT, (AudioClip(Path(REFERENCE[1])),))]
        messages = [*(spoken if with_reference else []), Message(USER, (text,))]
        speech = speak(model, bundle, messages, [reference] if with_reference else [], settings)
        assert speech.stopped
        num_frames = expected.shape[1]
        assert speech.codes.shape == expected.shape
        for k in range(8):
            assert speech.codes[k, : num_frames - k + 1].equal(expected[k, : num_frames - k + 1])


@pytest.mark.parametrize("model", ["--base_model_path run/merged_model", "--lora_adapter_path run/lora_adapters"])
def test_generate(merged: Path, codes: dict[str, torch.Tensor], model: str) -> None:
    """launch/generate.py, in the bf16 of the base's files: a clip of the right length that stops."""
    text, voices = list(CLIPS)[-1], PROJECT / "samples" / "voices"
    reference = ["--ref_audio", str(voices / REFERENCE[1]), "--ref_text", REFERENCE[0]]
    options = [*model.split(), "--text", text, *reference, "--output", "said.wav", "--temperature", "0"]
    done = run_script("generate", options, merged.parents[1])
    assert done.returncode == 0, done.stderr
    assert f"({codes[text].shape[1] / 25:.2f} s, stopped on its own)" in done.stdout


def test_a_long_text_and_what_cannot_be_spoken(merged: Path) -> None:
    """Each chunk follows the reference, the only clip that the prompt has a place for."""
    voices, folder = PROJECT / "samples" / "voices", merged.parents[1]
    common = ["--base_model_path", "run/merged_model", "--temperature", "0", "--max_new_tokens", "40"]
    clip = str(voices / REFERENCE[1])
    long = ["--text", "Good morning. Turn left here. Guten Abend.", "--chunk_chars", "20", "--output", "long.wav"]
    for reference in ([], ["--ref_audio", clip, "--ref_text", REFERENCE[0]]):
        done = run_script("generate", [*common, *long, *reference], folder)
        assert done.returncode == 0, done.stderr
        assert "in 3 chunks" in done.stdout
    two = ["--text", "[SPEAKER0] Hi. [SPEAKER1] Ho.", "--ref_audio", clip, clip, "--ref_text", "A.", "B."]
    done = run_script("generate", [*common, *two, "--output", "two.wav"], folder)
    assert done.returncode == 2
    assert "2 reference clips; the prompt of this model has a place for one" in done.stderr


@pytest.mark.parametrize("mutant", V3_MUTANTS)
def test_wrong_labels_are_noticed(
    mutant: str, manifest: Path, codes: dict[str, torch.Tensor], reference: torch.Tensor, tmp_path: Path
) -> None:
    folder = overfit(manifest, tmp_path / "run", "--mutant", mutant) / "merged_model"
    assert wrong(folder, codes, reference) != []


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, manifest: Path, ds_file: Callable[[int], Path]) -> Path:
    """Output folders STAGE-LAYOUT, of eight samples in windows of 4, three times."""
    root = tmp_path_factory.mktemp("v3-invariance")
    eight = write_manifest(root / "eight.jsonl", entries() * 2)
    for world_size, layouts in ((1, ["1x1x4"]), (2, ["2x1x2", "2x2x1"])):
        runs = [
            (
                f"--base_ckpt {BASE} --deepspeed {ds_file(stage)} --output_dir {root}/{stage}-{layout} "
                f"--precision fp32 --train_manifest {eight} --val_manifest {manifest} --lora_dropout 0 "
                f"--batch_size {LAYOUTS[layout][1]} --grad_accum {LAYOUTS[layout][2]} "
                "--epochs 3 --log_steps 1 --val_steps 3 --save_steps 1"
            ).split()
            for layout in layouts
            for stage in STAGES
        ]
        train_runs(world_size, runs)
    return root


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_losses_and_adapters(results: Path, stage: int, layout: str) -> None:
    assert list(differences(results / "0-1x1x4", results / f"{stage}-{layout}")) == []


def test_resumed_to_the_last_bit(results: Path, manifest: Path, tmp_path: Path) -> None:
    """From a checkpoint of ZeRO-2 on two ranks, with what the run has logged and written before."""
    whole = results / "2-2x1x2"
    part = shutil.copytree(whole, tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(part / f"checkpoint-{step}", ignore_errors=True)
    settings = ["--config", str(whole / "settings.json")]
    given = f"--base_ckpt {BASE} --train_manifest {results}/eight.jsonl --output_dir {part} --resume auto".split()
    train_runs(2, [[*settings, *given]])
    expected, found = (load_file(run / "lora_adapters" / "adapter_model.safetensors") for run in (whole, part))
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
    assert [line["train/loss"] for line in read_metrics(whole) if "train/loss" in line] == [
        line["train/loss"] for line in read_metrics(part) if "train/loss" in line
    ]


def test_in_4_bits_at_every_stage(manifest: Path, tmp_path: Path, ds_file: Callable[[int], Path]) -> None:
    """The same losses on one rank and, with the packed weights partitioned, on two; the merge checks itself."""
    common = (
        f"--base_ckpt {BASE} --train_manifest {manifest} --val_split 0 --load_in_4bit --precision fp32 "
        "--lora_dropout 0 --max_steps 3 --log_steps 1 --merge_adapter_with_base"
    ).split()
    shapes = {1: "--batch_size 2 --grad_accum 2", 2: "--batch_size 2 --grad_accum 1"}
    for ranks, stage in ((1, 2), (2, 3)):
        more = [*shapes[ranks].split(), "--deepspeed", str(ds_file(stage)), "--output_dir", f"{tmp_path}/{ranks}"]
        train_runs(ranks, [[*common, *more]])
    losses = [[line["train/loss"] for line in read_metrics(tmp_path / f"{ranks}")] for ranks in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (tmp_path / "1" / "merged_model" / "model.safetensors").is_file()


def test_full_fine_tuning(manifest: Path, tmp_path: Path, ds_file: Callable[[int], Path]) -> None:
    """All weights, the table among them, on one rank and partitioned over two; the model loads as it was trained."""
    groups = "attention text_mlp audio_mlp heads"
    common = (
        f"--base_ckpt {BASE} --train_manifest {manifest} --val_split 0 --finetune full --train_groups {groups} "
        "--precision fp32 --max_steps 3 --lr 1e-3 --log_steps 1"
    ).split()
    for ranks, stage in ((1, 0), (2, 3)):
        shape = f"--batch_size 2 --grad_accum {2 // ranks} --deepspeed {ds_file(stage)} --output_dir {tmp_path}/{ranks}"
        train_runs(ranks, [[*common, *shape.split()]])
    models = [load_file(tmp_path / f"{ranks}" / "final_model" / "model.safetensors") for ranks in (1, 2)]
    before = load_file(builtin_base(BASE, default_cache_dir()) / "model.safetensors")
    changed = {name for name, tensor in models[0].items() if not tensor.equal(before[name])}
    assert "tied.embedding.modality_embeddings.0.embedding.weight" in changed
    assert "tied.embedding.text_embedding.weight" not in changed
    for name, tensor in models[0].items():
        assert (models[1][name].float() - tensor.float()).abs().max() <= 2**-7 * tensor.float().abs().max(), name


def test_system_text_is_reported_once(manifest: Path, tmp_path: Path) -> None:
    done = run_script(
        "prepare", ["--base_ckpt", BASE, "--train_manifest", str(manifest), "--cache_dir", str(tmp_path)], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("system text of 4 samples left out: Higgs Audio v3 has no place") == 1
    assert SYSTEM not in done.stdout
