"""Counting tokens by words gives what tokenizing the whole texts gives."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from higgs_ds.bases.builtin import ASSETS, DEFAULT_BASE
from higgs_ds.model import word_counts
from higgs_ds.model.word_counts import WordCounts, splits_at_spaces

WORDS = (
    "the and don't we'LL 's 12345 3.14 U.S.A. (paren) -- ... x_y 你好 日本 שלום naïve Ünï ½² ١٢٣ 😀 a\u0301 \u0301 "
    "\u200b <|x|> ' \u2019s <|AUDIO|> <|AUDIO|>, \u00a0 a\u3000b \x1c \t \n a\nb \r\n \x85 \u2028"
).split(" ")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def some_texts(count: int) -> list[str]:
    """Texts of the words above, the first ones more often, with a few double spaces and spaces at their ends."""
    draw = random.Random(0)
    weights = [3] * 25 + [0.2] * (len(WORDS) - 25)
    texts = [" ".join(draw.choices(WORDS, weights, k=draw.randrange(12))) for _ in range(count)]
    return [draw.choice(["", " "]) + text if draw.random() < 0.1 else text for text in texts]


def tokenizer_of(*splits: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> Tokenizer:
    """Train a tokenizer on the texts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splits[0] if len(splits) == 1 else pre_tokenizers.Sequence([*splits])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(some_texts(500), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|AUDIO|>"])
    return tokenizer


TOKENIZERS = {
    "built-in": lambda: Tokenizer.from_file(str(ASSETS / DEFAULT_BASE / "tokenizer.json")),
    "GPT-2": lambda: tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "Llama 3": lambda: tokenizer_of(
        pre_tokenizers.Split(Regex(word_counts._LLAMA_3), "isolated"), BYTES, ignore_merges=True
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_and_whole_texts_have_the_same_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_counts, "MAX_WORDS", 50)  # forgotten often
    tokenizer = TOKENIZERS[name]()
    assert splits_at_spaces(tokenizer)
    whole: list[str] = []

    def count(texts: Sequence[str]) -> list[int]:
        whole.extend(text for text in texts if " " in text[1:])
        return [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    counts = WordCounts(tokenizer, count)
    texts = [*some_texts(3000), "a" * 100, "<|AUDIO|>", ""]
    for start in range(0, len(texts), 20):
        batch = texts[start : start + 20]
        assert counts.count(batch) == [len(tokenizer.encode(text, add_special_tokens=False)) for text in batch]
    assert 0 < len(whole) < len(texts) / 2


def test_other_tokenizers_count_whole_texts() -> None:
    plain = TOKENIZERS["GPT-2"]()
    assert splits_at_spaces(plain)
    others = [TOKENIZERS["GPT-2"]() for _ in range(2)]
    others[0].normalizer = normalizers.Lowercase()
    others[1].model.dropout = 0.1
    others += [
        tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        tokenizer_of(BYTES),
        tokenizer_of(pre_tokenizers.Split(Regex(r"\w+\W*"), "isolated"), BYTES),
        Tokenizer(models.BPE()),
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ]
    assert not any(map(splits_at_spaces, others))
