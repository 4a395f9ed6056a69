"""Files that would run code if they were unpickled: reading them never runs it, whatever file they replace."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import speech_sample, write_manifest
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file

from higgs_ds.adapters.load import read_adapter
from higgs_ds.adapters.save import ADAPTER_WEIGHTS
from higgs_ds.bases.bundle import open_bundle
from higgs_ds.checkpoints.folder import (
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    RNG_FILE,
    manifest_of,
    masters_in,
    newest_complete,
)
from higgs_ds.checkpoints.save import load_masters_into
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import write_json
from higgs_ds.common.run_files import ADAPTER_FOLDER
from higgs_ds.data.audio import AudioError, read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.codec_info import find_codec
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.data.preparation import Preparation
from higgs_ds.model.loading import check_weights, load_base, load_base_in_4bit
from higgs_ds.model.sample import AudioClip
from higgs_ds.options.ds_config import read_ds_config
from higgs_ds.options.train import DataOptions


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (self.marker,)  # type: ignore[return-value]


@pytest.fixture(params=["pickle", "torch.save"])
def bad_bytes(request: pytest.FixtureRequest, marker: Path) -> bytes:
    if request.param == "pickle":
        return pickle.dumps(Payload(marker))
    buffer = io.BytesIO()
    torch.save({"weight": Payload(marker)}, buffer)
    return buffer.getvalue()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture(autouse=True)
def _nothing_ran(marker: Path, bad_bytes: bytes) -> object:
    """After each test: the payload has not run, and it would have run if it had been unpickled."""
    yield
    assert not marker.exists()
    if bad_bytes.startswith(b"PK"):
        torch.load(io.BytesIO(bad_bytes), weights_only=False)
    else:
        pickle.loads(bad_bytes)  # noqa: S301
    assert marker.exists()


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "base"))


def refuses(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["in place", "pytorch_model.bin", "sharded"])
def test_base(own_base: Path, tmp_path: Path, bad_bytes: bytes, kind: str) -> None:
    weights = own_base / "model.safetensors"
    if kind == "in place":
        weights.write_bytes(bad_bytes)
    else:
        weights.unlink()
        (own_base / "pytorch_model.bin").write_bytes(bad_bytes)
    if kind == "sharded":
        index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
        write_json(own_base / "model.safetensors.index.json", index)
    assert str(own_base) in refuses(lambda: (open_bundle(str(own_base), None, None, tmp_path), check_weights(own_base)))
    # The loaders refuse the files too, although a user only reaches the checks above.
    cpu = torch.device("cpu")
    for load in (load_base, lambda folder, dtype: load_base_in_4bit(folder, dtype, cpu, cpu)):
        with pytest.raises((InputError, OSError, SafetensorError, KeyError)):
            load(own_base, torch.float32)


def test_code_in_a_base_folder(own_base: Path, tmp_path: Path, marker: Path, bad_bytes: bytes) -> None:
    """Custom code that the configuration and the tokenizer refer to is never run."""
    (own_base / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    for name, classes in [
        ("config.json", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}),
    ]:
        values = json.loads((own_base / name).read_text())
        write_json(own_base / name, values | {"auto_map": classes})
    open_bundle(str(own_base), None, None, tmp_path)
    load_base(own_base, torch.float32)


def test_codec(own_base: Path, tmp_path: Path, bad_bytes: bytes) -> None:
    codec = Path(shutil.copytree(find_codec(own_base, None), tmp_path / "codec"))
    bundle = open_bundle(str(own_base), None, str(codec), tmp_path)
    (codec / "model.safetensors").rename(codec / "pytorch_model.bin")
    (codec / "pytorch_model.bin").write_bytes(bad_bytes)
    assert str(codec) in refuses(lambda: open_bundle(str(own_base), None, str(codec), tmp_path))
    with pytest.raises(OSError, match="safetensors"):
        Codec(bundle.codec.folder, torch.device("cpu"))
    (codec / "model.safetensors").write_bytes(bad_bytes)
    assert str(codec) in refuses(lambda: open_bundle(str(own_base), None, str(codec), tmp_path))


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, "adapter_model.bin"])
def test_adapter(tmp_path: Path, bad_bytes: bytes, name: str) -> None:
    LoraConfig(r=2, target_modules=["self_attn.q_proj"]).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_bytes(bad_bytes)
    assert "cannot be read" in refuses(lambda: read_adapter(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "name", [OPTIMIZER_FILE, RNG_FILE, f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}", "trainer_state.json"]
)
def test_checkpoint(tmp_path: Path, bad_bytes: bytes, name: str) -> None:
    """A changed checkpoint is skipped, also if its manifest was changed accordingly. It does not load."""
    folder = tmp_path / "run" / "checkpoint-2"
    (folder / ADAPTER_FOLDER).mkdir(parents=True)
    for file in (OPTIMIZER_FILE, RNG_FILE, f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"):
        save_file({"x": torch.zeros(1)}, folder / file)
    write_json(folder / "trainer_state.json", TrainerState(10, {}, step=2).to_json())
    write_json(folder / MANIFEST_FILE, manifest_of(folder))
    assert newest_complete(folder.parent)[0] == folder
    (folder / name).write_bytes(bad_bytes)
    assert newest_complete(folder.parent)[0] is None
    (folder / MANIFEST_FILE).unlink()
    write_json(folder / MANIFEST_FILE, manifest_of(folder))
    found, (skipped,) = newest_complete(folder.parent)
    assert found is None
    assert name in skipped
    if name.endswith(ADAPTER_WEIGHTS):
        with pytest.raises(Exception, match="header"):
            load_masters_into(masters_in(folder), {"a": torch.nn.Parameter(torch.zeros(1))})


@pytest.mark.usefixtures("lone_rank")
def test_cache(base: Path, tmp_path: Path, bad_bytes: bytes) -> None:
    manifest = write_manifest(tmp_path / "m.jsonl", [speech_sample("Clip.", "anna_00.flac")])
    bundle = open_bundle(str(base), None, None, base.parent)

    def prepared() -> Dataset:
        with Preparation(DataOptions(), bundle.coder(tmp_path / "cache"), tmp_path / "cache") as preparation:
            checked = preparation.check(manifest)
            preparation.encode(checked, torch.device("cpu"))
            assert preparation.coder
            index = preparation.keep(checked)
            return Dataset(index, index.num_tokens.argsort(), preparation.coder)

    dataset = prepared()
    (codes,) = (tmp_path / "cache" / "codes").rglob("*.safetensors")
    codes.write_bytes(bad_bytes)
    assert "are missing or damaged" in refuses(lambda: dataset.batch([0]))
    (facts,) = (tmp_path / "cache" / "index").rglob("facts-*.arrow")
    facts.write_bytes(bad_bytes)
    assert prepared().batch([0]).num_samples == 1


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl", "data.json", "data.csv"])
def test_manifest(tmp_path: Path, bad_bytes: bytes, base: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bad_bytes)
    entries = list(read_entries(tmp_path / name, DataOptions()))
    assert entries
    assert all(entry.faults for entry in entries)


def test_audio(tmp_path: Path, bad_bytes: bytes) -> None:
    (tmp_path / "clip.wav").write_bytes(bad_bytes)
    with pytest.raises(AudioError):
        read_audio(AudioClip(tmp_path / "clip.wav"), 24000)


def test_deepspeed_file(tmp_path: Path, bad_bytes: bytes) -> None:
    (tmp_path / "ds.json").write_bytes(bad_bytes)
    assert "ds.json" in refuses(lambda: read_ds_config(tmp_path / "ds.json"))
