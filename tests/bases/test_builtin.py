"""The built-in bases: found by name, identical on every build, usable like any base and with plain transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2TokenizerModel,
)

from higgs_ds.bases import builtin
from higgs_ds.bases.builtin import (
    DEFAULT_BASE,
    RANDOM_BASE,
    SPEAKING_CODEC,
    builtin_base,
    builtin_config,
    find_base,
    is_builtin,
    warn_of_builtin_base,
)
from higgs_ds.bases.bundle import open_bundle
from higgs_ds.bases.tiny_random import random_config
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import sha256_of
from higgs_ds.data.audio import read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.model.sample import AudioClip, Message
from higgs_ds.model.v2.family import HiggsAudioV2
from higgs_ds.model.v2.prompt import render_generation, tokenize
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.planning import dry_run

VOICE = PROJECT / "samples" / "voices" / "ben_00.flac"
CLIP = AudioClip(VOICE)


# SHA-256 over names and bytes of all tensors: the same on every machine.
WEIGHTS = {
    "tiny-random-base": "217adec6754b57ca00c72041a824ed8ae5d1e9a5f4a65f899da3376807aba215",
    "tiny-random-codec": "d2697364e28cc826c5580abfcb251cc8c777fbde8cb92eb134bcb73b751cd148",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_same_on_every_machine(base: Path, name: str) -> None:
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(base.parent / name / "model.safetensors").items()):
        digest.update(key.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS[name]


def test_built_twice_alike(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = builtin_base(RANDOM_BASE, tmp_path)
    assert torch.get_rng_state().equal(before)  # building does not change the user's random state
    names = sorted(str(path.relative_to(again.parent)) for path in again.parent.rglob("*") if path.is_file())
    assert "tiny-random-base/model.safetensors" in names
    assert "tiny-random-codec/model.safetensors" in names
    for name in names:
        if not name.endswith("processor_config.json"):  # names the codec's folder
            assert sha256_of(again.parent / name) == sha256_of(base.parent / name), name


def test_loads_in_plain_transformers_and_generates(base: Path) -> None:
    processor = AutoProcessor.from_pretrained(base)
    model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        base, use_text_head=True, output_loading_info=True
    )
    assert not any(info.values())
    conversation = [
        {"role": "system", "content": "Generate audio following instruction."},
        {"role": "scene", "content": "Audio is recorded from a quiet room."},
        {"role": "user", "content": "Hello there."},
    ]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    rows = model.generate(**inputs, max_new_tokens=12)
    assert rows.shape == (1, 12, 8)
    assert (rows[0, 0] == 1024).all()


CONVERSATIONS = {
    "smart voice": [("system", ("Be brief.",)), ("user", ("Hello.",))],
    "cloning": [("system", ("Speak.",)), ("user", ("Words.",)), ("assistant", (CLIP,)), ("user", ("Hi.",))],
    "reference in the system turn": [("system", ("SPEAKER0: ", CLIP, "\nNow.")), ("user", ("[SPEAKER0] Hi.",))],
    "two assistant turns": [("user", ("Hi.",)), ("assistant", (CLIP,)), ("assistant", (CLIP,)), ("user", ("Again.",))],
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template_is_the_training_layout(base: Path, name: str) -> None:
    """The template and processor, which inference uses, give the ids and codes that training uses."""
    bundle = open_bundle(str(base), None, None, base)
    waveform = read_audio(AudioClip(VOICE), bundle.codec.sample_rate)
    messages = [Message(role, parts) for role, parts in CONVERSATIONS[name]]
    codec = Codec(bundle.codec.folder, torch.device("cpu"))
    codes = [codec.encode(waveform) for m in messages for _ in m.clips]
    prompt = tokenize(render_generation(messages), [c.shape[1] for c in codes], bundle.tokenizer, bundle.stream)

    processor = AutoProcessor.from_pretrained(base)
    chat = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "audio", "audio": waveform.numpy()}
                for part in message.parts
            ],
        }
        for message in messages
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, audio=[waveform.numpy()] * len(codes) or None, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt.input_ids
    if codes:
        assert inputs["audio_input_ids"][0].equal(torch.cat([bundle.stream.delay(c) for c in codes]))


def test_template_of_the_scene_role(base: Path) -> None:
    processor = AutoProcessor.from_pretrained(base)
    separate = [{"role": "system", "content": "Generate audio."}, {"role": "scene", "content": "A quiet room."}]
    joined = "Generate audio.\n\n<|scene_desc_start|>\nA quiet room.\n<|scene_desc_end|>"
    rendered = processor.apply_chat_template(separate, tokenize=False)
    assert rendered == processor.apply_chat_template([{"role": "system", "content": joined}], tokenize=False)


def test_tokenizer_keeps_any_text(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text in ["Hello, world!", "太阳从东方升起。 مرحبا é", "  two  spaces\n\nand lines\t", "🙂"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def speaking(cache_dir: Path) -> Path:
    return builtin_base(DEFAULT_BASE, cache_dir)


@pytest.fixture
def own_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's assets that replaces them."""
    copied = shutil.copytree(builtin.ASSETS, tmp_path / "assets")
    monkeypatch.setattr(builtin, "ASSETS", copied)
    return copied


def test_names(base: Path, speaking: Path, cache_dir: Path) -> None:
    assert is_builtin("speaking-base")
    assert is_builtin("tiny-random-base")
    assert not is_builtin("tiny-random-codec")
    assert find_base("tiny-random-base", "--base_ckpt", cache_dir) == base
    for name in ("speaking-base", None):
        assert find_base(name, "--base_ckpt", cache_dir) == speaking
        # An adapter names its base by this: a folder, so that PEFT finds it, too.
        assert open_bundle(name, None, None, cache_dir).name == str(speaking)
    assert open_bundle("tiny-random-base", None, None, cache_dir).name == str(base)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no-base: is not a built-in base; choose speaking-base or "):
        builtin_base("no-base", tmp_path)
    with pytest.raises(InputError, match="no-base: is not a built-in base"):
        builtin_config("no-base")
    with pytest.raises(InputError, match="--base_ckpt no-base: no such folder"):
        find_base("no-base", "--base_ckpt", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["speaking-base", "tiny-random-base"])
def test_a_folder_of_the_same_name_comes_first(
    base: Path, speaking: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = base if name == "speaking-base" else speaking
    shutil.copytree(other, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = find_base(name, "--base_ckpt", cache_dir)
    assert found == tmp_path / name
    bundle = open_bundle(name, None, None, cache_dir)
    assert (bundle.name, bundle.folder) == (name, tmp_path / name)
    setting = dry_run.make_setting(*parse_train_options(["--dry_run", "--base_ckpt", name]))
    expected = random_config(HiggsAudioV2()) if other == base else builtin_config(DEFAULT_BASE)
    assert setting.config.hidden_size == expected.hidden_size
    assert find_base(None, "--base_ckpt", cache_dir) == speaking  # no name, no search


@pytest.mark.parametrize(
    "missing", ["speaking-base/model.safetensors", "speaking-base/tokenizer.json", "speaking-codec"]
)
def test_missing_assets(own_assets: Path, base: Path, cache_dir: Path, tmp_path: Path, missing: str) -> None:
    path = own_assets / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    named = missing if "/" in missing else f"{missing}/config.json, {missing}/model.safetensors"
    expected = (
        f"{own_assets}: missing {named} of the built-in base speaking-base; "
        "the installation of the project is incomplete"
    )
    for ask in (lambda: builtin_base(DEFAULT_BASE, tmp_path / "cache"), lambda: builtin_config(DEFAULT_BASE)):
        with pytest.raises(InputError) as caught:
            ask()
        assert caught.value.problems[0].startswith(expected)
    assert not (tmp_path / "cache").exists()
    assert builtin_base("tiny-random-base", cache_dir) == base  # needs no assets


def test_damaged_assets(own_assets: Path, tmp_path: Path) -> None:
    path = own_assets / "speaking-codec" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{path}: not a safetensors file, or damaged"):
        builtin_base(DEFAULT_BASE, tmp_path / "cache")


@pytest.mark.parametrize("name", [DEFAULT_BASE, SPEAKING_CODEC])
def test_the_assets_in_float32(speaking: Path, name: str) -> None:
    asset, folder = builtin.ASSETS / name, speaking.parent / name
    stored, copied = load_file(asset / "model.safetensors"), load_file(folder / "model.safetensors")
    assert stored.keys() == copied.keys()
    assert any(tensor.dtype == torch.float16 for tensor in stored.values())
    for key, tensor in stored.items():
        assert copied[key].dtype == (torch.float32 if tensor.is_floating_point() else tensor.dtype), key
        assert copied[key].equal(tensor.to(copied[key].dtype)), key
    text = (asset / "config.json").read_text(encoding="utf-8")
    assert '"dtype": "float16"' in text
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == json.loads(
        text.replace('"dtype": "float16"', '"dtype": "float32"')
    )
    assert (folder / "README.md").read_bytes() == (asset / "README.md").read_bytes()


def test_a_codec_in_float16_computes_in_float32(speaking: Path) -> None:
    """Its codes are those of transformers with the same weights in float32."""
    waveform = read_audio(CLIP, 24000)
    codes = Codec(builtin.ASSETS / SPEAKING_CODEC, torch.device("cpu")).encode(waveform)
    expected = HiggsAudioV2TokenizerModel.from_pretrained(speaking.parent / SPEAKING_CODEC)
    with torch.inference_mode():
        assert codes.equal(expected.encode(waveform[None, None]).audio_codes[0])


def test_the_speaking_base_by_transformers_alone(speaking: Path) -> None:
    processor = AutoProcessor.from_pretrained(speaking)
    model, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        speaking, use_text_head=True, output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == torch.float32
    assert processor.audio_tokenizer.dtype == torch.float32
    codec = processor_config(speaking)["audio_tokenizer"]["audio_tokenizer_name_or_path"]
    assert codec == str(speaking.parent / SPEAKING_CODEC)
    expected = builtin_config(DEFAULT_BASE)
    assert expected.dtype == torch.float32
    assert model.config.hidden_size == expected.hidden_size
    assert (speaking / "generation_config.json").is_file()


def processor_config(folder: Path) -> dict[str, dict[str, str]]:
    return json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", ["speaking-base/config.json", "speaking-codec/README.md", "chat_template.jinja"])
def test_other_assets_make_another_folder(own_assets: Path, speaking: Path, cache_dir: Path, part: str) -> None:
    assert builtin_base(DEFAULT_BASE, cache_dir) == speaking  # the same, independent of their location
    with (own_assets / part).open("a") as file:
        file.write("\n")
    other = builtin_base(DEFAULT_BASE, cache_dir)
    assert other != speaking
    assert processor_config(other)["audio_tokenizer"]["audio_tokenizer_name_or_path"].startswith(str(other.parent))


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, speaking: Path) -> None:
    """Both start only once both are ready, so both create the base; both find it complete."""
    code = (
        "import sys; from pathlib import Path; from higgs_ds.bases.builtin import builtin_base; print(flush=True); "
        "input(); print(builtin_base('speaking-base', Path(sys.argv[1])))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "\n"
    outputs = [process.communicate("\n", timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    folders = {Path(out.strip()) for out, _ in outputs}
    (folder,) = folders
    assert folder == tmp_path / speaking.parent.name / DEFAULT_BASE
    for name in (DEFAULT_BASE, SPEAKING_CODEC):
        weights = f"{name}/model.safetensors"
        assert sha256_of(folder.parent / weights) == sha256_of(speaking.parent / weights)
    assert sorted(path.name for path in folder.parent.iterdir()) == [DEFAULT_BASE, SPEAKING_CODEC]


@pytest.mark.parametrize(
    ("name", "manifest", "words"),
    [
        (None, "my_clips", "warning: without --base_ckpt the base is speaking-base, which is built in for trying out"),
        (DEFAULT_BASE, "my_clips", f"warning: --base_ckpt {DEFAULT_BASE} is built in for trying out the trainer"),
        (RANDOM_BASE, "my_clips", ""),  # learns anything, and says so where it is listed
        (None, "samples/digits.jsonl", ""),
        (RANDOM_BASE, "samples/voices.jsonl", ""),
        ("bosonai/higgs-audio-v2-generation-3B-base", "my_clips", ""),
    ],
)
def test_warning_of_data_that_a_built_in_base_cannot_learn(
    name: str | None, manifest: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PROJECT)
    warn_of_builtin_base(name, [Path("samples/digits.jsonl"), Path(manifest)])
    printed = capsys.readouterr().out
    assert printed.startswith(words)
    assert bool(printed) == bool(words)
    assert ("give --base_ckpt bosonai/higgs-audio-v2-generation-3B-base" in printed) == bool(words)
