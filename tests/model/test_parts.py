"""The optional parts: equal to the original runtime in each forward, and without effect when they are added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT, VOICES, whisper_folder
from safetensors.torch import load_file
from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor

from higgs_ds.bases.conversion import native_folder
from higgs_ds.common.errors import InputError
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.data.audio import read_audio, write_audio
from higgs_ds.data.collate import EncodedSample, collate
from higgs_ds.data.mel_features import MelFeatures, MelFeatureStore
from higgs_ds.model.config import tower_geometry
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.loading import load_base
from higgs_ds.model.lora import add_lora
from higgs_ds.model.parts import Parts
from higgs_ds.model.prompt import Prompt, Segment, Stretch
from higgs_ds.model.sample import AudioClip
from higgs_ds.model.v2.loss_model import DualLossModel
from higgs_ds.model.v2.part_modules import AudioTower, ExtendedModel
from higgs_ds.model.v2.prompt import tokenize
from higgs_ds.model.v2.stream import FramedStream
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.train import LoraOptions
from higgs_ds.training.startup import start

GOLDEN = PROJECT / "tests" / "golden"
CPU = torch.device("cpu")
STREAM = FramedStream(num_codebooks=8, bos_id=1024, eos_id=1025)


@pytest.mark.parametrize("name", ["released_flags", "audio_attention", "whisper_tower"])
def test_training_forward_against_the_original(name: str, tmp_path: Path) -> None:
    """In the packed order of a training batch, with a text-only sample and one with a reference clip and a target."""
    folder = GOLDEN / name
    inputs, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    model = load_base(native_folder(folder, "--base_ckpt", tmp_path), torch.float32)
    there = expected["attention_mask"][0].bool()
    ids, codes, heard = (
        expected[key][0, there] for key in ("expanded_input_ids", "audio_in_discrete_codes_mask", "audio_in_mask")
    )
    is_code = codes | expected["audio_out_mask"][0, there]
    labels = [IGNORE_INDEX] * len(ids)
    columns = (heard & ~codes).nonzero()[:, 0].tolist()
    prompt = Prompt(ids.tolist(), labels, is_code.nonzero()[:, 0].tolist(), [False, True], columns)
    sample = EncodedSample(prompt, [inputs["reference_codes"], inputs["target_codes"]])
    bins = None
    if name == "whisper_tower":
        model.model.audio_tower.config._attn_implementation = "eager"  # as for the expected numbers
        length = int(inputs["audio_feature_attention_mask"].sum())
        bins = inputs["audio_features"].shape[1]
        sample.heard.append(MelFeatures(inputs["audio_features"][0], length))
    other = EncodedSample(Prompt([10, 11, 12, 20] * 20, [IGNORE_INDEX] * 80, [], []), [])
    stream = FramedStream(8, bos_id=64, eos_id=65)
    batch = collate([other, sample], stream, 301, bins).tensors(CPU)
    torch.manual_seed(0)
    dual = DualLossModel(add_lora(model, LoraOptions(), "", torch.float32)).eval()
    decoded = ("text_ids", "codes", "positions", "places", "audio_rows", "audio_at")
    features = {key: tensor for key, tensor in batch.items() if key.startswith("feature")}
    with torch.no_grad():
        places = dual.decode(*(batch[key] for key in decoded), **features)
        hidden = dual.higgs.model.norm(places)[batch["places"]][1, : len(ids)]
        text = torch.nn.functional.linear(hidden, dual.higgs.text_lm_head.weight)
        audio = torch.nn.functional.linear(hidden, dual.higgs.audio_lm_head.weight)
    is_target = expected["audio_out_mask"][0, there]
    assert (text - expected["text_logits"][0, there]).abs().max() < 1e-4
    assert (audio[is_target].view(-1, 8, 66) - expected["audio_logits"]).abs().max() < 1e-4


def test_tower_ignores_what_follows_a_clip(tmp_path: Path) -> None:
    """With the attention used in training, for any values and any length of the padding."""
    geometry = tower_geometry(whisper_folder(tmp_path / "whisper"))
    torch.manual_seed(0)
    tower = AudioTower(WhisperConfig(**geometry, attn_implementation="sdpa")).eval()
    mel = torch.randn(1, geometry["num_mel_bins"], 100)
    length = torch.tensor([53])
    other = mel.clone()
    other[:, :, 55:] = 9
    with torch.no_grad():
        whole, changed, cut = tower(mel, length), tower(other, length), tower(mel[:, :, :56], length)
    assert (whole - changed)[:, :13].abs().max() < 1e-6
    assert (whole[:, :13] - cut[:, :13]).abs().max() < 1e-6
    assert (whole - changed)[:, 14:].abs().max() > 0.1


def test_features_are_those_of_the_extractor(tmp_path: Path) -> None:
    """For a clip of three stretches with a short last one. Stored features equal those that are read back."""
    waveform = torch.cat([read_audio(AudioClip(VOICES / f"anna_0{i}.flac"), 16000) for i in range(2)])[: 16000 * 5 // 2]
    write_audio(tmp_path / "long.wav", waveform, 16000)
    clip = AudioClip(tmp_path / "long.wav")
    hearing = MelFeatureStore(80, 1, 25, tmp_path)
    num_frames = 63
    hearing.store("ab" * 32, clip, num_frames)
    features = hearing.load("ab" * 32)
    assert features is not None
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    pieces = np.split(read_audio(clip, 16000).numpy(), [16000, 32000])
    expected = extractor(pieces, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
    assert [one.length for one in features] == expected["attention_mask"].sum(1).tolist() == [100, 100, 50]
    for one, values in zip(features, expected["input_features"], strict=True):
        width = one.values.shape[1]
        assert one.length <= width <= 100
        torch.testing.assert_close(one.values.float(), values[:, :width], rtol=1e-3, atol=1e-3)
    outputs = hearing.num_outputs(len(waveform), num_frames)
    assert outputs == hearing.kept_outputs("ab" * 32) == tuple(one.num_outputs for one in features) == (25, 25, 12)
    assert hearing.stretches(num_frames, outputs) == [Stretch(25, 25), Stretch(25, 25), Stretch(12, 13)]
    assert hearing.stretches(num_frames, ()) == []
    hearing.path("ab" * 32).write_bytes(b"\0" * 64)
    assert hearing.load("ab" * 32) is None
    assert hearing.kept_outputs("ab" * 32) is None


def test_stretches_in_the_prompt(base: Path) -> None:
    """Each stretch has its marks, outputs and codes, as in the original; a clip without stretches stays whole."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    clip = AudioClip(Path("a.wav"))
    segments = [Segment("<|audio_bos|>", False), Segment("<|AUDIO|>", False, clip), Segment("<|audio_eos|>", False)]
    heard = [[Stretch(3, 4), Stretch(1, 2)]]
    prompt = tokenize(iter(segments), [6], tokenizer, STREAM, heard)
    delay = "<|reserved_special_token_6|>" * 7
    pieces = [
        "<|audio_bos|>" + "<|AUDIO|>" * outputs + "<|AUDIO_OUT|>" * (frames + 2) + delay + "<|audio_eos|>"
        for outputs, frames in ((3, 4), (1, 2))
    ]
    assert prompt.input_ids == tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    audio_in = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert prompt.heard_columns == [i for i, token in enumerate(prompt.input_ids) if token == audio_in]
    assert len(prompt.audio_columns) == 6 + 4 + 14
    assert prompt.target_clips == [False, False]
    plain = tokenize(iter(segments), [6], tokenizer, STREAM)
    assert plain.input_ids == tokenize(iter(segments), [6], tokenizer, STREAM, [[]]).input_ids
    assert plain.heard_columns == []


def sample_of(base: Path, heard: bool) -> EncodedSample:
    """A sample with a reference clip in a user turn, encoded by the tower if `heard`, and a target."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    clip = AudioClip(Path("a.wav"))
    segments = [
        Segment("<|begin_of_text|>Who? <|audio_bos|>", False), Segment("", False, clip),
        Segment("<|audio_eos|>", False), Segment("<|audio_out_bos|>", True), Segment("", True, clip),
        Segment("<|audio_eos|><|eot_id|>", True),
    ]  # fmt: skip
    prompt = tokenize(iter(segments), [5, 9], tokenizer, STREAM, [[Stretch(5, 5)] if heard else [], []])
    draw = torch.Generator().manual_seed(1)
    codes = [torch.randint(1024, (8, n), generator=draw) for n in (5, 9)]
    mel = torch.randn(16, 24, generator=draw)
    return EncodedSample(prompt, codes, [MelFeatures(mel, 20)] if heard else [])


def outputs(higgs: object, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the last hidden states."""
    torch.manual_seed(0)
    dual = DualLossModel(add_lora(higgs, LoraOptions(), "", torch.float32)).eval()  # type: ignore[arg-type]
    caught = []
    dual.higgs.model.norm.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    with torch.no_grad():
        losses, *_ = dual(**batch, target_weights=torch.ones(9))
    return losses.sum(), caught[0]


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("kind", ["attention", "tower", "both"])
def test_added_parts_change_nothing_at_first(base: Path, tmp_path: Path, kind: str, heard: bool) -> None:
    """Loss and inputs of the heads are the same. The tower's places then have the effect of zero embeddings."""
    whisper = whisper_folder(tmp_path / "whisper")
    added = Parts(kind != "tower", tower_geometry(whisper) if kind != "attention" else None)
    heard = heard and kind != "attention"
    batch = collate([sample_of(base, heard), sample_of(base, False)], STREAM, 257, 16 if added.audio_tower else None)
    plain = load_base(base, torch.float32)
    if heard:
        plain.model.embed_tokens.weight[plain.config.audio_token_id - 1] = 0
    native = {name: tensor for name, tensor in batch.tensors(CPU).items() if not name.startswith("feature")}
    expected_loss, expected = outputs(plain, native)
    extended = load_base(base, torch.float32, added)
    torch.manual_seed(5)
    assert isinstance(extended, ExtendedModel)
    extended.add_parts(added, whisper)
    loss, found = outputs(extended, batch.tensors(CPU))
    assert (loss - expected_loss).abs() < 1e-6
    assert (found - expected).abs().max() < 1e-6
    own = [name for name, _ in extended.named_parameters() if added.has(name) and "lora" not in name]
    assert len(own) == (4 + 1) * 2 * added.audio_self_attention + (0 if added.audio_tower is None else 39)


def test_folder_must_be_a_whisper_model(base: Path) -> None:
    with pytest.raises(InputError, match=r"--whisper_ckpt .*model_type is 'higgs_audio_v2'; the tower is made from"):
        tower_geometry(base)


@pytest.mark.usefixtures("lone_rank")
def test_tower_without_input_is_refused(mixed_manifest: Path, ds_file: Callable[[int], Path], tmp_path: Path) -> None:
    """No sample of this manifest has audio in a system or user turn, the input of the tower."""
    line = (
        f"--deepspeed {ds_file(2)} --train_manifest {mixed_manifest} --output_dir {tmp_path}/run --allow_text_targets"
    )
    options = [
        *line.split(),
        "--allow_text_targets",
        "--whisper_conditioning",
        "--whisper_ckpt",
        str(whisper_folder(tmp_path / "whisper")),
    ]
    with pytest.raises(InputError, match="--whisper_conditioning: no sample has audio in a system or user turn"):
        start(*parse_train_options(options), FolderLock())
    with pytest.raises(InputError, match="--sample_steps: cannot use the input of a Whisper tower"):
        start(*parse_train_options([*options, "--sample_steps", "2"]), FolderLock())
