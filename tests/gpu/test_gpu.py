"""Trainings on a GPU against the CPU, in the order of their worth. Skipped without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, VOICES, read_metrics
from launcher import TRAIN, kill_after_step, run_script, start_ranks, train_runs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CLOSE = 1e-3  # between losses on GPU and CPU, in float32
KINDS = {
    "lora": "",
    "nf4": "--load_in_4bit",
    "nf4, embeddings on the host": "--load_in_4bit --offload_embeddings",
    "recomputed, inputs on the host": "--activation_checkpointing every_layer --offload_checkpoints",
    "head and embeddings": "--finetune full --train_groups embeddings heads",
}
OFFLOADS = ("zero2_offload", "zero3_offload")


def options(folder: Path, manifest: Path, ds_name: str, more: str) -> list[str]:
    return (
        f"--deepspeed {PROJECT}/ds_configs/{ds_name}.json --output_dir {folder} --precision fp32 "
        f"--train_manifest {manifest} --val_split 0 --allow_text_targets --grad_accum 2 --max_steps 4 "
        f"--lora_dropout 0 --log_steps 1 {more}"
    ).split()


@pytest.fixture(scope="module")
def losses_on_cpu(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path) -> Callable[[str], list[float]]:
    """Losses of a kind of training on the CPU, which do not depend on the ZeRO stage. Trained once per kind."""
    known: dict[str, list[float]] = {}

    def losses(kind: str) -> list[float]:
        if kind not in known:
            folder = tmp_path_factory.mktemp("cpu") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
                train_runs(1, [options(folder, mixed_manifest, "zero2", KINDS[kind])])
            known[kind] = losses_of(folder)
        return known[kind]

    return losses


def losses_of(folder: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ds_name", ["zero2", "zero3", "zero0", "zero1", *OFFLOADS])
def test_same_losses_as_on_the_cpu(
    tmp_path: Path, mixed_manifest: Path, losses_on_cpu: Callable[[str], list[float]], ds_name: str, kind: str
) -> None:
    train_runs(1, [options(tmp_path / "gpu", mixed_manifest, ds_name, KINDS[kind])])
    assert losses_of(tmp_path / "gpu") == pytest.approx(losses_on_cpu(kind), abs=CLOSE)


def test_mixed_batches_give_the_codes_of_single_clips(base: Path) -> None:
    """On the GPU; on the CPU, they are equal. A code may differ where two entries of a codebook are equally near."""
    from higgs_ds.data.audio import read_audio
    from higgs_ds.data.codec import Codec
    from higgs_ds.data.codec_info import find_codec
    from higgs_ds.model.sample import AudioClip

    on_gpu, on_cpu = (Codec(find_codec(base, None), torch.device(name)) for name in ("cuda", "cpu"))
    clips = [
        read_audio(AudioClip(path, 0, 0.5 + 0.13 * i), on_gpu.sample_rate)
        for i, path in enumerate(sorted(VOICES.glob("*.flac"))[:12])
    ]
    single, mixed, expected = [on_gpu.encode(c) for c in clips], on_gpu.encode_batch(clips), map(on_cpu.encode, clips)
    assert share_of_equal(mixed, single) > 0.99
    assert share_of_equal(single, list(expected)) > 0.99


def share_of_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = list(zip(found, expected, strict=True))
    return sum(int((a == b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("path", sorted((PROJECT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_ds_configs_in_16_bits(tmp_path: Path, path: Path, precision: str) -> None:
    line = f"--deepspeed {path} --output_dir {tmp_path}/run --max_steps 2 --grad_accum 2 --precision {precision}"
    train_runs(1, [line.split()])
    assert (tmp_path / "run" / "lora_adapters" / "adapter_model.safetensors").is_file()


def test_generation(tmp_path: Path, base: Path) -> None:
    """Greedy speech of the same text on the GPU and on the CPU begins alike."""
    import soundfile

    words = f"--base_model_path {base} --temperature 0 --max_new_tokens 40 --text Hello --output"
    waveforms: list[Any] = []
    for name, visible in (("gpu", None), ("cpu", "")):
        environment = dict(os.environ) | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        done = run_script("generate", [*words.split(), str(tmp_path / f"{name}.wav")], tmp_path, 120, environment)
        assert done.returncode == 0, done.stderr
        waveforms.append(soundfile.read(tmp_path / f"{name}.wav")[0])
    first = 960 * 5
    assert abs(waveforms[0][:first] - waveforms[1][:first]).max() < 1e-2


def test_killed_and_resumed(tmp_path: Path, mixed_manifest: Path) -> None:
    """To the accuracy of the GPU's sums, whose order is not fixed."""
    more = "--save_steps 2 --max_steps 6 --lora_dropout 0.1"
    whole, parts = (options(tmp_path / name, mixed_manifest, "zero2", more) for name in ("whole", "parts"))
    train_runs(1, [whole])
    kill_after_step(start_ranks(1, TRAIN + parts), tmp_path / "parts", step=2)
    train_runs(1, [[*parts, "--resume", "auto"]])
    last = slice(-3, None)
    assert losses_of(tmp_path / "parts")[last] == pytest.approx(losses_of(tmp_path / "whole")[last], abs=1e-4)
