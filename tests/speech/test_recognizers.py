"""Speech recognizers of transformers: tiny ones of both kinds, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from higgs_ds.common.errors import InputError
from higgs_ds.speech.recognizers import open_recognizer, open_transcriber

SPECIAL = (
    "endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev", "nospeech",
    "notimestamps",
)  # fmt: skip
NOISE = torch.randn(24000, generator=torch.Generator().manual_seed(0))


def save_ctc(folder: Path) -> Wav2Vec2ForCTC:
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGH"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    config = Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16), conv_stride=(20, 16), conv_kernel=(20, 16), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(config)
    model.save_pretrained(folder)
    return model.eval()


def save_whisper(folder: Path) -> None:
    tokens = [*(chr(code) for code in range(33, 127)), "\u0120", *(f"<|{name}|>" for name in SPECIAL)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    WhisperTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    of = {name: tokens.index(f"<|{name}|>") for name in SPECIAL}
    ends = {"pad_token_id": of["endoftext"], "bos_token_id": of["endoftext"], "eos_token_id": of["endoftext"]}
    config = WhisperConfig(
        num_mel_bins=16, d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=48, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=48, max_source_positions=50, max_target_positions=30,
        vocab_size=len(tokens), decoder_start_token_id=of["startoftranscript"], **ends,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        is_multilingual=True, lang_to_id={f"<|{name}|>": of[name] for name in ("en", "de")},
        task_to_id={name: of[name] for name in ("transcribe", "translate")}, max_length=20,
        no_timestamps_token_id=of["notimestamps"], prev_sot_token_id=of["startofprev"],
        decoder_start_token_id=of["startoftranscript"], **ends,
    )  # fmt: skip
    model.save_pretrained(folder)


def test_ctc(tmp_path: Path) -> None:
    """The text is that of the most likely letters, with repetitions removed; --language changes nothing."""
    model = save_ctc(tmp_path)
    transcribe = open_transcriber(str(tmp_path), (), "en")
    inputs = Wav2Vec2FeatureExtractor()(NOISE.numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits.argmax(-1)
    expected = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).batch_decode(best)[0]
    assert transcribe(NOISE, 16000) == expected.strip()
    assert open_recognizer(str(tmp_path), ())(NOISE, 16000) == BasicTextNormalizer()(expected).split()


def test_whisper_takes_the_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_whisper(tmp_path)
    asked = []
    generate = WhisperForConditionalGeneration.generate
    monkeypatch.setattr(
        WhisperForConditionalGeneration, "generate",
        lambda self, *given, **named: asked.append(named.get("language")) or generate(self, *given, **named),
    )  # fmt: skip
    assert open_transcriber(str(tmp_path), (), "de")(NOISE[:14000], 16000)
    assert open_transcriber(str(tmp_path), ())(NOISE[:14000], 16000)
    assert asked == ["de", None]
    with pytest.raises(InputError, match=r"--language xx: is not a language of the recognizer .*; it has de, en"):
        open_transcriber(str(tmp_path), (), "xx")


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("en", "Mr. Brown's twenty-three dogs!", ["mister", "brown", "is", "23", "dogs"]),
        ("en-GB", "Twenty one.", ["21"]),
        ("English", "Twenty one.", ["21"]),
        ("de", "Zwanzig Äpfel, (lacht) nicht wahr?", ["zwanzig", "äpfel", "nicht", "wahr"]),
        (None, "Twenty one.", ["twenty", "one"]),
        ("enm", "Twenty one.", ["twenty", "one"]),
    ],
)
def test_words_are_those_of_whispers_normalizer(
    tmp_path: Path, language: str | None, text: str, words: list[str]
) -> None:
    """What is to be said is normalized like what a recognizer writes: numbers in digits, where the text is English."""
    save_whisper(tmp_path)
    assert open_recognizer(str(tmp_path), ()).words_in(text, language) == words


def test_a_model_of_english_alone(tmp_path: Path) -> None:
    save_whisper(tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text()) | {"is_multilingual": False}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert open_recognizer(str(tmp_path), ()).words_in("Twenty one.") == ["21"]
