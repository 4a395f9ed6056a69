"""Spoken text as the base's generation example writes it: punctuation, units, sound tags."""

# ruff: noqa: RUF001 - these characters are meant

from __future__ import annotations

HALF_WIDTH = {
    "，": ", ", "。": ".", "：": ":", "；": ";", "？": "?", "！": "!", "、": ",", "·": ".", "…": "...", "—": "-",
    "（": "(", "）": ")", "【": "[", "】": "]", "《": "<", "》": ">",
    "“": '"', "”": '"', "「": '"', "」": '"', "『": '"', "』": '"', "‘": "'", "’": "'",
}  # fmt: skip
# Brackets are not spoken.
SPELLED = {"(": " ", ")": " ", "°F": " degrees Fahrenheit", "°C": " degrees Celsius"}
# One sound is <SE>, a stretch of sound lies between <SE_s> and <SE_e>. Early versions of the example opened humming
# with <SE> and closed it with <SE_e>; it was mended there: music and singing have always come in pairs.
SOUNDS = {
    "[laugh]": "<SE>[Laughter]</SE>",
    "[humming start]": "<SE_s>[Humming]</SE_s>",
    "[humming end]": "<SE_e>[Humming]</SE_e>",
    "[music start]": "<SE_s>[Music]</SE_s>",
    "[music end]": "<SE_e>[Music]</SE_e>",
    "[music]": "<SE>[Music]</SE>",
    "[sing start]": "<SE_s>[Singing]</SE_s>",
    "[sing end]": "<SE_e>[Singing]</SE_e>",
    "[applause]": "<SE>[Applause]</SE>",
    "[cheering]": "<SE>[Cheering]</SE>",
    "[cough]": "<SE>[Cough]</SE>",
}
ENDINGS = (".", "!", "?", ",", ";", '"', "'", "</SE_e>", "</SE>")
_SINGLE = str.maketrans(HALF_WIDTH)


def normalize_text(text: str) -> str:
    """The text as the base's example would hand it to the model; empty where nothing is left to be spoken."""
    text = text.translate(_SINGLE)
    for written, spoken in (SPELLED | SOUNDS).items():
        text = text.replace(written, spoken)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    text = "\n".join(line for line in lines if line)
    return text if not text or text.endswith(ENDINGS) else text + "."
