"""The commands as users run them: through the deepspeed launcher, with their output, files and exit codes."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import PROJECT, read_metrics, speech_sample, text_sample, write_manifest
from launcher import RANDOM, default_port, free_port, overriding, run_script

from higgs_ds.bases.builtin import BUILT_IN, DEFAULT_BASE, builtin_base, builtin_config
from higgs_ds.common.precision import native_precision
from higgs_ds.common.resources import SAMPLE_MANIFEST
from higgs_ds.common.tensor_files import weight_files, weight_shapes
from higgs_ds.options.train import LoraOptions

pytestmark = pytest.mark.slow

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def train(folder: Path, options: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """Train on the random base, unless the options name another."""
    if ranks is None:
        return run_script("train", [*RANDOM, *options.split()], folder)
    launcher = [DEEPSPEED, "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return run([*launcher, str(PROJECT / "launch" / "train.py"), *overriding([*RANDOM, *options.split()])], folder)


def samples(stdout: str) -> tuple[int, int]:
    """Return the numbers of training and validation samples in the table at the start of a run."""
    ((train, val),) = re.findall(r"(\d+) training samples, (\d+) validation samples", " ".join(stdout.split()))
    return int(train), int(val)


def steps(stdout: str) -> int:
    """Return the steps of two epochs, with 16 samples per step."""
    return 2 * math.ceil(samples(stdout)[0] / 16)


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The main job with its DeepSpeed file as the only option, run from the project's folder as in the README."""
    folder = tmp_path_factory.mktemp("main")
    for name in ("launch", "ds_configs", "samples"):
        shutil.copytree(PROJECT / name, folder / name)
    command = [DEEPSPEED, "launch/train.py", "--deepspeed", "ds_configs/zero2.json"]
    with default_port():
        return folder, run(command, folder)


def test_main_job(main_job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = main_job
    assert done.returncode == 0, done.stderr[-4000:]
    (output,) = (folder / "outputs").iterdir()
    last_step = steps(done.stdout)
    saved = {f"checkpoint-{step}" for step in range(1, last_step + 1)}  # a tenth of ten steps is one
    assert last_step == 10
    assert {path.name for path in output.glob("checkpoint-*")} == saved
    assert sorted(path.name for path in output.iterdir() if path.name not in saved) == [
        "data_summary.txt",
        "lora_adapters",
        "metrics.jsonl",
        "report.html",
        "settings.json",
        "trainer_state.json",
        "training_data.npz",
    ]
    adapters = output.relative_to(folder) / "lora_adapters"
    assert f"LoRA adapters: {adapters}" in done.stdout
    assert f"--lora_adapter_path {adapters} --output_path MERGED" in done.stdout
    assert f"Give the merge command {adapters}, not a checkpoint-N directory" in done.stdout
    state = json.loads((output / "trainer_state.json").read_text())
    assert (state["step"], state["total_steps"], state["epoch"]) == (last_step, last_step, 2.0)
    assert state["finished"] is True
    last = read_metrics(output)[-1]
    assert {"step", "epoch", "val/loss", "val/text_loss", "val/audio_loss", "val/audio_loss/cb7"} <= last.keys()


def test_first_run_prints_what_matters(main_job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Besides this project's lines, only the launcher's two processes print lines; libraries print none."""
    folder, done = main_job
    val_losses = [line["val/loss"] for line in read_metrics(next((folder / "outputs").iterdir())) if "val/loss" in line]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    launchers = [line for line in lines if re.search(r"\[(runner|launch|real_accelerator)\.py:", line)]
    assert sum("real_accelerator.py" in line for line in launchers) <= 2
    ours = [line.split(" ")[0] for line in lines if line not in launchers]
    before = ["--precision", "base", "model", "trained", "data", "steps", "memory", "time", "output"]
    logged = ["step"] * 2 * steps(done.stdout)  # losses and a validation at each step
    best = [] if val_losses[-1] < min(val_losses[:-1]) else ["Lowest"]  # names an earlier checkpoint
    after = ["peak", "report:", *best, "LoRA", "Merge", "Give"]
    assert [word for word in ours if word not in ("", "note:")] == [*before, *logged, *after]
    assert ours.count("note:") == 1  # about codebooks that the built-in codec does not use


def test_table_at_the_start(main_job: tuple[Path, subprocess.CompletedProcess[str]], cache_dir: Path) -> None:
    """The table of a run on the built-in speaking base and the built-in digits."""
    folder, done = main_job
    base = builtin_base(DEFAULT_BASE, cache_dir)
    config, lora = builtin_config(DEFAULT_BASE), LoraOptions()
    shapes = weight_shapes(weight_files(base))
    adapted = [shape for name, shape in shapes.items() if re.search(r"layers\..*_proj\.weight", name)]
    trained = sum(lora.lora_r * sum(shape) for shape in adapted)
    parameters = trained + sum(math.prod(shape) for shape in shapes.values())
    rows: dict[str, str] = {}
    for line in done.stdout.split("\nstep ")[0].splitlines():
        name, text = line[:10].strip() or list(rows)[-1], line[10:]
        rows[name] = f"{rows[name]} {text}" if name in rows else text
    assert rows["base"].startswith(f"{base} ({BUILT_IN[DEFAULT_BASE]}), in the native layout")
    assert rows["base"].endswith(f" loaded in {native_precision(torch.device('cpu'))}")
    assert f"{config.num_hidden_layers} layers of width {config.hidden_size}" in rows["model"]
    assert rows["model"].endswith("float32 in its files")
    share = f"{trained:,} of {parameters:,} parameters ({trained / parameters:.2%})"
    assert f"LoRA on {10 * config.num_hidden_layers} modules, {share}: audio_mlp.down_proj, " in rows["trained"]
    (summary,) = folder.glob("outputs/*/data_summary.txt")
    (longest,) = re.findall(r"to (\d+) per sample", summary.read_text())
    train, val = samples(done.stdout)
    assert train + val == len(SAMPLE_MANIFEST.read_text(encoding="utf-8").splitlines())
    assert train > val > 0
    assert f"{longest} in the longest sample" in rows["data"]
    last = steps(done.stdout)
    expected = f"{last} ({last // 2} in the first epoch) of 16 samples each (2 per rank x 8 accumulated x 1 rank);"
    assert rows["steps"].startswith(expected)
    planned, libraries, weights, to_train, in_pass = (float(n) for n in re.findall(r"\d+\.\d+", rows["memory"]))
    assert planned == pytest.approx(libraries + weights + to_train + in_pass, abs=0.012)
    (measured,) = re.findall(rf"peak memory of rank 0: (\S+) GiB, planned {planned:.2f} GiB", done.stdout)
    # Both with the libraries, which take far more than this run. Measured, there is also what drawing imports, and
    # freed memory that the C library keeps.
    assert planned - 0.1 < float(measured) < planned + 0.6
    # Weights and adapters in 16 bits; gradients, master weights and Adam's two moments in 32.
    assert weights + to_train == pytest.approx((2 * parameters + 16 * trained) / 2**30, abs=0.001)
    assert rows["memory"].endswith("at ZeRO stage 2")
    assert rows["output"] == str(summary.parent.relative_to(folder))


def test_merge_and_speak(main_job: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    folder, done = main_job
    (output,) = (folder / "outputs").iterdir()
    where = "lora_adapters"
    for path in (output / where).glob("adapter_*"):
        assert path.read_bytes() == (output / f"checkpoint-{steps(done.stdout)}" / where / path.name).read_bytes()
    base = json.loads((output / where / "adapter_config.json").read_text())["base_model_name_or_path"]
    merge = ["--lora_adapter_path", str(output / where), "--output_path", "merged"]
    done = run_script("merge", merge, tmp_path)
    assert done.returncode == 0, done.stderr
    named, first, check, last = done.stdout.splitlines()
    assert named == f"Base: {base}, named by the adapter; its weights are those of the training"
    assert (first, last) == ("Merged into: the base's weights", "Merged model: merged")
    assert re.fullmatch(r"Self-check: merged and adapted logits differ by \S+ at most, 0\.\d+% on average, .*", check)
    speak = ["--text", "seven two", "--max_new_tokens", "40"]
    for options in (["--base_model_path", "merged"], ["--lora_adapter_path", str(output / where)], []):
        done = run_script("generate", [*speak, "--output", "speech.wav", *options], tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("WAV: speech.wav (")
        info = soundfile.info(tmp_path / "speech.wav")
        assert (info.samplerate, info.channels, info.subtype) == (24000, 1, "PCM_16")
        at_most = 32 / 25  # 40 rows without the BOS and the delay
        whole = info.duration == pytest.approx(at_most)
        assert whole if "cut off at --max_new_tokens" in done.stdout else 0 < info.duration <= at_most
    voice = PROJECT / "samples" / "voices" / "anna_01.flac"
    reference = ["--ref_audio", str(voice), "--ref_text", "The kettle is on.", "--temperature", "0.7"]
    done = run_script("generate", [*speak, *reference], tmp_path)
    assert done.returncode == 0, done.stderr


def test_merge_at_the_end_on_two_ranks(tmp_path: Path) -> None:
    done = train(
        tmp_path,
        "--output_dir out --max_steps 1 --batch_size 1 --grad_accum 1 --merge_adapter_with_base --load_in_4bit "
        f"--deepspeed {PROJECT}/ds_configs/zero1.json --activation_checkpointing auto",
        ranks=2,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "--activation_checkpointing auto: none" in done.stdout  # the tiny base fits any GPU
    output = " ".join(done.stdout.split())
    assert f"loaded in NF4 and {native_precision(torch.device('cpu'))}" in output
    assert "at ZeRO stage 1" in output
    assert "LoRA on 20 modules, 204,800 of 6,514,432 parameters (3.14%): audio_mlp.down_proj, " in output
    assert "MA " not in done.stdout + done.stderr  # memory lines that DeepSpeed prints at stage 1
    assert "Merged into: the dequantized weights" in done.stdout
    assert "Self-check: merged and adapted logits differ by " in done.stdout
    assert "Merged model: out/merged_model" in done.stdout
    assert (tmp_path / "out" / "final_model" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "out" / "lora_adapters" / "adapter_model.safetensors"
    ).read_bytes()
    assert (tmp_path / "out" / "final_model" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "adapter").exists()
    assert (tmp_path / "out" / "merged_model" / "audio_tokenizer" / "model.safetensors").is_file()
    # On the base in 4 bits, as in training.
    speak = ["--text", "Hello.", "--max_new_tokens", "20", "--lora_adapter_path", "out/lora_adapters"]
    done = run_script("generate", speak, tmp_path)
    assert (done.returncode, done.stdout.split(" (")[0]) == (0, "WAV: speech.wav"), done.stderr


def test_failed_merge_leaves_the_training_done(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "merged_model").touch()  # a file in the folder's place
    done = train(tmp_path, "--output_dir out --max_steps 1 --batch_size 1 --grad_accum 1 --merge_adapter_with_base")
    assert done.returncode == 5, done.stderr[-4000:]
    assert "error: training has finished and its adapter is in out/lora_adapters, but merging it failed" in done.stderr
    assert (tmp_path / "out" / "final_model" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["finished"] is True


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_all_at_once_before_weights(tmp_path: Path, ranks: int, base: Path) -> None:
    """One run reports every problem, exits with 2 and writes nothing; the base's weights are not even readable."""
    broken_base = tmp_path / "base"
    shutil.copytree(base, broken_base)
    manifest = write_manifest(
        tmp_path / "bad.jsonl",
        [
            speech_sample("Good.", "anna_00.flac"),
            speech_sample("Missing.", "none.flac"),
            speech_sample(" ", "anna_00.flac"),
            text_sample("No audio?", "None."),
            {"messages": [{"role": "narrator", "content": "Once."}]},
            speech_sample("Unreadable.", str(tmp_path / "noise.wav")),
        ],
    )
    (tmp_path / "noise.wav").write_bytes(b"no audio at all")
    (tmp_path / "file").touch()
    ds_json = tmp_path / "ds.json"
    ds_json.write_text('{\n  "zero_optimization": {\n    "stage": 2,\n    "bucket": 1\n  }\n}\n')
    (broken_base / "model.safetensors").write_bytes(b"\0" * 1000)
    done = train(
        tmp_path,
        f"--train_manifest {manifest} --base_ckpt {broken_base} --deepspeed {ds_json} --output_dir file/out",
        ranks,
    )
    assert done.returncode == 2, done.stderr[-4000:]
    error = done.stderr[done.stderr.index("error: ") :]
    voices = PROJECT / "samples" / "voices"
    for expected in [
        f"{ds_json}:4: zero_optimization.bucket: is not an option of this trainer",
        f"{broken_base}/model.safetensors: not a safetensors file",
        f"{manifest}:2: {voices}/none.flac: no such file",
        f"{manifest}:3: messages[1].content: is empty or blank",
        f"{manifest}:4: messages: no target audio",
        f"{manifest}:5: messages[0].role: 'narrator' is not a role; allowed: system, user, assistant",
        f"{manifest}:6: {tmp_path}/noise.wav: cannot be read as audio",
        f"--output_dir file/out: cannot be written to: {tmp_path}/file is a file, not a folder",
    ]:
        assert error.count(expected) == 1, (expected, error)
    assert "8 problems:" in error
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_bad_options_end_with_2(tmp_path: Path) -> None:
    done = train(tmp_path, "--lr 0 --batch_size -1")
    assert done.returncode == 2
    assert "2 problems:" in done.stderr
    assert "--lr 0.0: must be above 0" in done.stderr
    done = train(tmp_path, "--no_such_option")
    assert done.returncode == 2
    assert "unrecognized arguments: --no_such_option" in done.stderr


def test_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    options = "--output_dir out --max_steps 1 --batch_size 1 --grad_accum 1 --precision fp32"
    assert train(tmp_path, options).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    done = train(tmp_path, options)
    assert done.returncode == 2
    assert "contains checkpoint-1 of an earlier run; resume it with --resume auto" in done.stderr
    done = train(tmp_path, f"{options} --resume auto --lr 1e-3")
    assert done.returncode == 2
    assert "was trained with lr 0.0002, but this run has 0.001" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert train(tmp_path, f"{options} --resume auto").returncode == 0  # finished already: nothing more to do
