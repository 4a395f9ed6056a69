"""Normalized text compared with a table of the rules of the base's generation example."""

# ruff: noqa: RUF001 - these characters are intended

from __future__ import annotations

import pytest

from higgs_ds.data.normalize import normalize_text

TABLE = [
    ("Good morning.", "Good morning."),
    ("Good morning", "Good morning."),
    ("Really?", "Really?"),
    ("Well,", "Well,"),
    ("He said: 'yes'", "He said: 'yes'"),
    ("One:", "One:."),
    ("今天天气很好，我们走吧。", "今天天气很好, 我们走吧."),
    ("“你好”！真的…", '"你好"!真的...'),
    ("（安静）《书》、一·二；三：四—五", "安静 <书>,一.二;三:四-五."),
    ("『一』「二」‘三’", '"一""二"\'三\''),
    ("a (quiet) word", "a quiet word."),
    ("It is 20°C, or 68°F.", "It is 20 degrees Celsius, or 68 degrees Fahrenheit."),
    ("  one\t two \n\n  three  ", "one two\nthree."),
    ("[SPEAKER0] Hi.\n[SPEAKER1] Hello", "[SPEAKER0] Hi.\n[SPEAKER1] Hello."),
    ("Ha [laugh]", "Ha <SE>[Laughter]</SE>"),
    ("【laugh】 Ha", "<SE>[Laughter]</SE> Ha."),
    ("[humming start] la la [humming end]", "<SE_s>[Humming]</SE_s> la la <SE_e>[Humming]</SE_e>"),
    ("[music start] la [music end] [music]", "<SE_s>[Music]</SE_s> la <SE_e>[Music]</SE_e> <SE>[Music]</SE>"),
    ("[sing start] la [sing end]", "<SE_s>[Singing]</SE_s> la <SE_e>[Singing]</SE_e>"),
    ("[applause][cheering][cough]", "<SE>[Applause]</SE><SE>[Cheering]</SE><SE>[Cough]</SE>"),
    ("[unknown sound]", "[unknown sound]."),
    ("", ""),
    (" () ", ""),
]


@pytest.mark.parametrize(("written", "spoken"), TABLE)
def test_table(written: str, spoken: str) -> None:
    assert normalize_text(written) == spoken


@pytest.mark.parametrize("written", [written for written, _ in TABLE])
def test_once_is_enough(written: str) -> None:
    assert normalize_text(normalize_text(written)) == normalize_text(written)


def test_every_sound_opens_and_closes_alike() -> None:
    for sound in ("humming", "music", "sing"):
        text = normalize_text(f"[{sound} start] la [{sound} end]")
        assert text.count("<SE_s>") == text.count("</SE_s>") == text.count("<SE_e>") == text.count("</SE_e>") == 1
        assert "<SE>" not in text
