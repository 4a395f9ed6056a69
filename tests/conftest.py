"""Fixtures and helpers that several tests share: the random base, a small mixed manifest, DeepSpeed files."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # With tests in parallel, the busy-waiting threads of one test slow the others down more than they gain.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if threading.current_thread() is threading.main_thread():
    # A shell ignores these signals for a job in its background, and the processes that tests start would inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
PROJECT = Path(__file__).resolve().parent.parent
VOICES = PROJECT / "samples" / "voices"
VOICES_MANIFEST = PROJECT / "samples" / "voices.jsonl"
LASTING = "lasting-"  # starts the names of folders that several files of tests share
SYSTEM = "Generate audio following instruction."
_BROWSER_ARGUMENTS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def lasting_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a folder which lasts until the end of the test run."""
    return lambda name: tmp_path_factory.mktemp(LASTING + name, numbered=False)


@pytest.fixture(scope="module", autouse=True)
def temporary_folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Delete the folders of each file's tests after it, unless one failed: those of all files take 9 GB."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed == failed_before:
        for path in tmp_path_factory.getbasetemp().iterdir():
            if path.is_dir() and not path.name.startswith(LASTING):
                shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(lasting_folder: Callable[[str], Path]) -> Path:
    """A new cache for each test run, so that no test depends on files of an earlier run."""
    folder = lasting_folder("cache")
    os.environ["HIGGS_DS_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def base(cache_dir: Path) -> Path:
    """The random base, which is fast to create and whose values the tests rely on."""
    from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base

    return builtin_base(RANDOM_BASE, cache_dir)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if _CHROMIUM is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=_BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that must not log anything to the console, raise errors, or request anything other than files."""
    page = browser.new_page(viewport={"width": 1240, "height": 900})
    messages, requested = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    yield page
    assert not messages
    assert all(url.startswith(("file:", "data:")) for url in requested)
    page.close()


def play(player: Any) -> list[float]:
    """Play an audio element of a page. Return its time when it first advances, and its duration, in seconds."""
    return player.evaluate("""async player => {
        player.muted = true;
        await player.play();
        while (player.currentTime == 0) await new Promise(resolve => setTimeout(resolve, 20));
        return [player.currentTime, player.duration];
    }""")


@pytest.fixture(scope="session")
def small_base(base: Path, lasting_folder: Callable[[str], Path]) -> Path:
    """The random base at a quarter of its width, for many runs in bf16, which is slow on CPUs without bf16 support."""
    import torch
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

    folder = lasting_folder("small") / "base"
    shutil.copytree(base, folder)
    smaller = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    values = json.loads((base / "config.json").read_text()) | smaller | {"head_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = HiggsAudioV2ForConditionalGeneration(HiggsAudioV2Config(**values), use_text_head=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def lone_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the only rank of a process group."""
    from launcher import free_port, rank_environment

    from higgs_ds.common import distributed

    for name, value in rank_environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    distributed.take_rank()
    distributed.join_ranks()
    yield
    distributed.leave_ranks()


def speech_sample(text: str, clip: str, **stretch: float) -> dict[str, Any]:
    audio = {"type": "audio", "audio_url": str(PROJECT / "samples" / "voices" / clip), **stretch}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": audio},
        ]
    }


def text_sample(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_manifest(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def mixed_manifest(lasting_folder: Callable[[str], Path]) -> Path:
    """Nine samples, four of them without audio. They are short, as bf16 is slow on CPUs without bf16 support."""
    clips = ["anna_00.flac", "ben_00.flac", "carla_00.flac", "ben_04.flac", "anna_04.flac"]
    entries = [speech_sample(f"Clip {i}.", clip, duration=0.3 + i / 10) for i, clip in enumerate(clips)]
    entries += [text_sample(f"Question {i}?", f"Answer {'indeed ' * i}") for i in range(4)]
    return write_manifest(lasting_folder("mixed") / "mixed.jsonl", entries)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with short clips of two speakers, anna_0.wav to ben_3.wav, of different lengths."""
    import soundfile

    folder = tmp_path_factory.mktemp("clips")
    for number, (speaker, i) in enumerate(itertools.product(("anna", "ben"), range(4))):
        waveform, rate = soundfile.read(VOICES / f"{speaker}_0{i}.flac")
        soundfile.write(folder / f"{speaker}_{i}.wav", waveform[: int(rate * (0.3 + 0.05 * number))], rate)
    return folder


@pytest.fixture(scope="session")
def ds_files(lasting_folder: Callable[[str], Path]) -> Path:
    """The shipped DeepSpeed files; at stage 3, even the smallest parameter is partitioned over the ranks."""
    folder = lasting_folder("ds")
    for path in (PROJECT / "ds_configs").glob("*.json"):
        values = json.loads(path.read_text())
        if values["zero_optimization"]["stage"] == 3:
            values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / path.name).write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="session")
def ds_file(ds_files: Path) -> Callable[[int], Path]:
    """Return one of these files by its ZeRO stage."""
    return lambda stage: ds_files / f"zero{stage}.json"


def speech_batch(size: int, length: int, num_text: int, num_codebooks: int, num_codes: int) -> Any:
    """Return a `data.collate.Batch` of `size` samples: `num_text` text positions, then audio. All audio is a target."""
    import torch

    from higgs_ds.data.collate import Batch, predicting_places

    columns = torch.arange(size * length) % length
    positions = torch.cat([(columns < num_text).nonzero()[:, 0], (columns >= num_text).nonzero()[:, 0]])
    places = torch.empty_like(positions)
    places[positions] = torch.arange(len(positions))
    num_rows = size * (length - num_text)
    codes = torch.randint(num_codes, (num_rows, num_codebooks), generator=torch.Generator().manual_seed(0))
    text_places, audio_places = places[: 3 * size], places[positions[size * num_text :] - 1]
    return Batch(
        text_ids=torch.full((size * num_text,), 5),
        codes=codes,
        positions=positions,
        places=places.view(size, length),
        text_places=text_places,
        text_targets=torch.zeros(3 * size, dtype=torch.long),
        audio_places=audio_places,
        audio_targets=codes,
        **predicting_places(text_places, audio_places, size * num_text),
        audio_rows=torch.arange(len(codes)).view(size, -1),
        audio_at=torch.arange(len(codes)),
        num_samples=size,
        num_tokens=size * length,
    )


def native_inputs(batch: Any, audio_token_id: int) -> dict[str, Any]:
    """Return the arguments of transformers' own forward for a `data.collate.Batch`."""
    import torch

    num_text, num_rows = len(batch.text_ids), len(batch.codes)
    ids = torch.full((num_text + num_rows,), audio_token_id)
    ids[batch.positions[:num_text]] = batch.text_ids
    return {
        "input_ids": ids.view_as(batch.places),
        "audio_input_ids": batch.codes[None],
        "audio_input_ids_mask": torch.ones(1, num_rows, dtype=torch.bool),
    }


def processor_in(folder: Path) -> Any:
    """Load transformers' processor of a model folder that contains its codec and refers to it by a relative path."""
    from transformers import AutoProcessor

    with contextlib.chdir(folder):
        return AutoProcessor.from_pretrained(".")


def kept_bytes(run: Callable[[], Any], outside: Iterable[Any]) -> int:
    """Return the bytes that autograd keeps for the backward pass of `run`, without those of the tensors `outside`."""
    import torch

    known = {tensor.untyped_storage()._cdata for tensor in outside}
    sizes: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = run()
    del found
    return sum(sizes.values())


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def whisper_folder(folder: Path) -> Path:
    """Save a tiny Whisper model of random weights, whose input is one second long."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        num_mel_bins=16, d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=48, max_source_positions=50, vocab_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(17)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder
