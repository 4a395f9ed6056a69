"""--push_to_hub with the command and a local hub: adapters and models, which a downloader uses as their cards say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile
import yaml
from conftest import PROJECT
from hub_server import TOKEN, Hub, local_hub
from launcher import RANDOM, free_port, overriding, rank_environment, run_script

from higgs_ds.bases.conversion import rewrite
from higgs_ds.common.hub import PINNED
from higgs_ds.options.checks import check_options
from higgs_ds.options.train import TrainOptions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_hub() -> Iterator[Hub]:
    with local_hub() as hub:
        yield hub


@pytest.fixture
def hub(one_hub: Hub) -> Hub:
    one_hub.clear()
    return one_hub


@dataclass(frozen=True)
class Downloader:
    """Somebody with an empty home and a checkout of the project, who follows the cards of the hub's repositories."""

    folder: Path
    environment: dict[str, str]

    def follow(self, card: str) -> list[str]:
        """Run all commands and code of a card, in its order. Return the names of what each was for."""
        done = []
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", card, re.M | re.S):
            if language == "python":
                (self.folder / "hello.wav").unlink(missing_ok=True)
                assert "max_new_tokens=500" in block
                self._run(block.replace("max_new_tokens=500", "max_new_tokens=30"))
                assert soundfile.info(self.folder / "hello.wav").samplerate == 24000
                done.append(language)
                continue
            for command in block.splitlines():
                program, *words = shlex.split(command)
                if program == "python":
                    name = Path(words[0]).stem
                    cut = ["--max_new_tokens", "30"] if name == "generate" else []
                    ended = run_script(name, words[1:] + cut, self.folder, environment=self.environment)
                    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
                    done.append(name)
                else:
                    assert program == "hf"
                    main = "import sys\nfrom huggingface_hub.cli.hf import main\n"
                    self._run(f"{main}sys.argv = {['hf', *words]!r}\nmain()")
                    done.append(words[0])
        return done

    def _run(self, code: str) -> None:
        script = self.folder / "block.py"
        script.write_text(code)
        done = run_script(str(script.with_suffix("")), [], self.folder, environment=self.environment)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def home_of_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture
def downloader(hub: Hub, home_of_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Downloader:
    folder = tmp_path_factory.mktemp("downloader")
    (folder / "home").mkdir()
    (folder / "launch").symlink_to(PROJECT / "launch")
    shutil.rmtree(home_of_cache)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HIGGS_DS"))}
    environment |= {"HOME": str(folder / "home"), "HF_HOME": str(home_of_cache), "HF_ENDPOINT": hub.address}
    environment |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return Downloader(folder, environment)


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


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_nothing_of_this_machine(files: dict[str, bytes], tmp_path: Path) -> None:
    """No uploaded file has a path of the folders in which the run, its base, its cache and the project are."""
    for name, content in files.items():
        for path in (tmp_path.parent, PROJECT, Path.home()):
            assert f"{path}/".encode() not in content, f"{path} in {name}"


def test_the_adapter(train: Train, hub: Hub, tmp_path: Path, downloader: Downloader) -> None:
    """Of a built-in base, which downloaders make themselves."""
    done = train("--hub_private", "--lora_r", "4")
    assert done.returncode == 0, done.stderr
    assert f"published: {hub.address}/tester/my-voice" in done.stdout
    files, local = hub.repositories["tester/my-voice"], files_in(tmp_path / "run" / "lora_adapters")
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    configs = [json.loads(of.pop("adapter_config.json")) for of in (dict(files), local)]
    assert [config.pop("base_model_name_or_path").rpartition("/") for config in configs] == [
        ("", "", "tiny-random-base"), (str(Path(os.environ["HIGGS_DS_CACHE"]) / "builtin-3"), "/", "tiny-random-base"),
    ]  # fmt: skip
    assert configs[0] == configs[1]
    assert not (tmp_path / "run" / "to_publish").exists()
    assert {name: files[name] for name in local} == local
    assert hub.private == {"tester/my-voice": True}
    assert_nothing_of_this_machine(files, tmp_path)
    header, text = card_of(files)
    assert (header["library_name"], header["license"]) == ("peft", "apache-2.0")
    assert {"lora", "higgs-audio-v2"} <= set(header["tags"])  # type: ignore[call-overload]
    assert "--lora_r 4" in text
    assert "consent" in text
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(line["val/audio_loss"] for line in reversed(metrics) if "val/audio_loss" in line)
    assert f"| val/audio_loss | {last:.4g} |" in text
    assert "samples: 9" in text
    assert downloader.follow(text) == ["download", "generate", "merge", "python"]


def test_an_adapter_of_a_base_in_4_bits(
    train: Train, hub: Hub, base: Path, tmp_path: Path, downloader: Downloader
) -> None:
    """The base is on the hub, in the native layout and with its codec; its card names the licence."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    shutil.copytree(base.parent / "tiny-random-codec", folder / "audio_tokenizer")
    config = json.loads((folder / "processor_config.json").read_text())
    config["audio_tokenizer"]["audio_tokenizer_name_or_path"] = "audio_tokenizer"
    (folder / "processor_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n\n# A base\n")
    hub.add("tester/base", folder)
    done = train("--base_ckpt", "tester/base", "--load_in_4bit")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["tester/my-voice"]
    assert files == files_in(tmp_path / "run" / "lora_adapters")
    assert_nothing_of_this_machine(files, tmp_path)
    header, text = card_of(files)
    assert (header["base_model"], header["license"]) == ("tester/base", "cc-by-4.0")
    assert "belongs to weights in 4 bits" in text
    assert downloader.follow(text) == ["download", "generate", "merge", "python"]


def test_the_merged_model(train: Train, hub: Hub, base: Path, tmp_path: Path, downloader: Downloader) -> None:
    """Of the released base's name: in the original layout, and without a codec, whose repository is read at a commit
    that transformers does not read."""
    release, codec = "bosonai/higgs-audio-v2-generation-3B-base", "bosonai/higgs-audio-v2-tokenizer"
    rewrite(base, tmp_path / "original", "original", "base")
    for name in ("processor_config.json", "chat_template.jinja"):
        (tmp_path / "original" / name).unlink()
    hub.add(release, tmp_path / "original")
    hub.add(codec, base.parent / "tiny-random-codec")
    done = train("--base_ckpt", release, "--upload_merged_model", "--merge_adapter_with_base")
    assert done.returncode == 0, done.stderr
    assert any(f"{codec}/resolve/{PINNED[codec]}/" in line for line in hub.asked)
    files, merged = hub.repositories["tester/my-voice"], tmp_path / "run" / "merged_model"
    assert files == files_in(merged)
    assert {"config.json", "model.safetensors", "tokenizer.json", "audio_tokenizer/model.safetensors"} <= files.keys()
    assert_nothing_of_this_machine(files, tmp_path)
    header, text = card_of(files)
    assert (header["library_name"], header["base_model"]) == ("transformers", release)
    assert (header["license"], header["license_name"]) == ("other", "boson-higgs-audio-2-community-license")
    # The downloaded copy is complete: neither this machine nor another repository is needed.
    adapter = Path(shutil.copytree(tmp_path / "run" / "lora_adapters", downloader.folder / "THIS_FOLDER"))
    shutil.rmtree(tmp_path / "run")
    others = {name: hub.repositories.pop(name) for name in (release, codec)}
    assert downloader.follow(text) == ["download", "generate", "python"]
    # The adapter, which was not uploaded: a downloader of this base merges first, as transformers cannot read it.
    hub.repositories |= others
    assert downloader.follow((adapter / "README.md").read_text()) == ["generate", "merge", "python"]


def test_the_complete_model(train: Train, hub: Hub, tmp_path: Path, downloader: Downloader) -> None:
    """The complete model of full fine-tuning, in both layouts, with its card."""
    options = ["--train_groups", "heads", "attention", "--merge_adapter_with_base", "--export_layout", "both"]
    done = train("--finetune", "full", *options, "--hub_license", "cc-by-4.0")
    assert done.returncode == 0, done.stderr
    assert "--merge_adapter_with_base: --finetune full leaves nothing to merge" in done.stdout + done.stderr
    files, final = hub.repositories["tester/my-voice"], tmp_path / "run" / "final_model"
    assert files == files_in(final)
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    assert {f"native/{name}" for name in (*names, "audio_tokenizer/model.safetensors")} <= files.keys()
    assert_nothing_of_this_machine(files, tmp_path)
    header, text = card_of(files)
    assert (header["library_name"], header["license"]) == ("transformers", "cc-by-4.0")
    assert "; fully fine-tuned: heads, attention." in text
    assert "--finetune full" in text
    assert not (tmp_path / "run" / "merged_model").exists()
    assert downloader.follow(text) == ["download", "generate", "python"]


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
    assert problems(hub_license="apache-2.0") == ["--hub_license: needs --push_to_hub"]


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
    folder = tmp_path / "run" / "to_publish"
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
    assert hub.repositories["tester/my-voice"] == files_in(folder)
    assert_nothing_of_this_machine(files_in(folder), tmp_path)
