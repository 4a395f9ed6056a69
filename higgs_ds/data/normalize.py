"""Write spoken text as the base's generation example does: punctuation, units, sound tags."""

# ruff: noqa: RUF001 - these characters are intended

from __future__ import annotations

HALF_WIDTH = {
    "，": ", ", "。": ".", "：": ":", "；": ";", "？": "?", "！": "!", "、": ",", "·": ".", "…": "...", "—": "-",
    "（": "(", "）": ")", "【": "[", "】": "]", "《": "<", "》": ">",
    "“": '"', "”": '"', "「": '"', "」": '"', "『": '"', "』": '"', "‘": "'", "’": "'",
}  # fmt: skip
# Brackets are not spoken.
SPELLED = {"(": " ", ")": " ", "°F": " degrees Fahrenheit", "°C": " degrees Celsius"}
# <SE> marks a single sound, <SE_s> and <SE_e> the start and end of a longer one. Early versions of the example opened
# humming with <SE> and closed it with <SE_e>. This was fixed there; music and singing have always had matching tags.
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
    """Return the text as the base's example passes it to the model; empty if nothing is left to speak."""
    text = text.translate(_SINGLE)
    for written, spoken in (SPELLED | SOUNDS).items():
        text = text.replace(written, spoken)
    lines = (" ".join(line.split()) for line in text.split("\n"))
    text = "\n".join(line for line in lines if line)
    return text if not text or text.endswith(ENDINGS) else text + "."
