"""--push_to_hub with the command and a local hub: the adapter, the merged model, and failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, processor_in
from hub_server import TOKEN, Hub, local_hub
from launcher import RANDOM, free_port, overriding, rank_environment
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_ds.options.checks import check_options
from higgs_ds.options.train import TrainOptions

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[Hub]:
    with local_hub() as hub:
        yield hub


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def train(tmp_path: Path, mixed_manifest: Path, ds_file: Callable[[int], Path], hub: Hub) -> Train:
    """Run launch/train.py in its own process, as huggingface_hub reads its environment only once."""

    def run(*more: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        environment = rank_environment(0, 1, free_port()) | {"TORCH_DISTRIBUTED_DEBUG": "OFF"}
        environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_TOKEN", None)
        environment |= {"HF_TOKEN": token} if token else {}
        line = (
            f"--deepspeed {ds_file(2)} --output_dir {tmp_path}/run --precision fp32 --train_manifest {mixed_manifest} "
            "--allow_text_targets --val_split 0.34 --batch_size 1 --grad_accum 1 --max_steps 2 --val_steps 1 "
            "--no_report --push_to_hub --hub_repo_id tester/my-voice"
        )
        command = [sys.executable, f"{PROJECT}/launch/train.py", *RANDOM, *line.split(), *more]
        done = subprocess.run(overriding(command), env=environment, capture_output=True, text=True, check=False)
        assert not token or token not in done.stdout + done.stderr
        return done

    return run


def card_of(files: dict[str, bytes]) -> tuple[dict[str, object], str]:
    _, header, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_adapter(train: Train, hub: Hub, tmp_path: Path, mixed_manifest: Path) -> None:
    done = train("--hub_private", "--lora_r", "4")
    assert done.returncode == 0, done.stderr
    assert f"published: {hub.address}/tester/my-voice" in done.stdout
    files = hub.repositories["tester/my-voice"]
    local = {path.name: path.read_bytes() for path in (tmp_path / "run" / "lora_adapters").iterdir()}
    assert files == local
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert hub.private == {"tester/my-voice": True}
    header, text = card_of(files)
    assert header["library_name"] == "peft"
    assert {"lora", "higgs-audio-v2"} <= set(header["tags"])  # type: ignore[call-overload]
    assert "--lora_r 4" in text
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(line["val/audio_loss"] for line in reversed(metrics) if "val/audio_loss" in line)
    assert f"| val/audio_loss | {last:.4g} |" in text
    assert "samples: 9" in text
    assert "launch/merge.py --base_model_path" in text
    # No path of this machine.
    assert str(tmp_path) not in text
    assert str(mixed_manifest.parent) not in text


def test_the_merged_model(train: Train, hub: Hub, tmp_path: Path) -> None:
    done = train("--upload_merged_model", "--merge_adapter_with_base")
    assert done.returncode == 0, done.stderr
    files, merged = hub.repositories["tester/my-voice"], tmp_path / "run" / "merged_model"
    expected = {str(path.relative_to(merged)): path.read_bytes() for path in merged.rglob("*") if path.is_file()}
    assert files == expected
    assert {"config.json", "model.safetensors", "tokenizer.json", "audio_tokenizer/model.safetensors"} <= files.keys()
    header, text = card_of(files)
    assert header["library_name"] == "transformers"
    assert "HiggsAudioV2ForConditionalGeneration.from_pretrained" in text
    # The downloaded copy is complete without this machine's folders.
    shutil.rmtree(tmp_path / "run")
    downloaded = tmp_path / "downloaded"
    for name, content in files.items():
        (downloaded / name).parent.mkdir(parents=True, exist_ok=True)
        (downloaded / name).write_bytes(content)
    assert processor_in(downloaded).audio_tokenizer.config.num_quantizers == 8
    assert HiggsAudioV2ForConditionalGeneration.from_pretrained(downloaded).config.num_codebooks == 8


def test_the_complete_model(train: Train, hub: Hub, tmp_path: Path) -> None:
    """The complete model of full fine-tuning, with its card."""
    done = train("--finetune", "full", "--train_groups", "heads", "attention", "--merge_adapter_with_base")
    assert done.returncode == 0, done.stderr
    assert "--merge_adapter_with_base: --finetune full leaves nothing to merge" in done.stdout + done.stderr
    files, final = hub.repositories["tester/my-voice"], tmp_path / "run" / "final_model"
    assert files == {str(path.relative_to(final)): path.read_bytes() for path in final.rglob("*") if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
            "audio_tokenizer/model.safetensors"} <= files.keys()  # fmt: skip
    header, text = card_of(files)
    assert header["library_name"] == "transformers"
    assert "; fully fine-tuned: heads, attention." in text
    assert "--finetune full" in text
    assert not (tmp_path / "run" / "merged_model").exists()


def test_refused_combinations() -> None:
    def problems(**options: object) -> list[str]:
        return check_options(TrainOptions().replace(**options))

    merged = problems(push_to_hub=True, hub_repo_id="a/b", upload_merged_model=True)
    assert merged == ["--upload_merged_model: needs --merge_adapter_with_base, which writes the merged model"]
    alone = problems(upload_merged_model=True, merge_adapter_with_base=True)
    assert alone == ["--upload_merged_model: needs --push_to_hub"]
    assert problems(push_to_hub=True) == ["--push_to_hub: needs --hub_repo_id OWNER/NAME"]
    assert problems(hub_repo_id="a/b", hub_private=True) == [
        "--hub_repo_id: needs --push_to_hub", "--hub_private: needs --push_to_hub",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("token", "words"),
    [(None, "you are not logged in; run `hf auth login`, or set HF_TOKEN"), ("hf_wrong", "the hub rejects your token")],
)
def test_no_token_or_a_wrong_one(train: Train, hub: Hub, tmp_path: Path, token: str | None, words: str) -> None:
    """Before anything is trained."""
    done = train(token=token)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not hub.repositories
    assert not (tmp_path / "run" / "lora_adapters").exists()


@pytest.mark.parametrize("drops", ["/objects/", "/commit/"])
def test_a_connection_that_breaks(train: Train, hub: Hub, tmp_path: Path, drops: str) -> None:
    """The folder is unchanged, and the printed command completes the upload."""
    hub.drops = drops
    done = train("--hub_private")
    assert done.returncode == 8, done.stderr
    folder = tmp_path / "run" / "lora_adapters"
    assert "Traceback" not in done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line == f"Try again: hf upload tester/my-voice {folder} . --private"
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["finished"]
    assert not hub.repositories.get("tester/my-voice")
    hub.drops = None
    environment = os.environ | {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip
    command = shutil.which("hf", path=str(Path(sys.executable).parent))
    assert command
    again = [command, *last_line.removeprefix("Try again: hf ").split()]
    subprocess.run(again, env=environment, check=True, capture_output=True)
    assert hub.repositories["tester/my-voice"] == {path.name: path.read_bytes() for path in folder.iterdir()}
