"""--dry_run with --train_manifest: planned for the longest sample of the data, with the errors of a training."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, VOICES, speech_sample, text_sample, whisper_folder, write_manifest
from hub_server import TOKEN, local_hub
from launcher import overriding, run_code, run_script

from higgs_ds.common.errors import InputError
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.data.mix import mix_of
from higgs_ds.data.sampler import WindowSampler
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.train import TrainOptions
from higgs_ds.planning import dry_run
from higgs_ds.planning.batches import SampleLengths, batch_shapes
from higgs_ds.planning.plan import plan
from higgs_ds.planning.weights import Setting
from higgs_ds.training import plan_for_data
from higgs_ds.training.startup import _check_and_encode

GIVEN = "--base_ckpt {base} --cache_dir {cache} --train_manifest"


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clips of a few lengths, a conversation of two clips, texts; and longer ones for validation."""
    folder = tmp_path_factory.mktemp("manifests")
    clips = [speech_sample(f"Clip {i}.", f"anna_0{i}.flac", duration=0.31 + i / 7) for i in range(5)]
    two = {"messages": [*clips[0]["messages"], *clips[4]["messages"][1:]], "start_index": 3}
    texts = [text_sample("Question?", "Answer, " + "indeed " * 9)]
    heard = {
        "messages": [{"role": "user", "content": [two["messages"][2]["content"], "Now you."]}, clips[1]["messages"][2]]
    }
    voices = [{"audio": str(VOICES / f"anna_0{i}.flac"), "text": f"Clip {i}.", "speaker": "anna"} for i in range(3)]
    longer = speech_sample("The longest of all.", "ben_01.flac", duration=1.93)
    return {
        name: write_manifest(folder / f"{name}.jsonl", entries)
        for name, entries in {
            "train": [*clips, two, *texts],
            "val": [clips[1], longer],
            "heard": [*clips, heard],
            "voices": voices,
        }.items()
    }


def dry_options(options: str) -> tuple[TrainOptions, set[str]]:
    return parse_train_options(["--dry_run", "--allow_text_targets", *options.split()])


def planned_lines(capsys: pytest.CaptureFixture[str], options: str, with_data: bool) -> list[str]:
    """Return what a dry run prints, without the line that says where the length comes from."""
    capsys.readouterr()
    (plan_for_data if with_data else dry_run).main(*dry_options(options))
    lines = capsys.readouterr().out.splitlines()
    (batch,) = [i for i, line in enumerate(lines) if line.startswith("batch: ")]
    assert ("the longest of " in lines[batch]) == with_data
    lines[batch] = lines[batch].split(" (")[0].split(",")[0]
    return [line for line in lines if "longer than --max_seq_len" not in line]


@pytest.mark.parametrize(
    "more",
    [
        "{train}", "{train} --val_manifest {val}", "{train} --max_seq_len 110",
        "{voices} --val_split 0 --reference random --reference_dropout 0.2",
        "{train} --max_tokens_per_batch 330 --val_manifest {val}", "{heard} --whisper_conditioning",
    ],
)  # fmt: skip
def test_to_the_byte_of_the_longest_encoded_sample(
    capsys: pytest.CaptureFixture[str], base: Path, manifests: dict[str, Path], tmp_path: Path, lone_rank: None,
    whisper: Path, more: str,
) -> None:  # fmt: skip
    """Against a training's data, whose clips the codec encodes, and the plan for samples of that length."""
    data = GIVEN.format(base=base, cache=tmp_path / "cache") + " " + more.format(**manifests)
    data = data.replace("_conditioning", f"_conditioning --whisper_ckpt {whisper}")
    with_data = planned_lines(capsys, data, with_data=True)
    assert not list(tmp_path.glob("cache/codes/**/*"))
    assert not list(tmp_path.glob("cache/index/*"))
    options, names = parse_train_options([*data.split(), "--allow_text_targets", "--output_dir", f"{tmp_path}/run"])
    inputs = _check_and_encode(options, names, FolderLock())
    encoded = [data.encoded(i) for data in (inputs.train, inputs.val) for i in range(len(data))]
    longest = max(len(sample.prompt.input_ids) for sample in encoded)
    if "random" in data:  # not every epoch has the longest references
        assert longest <= inputs.longest
        longest = inputs.longest
    options = overriding(f"{data} --max_seq_len {longest}".split())
    assert with_data == planned_lines(capsys, " ".join(options), with_data=False)
    plain = Setting(inputs.bundle.config, inputs.options, inputs.ds_settings, 1, True)
    of_length = replace(plain, options=plain.options.replace(max_seq_len=longest))
    assert plan(replace(plain, lengths=inputs.lengths)) == plan(of_length)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper_folder(tmp_path_factory.mktemp("whisper"))


def test_without_weights(capsys: pytest.CaptureFixture[str], base: Path, manifests: dict[str, Path], tmp_path: Path,
                         lone_rank: None) -> None:  # fmt: skip
    """A base and a codec of which only text files are there, in either layout, give the same plan."""
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    codec = base.parent / "tiny-random-codec"
    shutil.copytree(codec, tmp_path / "codec", ignore=shutil.ignore_patterns("*.safetensors"))
    data = f"{GIVEN.format(base=base, cache=tmp_path / 'cache')} {manifests['train']}"
    bare = data.replace(str(base), f"{tmp_path}/bare --codec_ckpt {tmp_path}/codec")
    whole, without = (planned_lines(capsys, options, with_data=True) for options in (data, bare))
    assert [line for line in whole if not line.startswith("base: ")] == [
        line for line in without if not line.startswith("base: ")
    ]


@pytest.mark.slow
def test_only_texts_are_downloaded(base: Path, manifests: dict[str, Path], tmp_path: Path) -> None:
    """From a hub on this machine, which is asked for neither weights nor pickles."""
    with local_hub() as hub:
        codec = base.parent / "tiny-random-codec"
        for name, folder in (("some/base", base), ("some/codec", codec)):
            hub.repositories[name] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        options = f"--dry_run --allow_text_targets --base_ckpt some/base --codec_ckpt some/codec --cache_dir cache \
            --train_manifest {manifests['train']} --device_memory_gib 1"
        at_hub = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }
        done = run_script("train", options.split(), tmp_path, environment=os.environ | at_hub)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("fits: ")
        assert any("tokenizer.json" in path for path in hub.asked)
        assert not [path for path in hub.asked if "safetensors" in path]
        nothing = [option.replace("some/base", "some/other") for option in options.split()]
        done = run_script("train", nothing, tmp_path, environment=os.environ | at_hub)
        assert done.returncode == 2
        assert done.stderr.count("not available on the hub") == 1


BAD = {
    "missing": ("{missing}", ""),
    "missing and another": ("{train} {missing}", ""),
    "validation missing": ("{train}", "--val_manifest {missing}"),
    "bad lines": ("{bad}", ""),
    "nothing is left": ("{train}", "--max_seq_len 5"),
    "longer than a micro-batch": ("{train}", "--max_tokens_per_batch 40"),
    "nothing to hear": ("{train}", "--whisper_conditioning --whisper_ckpt {whisper}"),
    "no speakers": ("{train}", "--split_by speaker"),
    "several at once": ("{bad}", "--base_ckpt nothing/here/at/all"),
}


@pytest.mark.parametrize("which", BAD)
def test_the_errors_of_a_training(
    base: Path, manifests: dict[str, Path], tmp_path: Path, lone_rank: None, whisper: Path, which: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = [speech_sample("Good.", "anna_00.flac", duration=0.4), speech_sample("None.", "no_such.flac"), {"role": 3}]
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    places = {"whisper": whisper, "train": manifests["train"], "missing": tmp_path / "none.jsonl", "bad": bad}
    paths, more = (part.format(**places) for part in BAD[which])
    given = GIVEN.format(base=base, cache=tmp_path / "cache")
    given = given.replace(f"--base_ckpt {base}", "") if "--base_ckpt" in more else given
    found = []
    for action in (
        lambda o, names: plan_for_data.main(o, names),
        lambda o, names: _check_and_encode(o.replace(output_dir=tmp_path / "run", dry_run=False), names, FolderLock()),
    ):
        with pytest.raises(InputError) as caught:
            action(*dry_options(f"{given} {paths} {more}"))
        found.append(sorted(caught.value.problems))
    assert found[0] == found[1]
    assert found[0]


@pytest.mark.parametrize("repeats", [None, 2.5])
def test_no_micro_batch_of_any_epoch_is_larger(repeats: float | None) -> None:
    """With --max_tokens_per_batch, and lengths of which the longest fills a micro-batch badly."""
    rng = random.Random(5)
    for limit in (200, 333, 1000):
        tokens = np.array([rng.choice([30, 60, 120, 2 * limit // 3]) + rng.randrange(20) for _ in range(60)])
        mix = None if repeats is None else mix_of([60], (repeats,), 1)
        sampler = WindowSampler(tokens.tolist(), 2, 1, 0, 1, seed=3, bucket_size=32, max_tokens=limit, mix=mix)
        options = TrainOptions().replace(max_tokens_per_batch=limit, mix=None if repeats is None else (repeats,))
        shapes = batch_shapes(options, SampleLengths.of([tokens], options))
        most = max(size * length for size, length in shapes)
        assert shapes[0] == (limit // tokens.max(), tokens.max())
        seen = [
            len(batch) * max(tokens[i] for i in batch)
            for epoch in range(20)
            for window in sampler.micro_batches(epoch)
            for batch in window
            if batch
        ]
        assert 0.95 * most <= max(seen) <= most <= limit


def test_the_fuller_micro_batch_is_planned(base: Path) -> None:
    """Of one sample of 600 and many of 99 positions in 1,000: ten of the shorter ones need more."""
    options = dry_options(f"--base_ckpt {base} --max_tokens_per_batch 1000")
    setting = dry_run.make_setting(*options)
    lengths = SampleLengths.of([np.array([600] + [99] * 50)], options[0])
    planned = plan(replace(setting, lengths=lengths))
    assert planned.shape == (10, 99)
    longest = plan(replace(setting, options=setting.options.replace(max_seq_len=600)))
    shorter = plan(replace(setting, options=setting.options.replace(max_seq_len=99)))
    assert planned.total == shorter.total > longest.total
    lines = dry_run.describe(replace(setting, lengths=lengths), planned)
    assert any("10 x 99 positions (the fullest micro-batch of 51 samples)" in line for line in lines)


def test_advice_knows_how_many_samples_it_drops(
    capsys: pytest.CaptureFixture[str], manifests: dict[str, Path], tmp_path: Path, lone_rank: None
) -> None:
    setting = dry_run.make_setting(*dry_options(f"--base_ckpt {PROJECT}/benchmarks/3b --device_memory_gib 13"))
    lengths = SampleLengths(np.array([100, 500, 512, 513, 1024]))
    lines = dry_run.advice(replace(setting, lengths=lengths), set(), plan(replace(setting, lengths=lengths)), 13)
    (line,) = [line for line in lines if "--max_seq_len" in line]
    assert line.startswith("  --max_seq_len 512 (drops 2 samples)  ")


@pytest.mark.slow
def test_ranks_share_the_data(tmp_path: Path, base: Path, manifests: dict[str, Path]) -> None:
    """Two ranks print one plan, that of one rank. Rank 0 removes no file that the other has yet to read."""
    options = f"--dry_run --allow_text_targets --base_ckpt {base} --cache_dir {tmp_path} --device_memory_gib 1 \
        --plan_ranks 1 --train_manifest {manifests['train']}"
    code = f"""
import forks
import time
from pathlib import Path
from higgs_ds.common.distributed import rank
from higgs_ds.data import preparation
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.training import plan_for_data

open_index = preparation.Index
preparation.Index = lambda folder: time.sleep(rank()) or open_index(folder)
options = parse_train_options({options.split()})
for ranks in (1, 2):
    print(forks.wait(forks.start(ranks, lambda: plan_for_data.main(*options), Path(str(ranks))), 200))
"""
    done = run_code(code, tmp_path)
    assert done.stdout == "[0]\n[0, 0]\n", done.stderr
    alone, of_two = ((tmp_path / ranks).read_text() for ranks in ("1", "2"))
    assert "the longest of 7 samples" in alone
    assert alone == of_two
