"""Tensors written to several files one after another and read back by name, also the masters of full fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_ds.checkpoints.trained_weights import FullFormat, read_trained, write_trained
from higgs_ds.common import tensor_files
from higgs_ds.common.distributed import on_main_consuming
from higgs_ds.common.errors import InputError, NotFiniteError, SaveError
from higgs_ds.common.tensor_files import StoredTensors, shard_files, weight_files, write_shards

TENSORS = {f"exp_avg.{name}": torch.randn(3, 5 + i) for i, name in enumerate("abcdef")} | {"other": torch.ones(2)}
SIZES = {name: tensor.nbytes for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(("shard_bytes", "files"), [(2**30, 1), (200, 4), (1, 7)])
def test_write_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, files: int) -> None:
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", shard_bytes)
    write_shards(SIZES, iter(TENSORS.values()), tmp_path, "optimizer")
    found = shard_files(tmp_path, "optimizer")
    assert len(found) == files
    assert found[0].name == ("optimizer.safetensors" if files == 1 else f"optimizer-00001-of-0000{files}.safetensors")
    assert {name: t.tolist() for path in found for name, t in load_file(path).items()} == {
        name: t.tolist() for name, t in TENSORS.items()
    }
    stored = StoredTensors(found, "exp_avg.")
    assert list(stored) == list("abcdef")
    assert stored.sizes == {name: SIZES[f"exp_avg.{name}"] for name in stored}
    for name in [*stored, *reversed(list(stored))]:
        assert stored[name].equal(TENSORS[f"exp_avg.{name}"])
    found[0].unlink()
    with pytest.raises(InputError, match="missing optimizer"):
        shard_files(tmp_path, "optimizer")


def test_one_file_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is requested only after the files before its own have been written."""
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 1)
    written = []

    def tensors() -> Iterator[torch.Tensor]:
        for tensor in TENSORS.values():
            written.append(len(list(tmp_path.glob("*.safetensors"))))
            yield tensor

    write_shards(SIZES, tensors(), tmp_path)
    assert written == list(range(len(TENSORS)))


def test_transformers_reads_them(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 2**20)
    weights = load_file(base / "model.safetensors")
    write_shards({name: t.nbytes for name, t in weights.items()}, iter(weights.values()), tmp_path)
    assert len(weight_files(tmp_path)) > 3
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path, use_text_head=True)
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())


def test_masters(tmp_path: Path) -> None:
    full_format = FullFormat(("heads",), "base", "ab")
    write_trained(tmp_path / "trained_weights", SIZES, iter(TENSORS.values()), full_format)
    found, read_format = read_trained(tmp_path)
    assert read_format == full_format
    assert all(tensor.equal(TENSORS[name]) for name, tensor in found.items())
    broken = (torch.full_like(tensor, torch.nan) if name == "other" else tensor for name, tensor in TENSORS.items())
    with pytest.raises(NotFiniteError, match="other"):
        write_trained(tmp_path / "again" / "trained_weights", SIZES, broken, full_format)
    (tmp_path / "trained_weights" / "trained.json").write_text(json.dumps({"groups": 3}))
    with pytest.raises(InputError, match=r"trained_weights: trained.json cannot be read"):
        read_trained(tmp_path)


@pytest.mark.usefixtures("lone_rank")
def test_items_left_by_a_failed_action_are_still_produced() -> None:
    """Otherwise the other ranks would wait in a collective for the rank that has failed."""
    items = iter(range(5))

    def fail(numbers: Iterator[int]) -> None:
        next(numbers)
        raise SaveError("disk full")

    with pytest.raises(SaveError, match="disk full"):
        on_main_consuming(items, fail)
    assert list(items) == []
    assert on_main_consuming(iter([1, 2]), sum) == 3
