"""The words that the speech of a sample is trained to say: their number, their script, and what is like them."""

from __future__ import annotations

import hashlib
import math
import re
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from higgs_ds.data.quality import ClipQuality
from higgs_ds.model.sample import SPEAKER_TAG, USER, Message, Sample

_NO_WORD = re.compile(r"[\W_]+")
_NO_WORD_ASCII = bytes(code for code in range(128) if not chr(code).isalnum())
BANDS = (12, 24, 48)  # bytes at both ends of a text by which like ones are found
_STRUCT = struct.Struct("<qqiifffb6I")
UNKNOWN = -1

# Languages that are written in one script, by ISO 639-1 and 639-3 codes and English names. Others are not judged.
_LANGUAGES = {
    "CYRILLIC": "ru rus russian uk ukr ukrainian be bel belarusian bg bul bulgarian mk mkd macedonian",
    "GREEK": "el ell greek",
    "HEBREW": "he heb hebrew yi yid yiddish",
    "ARABIC": "ar ara arb arabic fa fas pes persian farsi ur urd urdu ps pus pashto",
    "DEVANAGARI": "hi hin hindi mr mar marathi ne nep npi nepali",
    "BENGALI": "bn ben bengali bangla as asm assamese",
    "TAMIL": "ta tam tamil",
    "TELUGU": "te tel telugu",
    "KANNADA": "kn kan kannada",
    "MALAYALAM": "ml mal malayalam",
    "GUJARATI": "gu guj gujarati",
    "SINHALA": "si sin sinhala",
    "THAI": "th tha thai",
    "LAO": "lo lao",
    "MYANMAR": "my mya burmese",
    "KHMER": "km khm khmer",
    "GEORGIAN": "ka kat georgian",
    "ARMENIAN": "hy hye armenian",
    "ETHIOPIC": "am amh amharic ti tir tigrinya",
    "HANGUL CJK": "ko kor korean",
    "HIRAGANA KATAKANA CJK": "ja jpn japanese",
    "CJK BOPOMOFO": "zh zho cmn chinese mandarin yue cantonese",
    "LATIN": "en eng english de deu german fr fra french es spa spanish it ita italian pt por portuguese nl nld dutch "
    "pl pol polish cs ces czech sk slk slovak sl slv slovenian hr hrv croatian sv swe swedish da dan danish no nor nb "
    "nob nn nno norwegian fi fin finnish is isl icelandic et est estonian lv lav latvian lt lit lithuanian hu hun "
    "hungarian ro ron romanian tr tur turkish vi vie vietnamese id ind indonesian tl tgl tagalog fil filipino sw swa "
    "swahili cy cym welsh ga gle irish ca cat catalan eu eus basque gl glg galician sq sqi albanian af afr afrikaans "
    "mt mlt maltese",
}
_SCRIPTS_OF = {name: frozenset(scripts.split()) for scripts, names in _LANGUAGES.items() for name in names.split()}
SCRIPTS = sorted({script for scripts in _SCRIPTS_OF.values() for script in scripts})


class SpokenText(NamedTuple):
    """What is known about the words of a sample and the speech that says them."""

    audio: int  # of the last clip that is a target: see `ClipQuality`
    words: int  # equal for texts that differ at most in case, spaces and punctuation
    num_chars: int  # letters and digits; UNKNOWN if not all speech to train is said to have words
    num_bytes: int  # of these in UTF-8
    speech_s: float  # of all targets, without the silence at their ends
    level_dbfs: float  # of all targets; 0 if there are none
    script_share: float  # of the letters, in the scripts of the language; 1 if these are not known
    script: int  # most frequent one, an index into SCRIPTS, or UNKNOWN
    ends: tuple[int, ...]  # of the first and last bytes, for each of BANDS

    def packed(self) -> bytes:
        """Return the values in the layout of TEXT."""
        return _STRUCT.pack(*self[:-1], *self.ends)


# The same values in an array.
TEXT = np.dtype(
    [
        ("audio", "<i8"), ("words", "<i8"), ("num_chars", "<i4"), ("num_bytes", "<i4"), ("speech_s", "<f4"),
        ("level_dbfs", "<f4"), ("script_share", "<f4"), ("script", "i1"),
        *((f"ends_{size}", "<u4", 2) for size in BANDS),
    ]
)  # fmt: skip


NO_QUALITY = (b"", bytes(TEXT.itemsize))


@dataclass(frozen=True)
class SampleQuality:
    """Measurements of all clips of a sample, and of its words."""

    clips: tuple[ClipQuality, ...]
    text: SpokenText

    def row(self) -> tuple[bytes, bytes]:
        return b"".join(clip.packed() for clip in self.clips), self.text.packed()


def examine_sample(sample: Sample, clips: Sequence[ClipQuality]) -> SampleQuality:
    """Describe a sample, given the measurements of all its clips."""
    words, numbers = _targets_of(sample)
    targets = [clips[number] for number in numbers]
    content = normalized(words or "")
    share, script = script_share(sample.language, words or "")
    text = SpokenText(
        audio=targets[-1].audio if targets else 0,
        words=int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True),
        num_chars=UNKNOWN if words is None else len(content.decode(errors="surrogatepass")),
        num_bytes=len(content),
        speech_s=sum(clip.speech_s for clip in targets),
        level_dbfs=_mean_level(targets),
        script_share=share,
        script=script,
        ends=tuple([zlib.crc32(end) for size in BANDS for end in (content[:size], content[-size:])]),
    )
    return SampleQuality(tuple(clips), text)


def words_of(sample: Sample) -> str:
    """Return the words of all turns that are trained to speak, "" if these are not known."""
    return _targets_of(sample)[0] or ""


def _targets_of(sample: Sample) -> tuple[str | None, list[int]]:
    """Return the words of the turns that are trained to speak, and the numbers of their clips.

    The words are those of the user turns before them. They are None if any of these turns mixes text and audio.
    """
    words: list[str] = []
    numbers: list[int] = []
    is_known, number = True, 0
    before: Message | None = None  # user turn whose words are not used yet
    has_before = False
    for turn, message in enumerate(sample.messages):
        num_clips = len(message.clips)
        if message.role == USER:
            before, has_before = message, not num_clips
        elif num_clips and sample.is_target(turn):
            is_known &= has_before and num_clips == len(message.parts)
            numbers += range(number, number + num_clips)
            words += [part for part in before.parts if isinstance(part, str)] if before else []
            before = None  # the next turns of speech say the same words
        number += num_clips
    text = " ".join(words)
    return (SPEAKER_TAG.sub(" ", text) if "[" in text else text) if is_known and numbers else None, numbers


def normalized(text: str) -> bytes:
    """Return the letters and digits of a text, in lower case, in UTF-8."""
    if text.isascii():
        return text.lower().encode().translate(None, _NO_WORD_ASCII)
    return _NO_WORD.sub("", text.casefold()).encode(errors="surrogatepass")


def _mean_level(clips: Sequence[ClipQuality]) -> float:
    if len(clips) < 2:
        return clips[0].level_dbfs if clips else 0.0
    power = sum(clip.speech_s * 10 ** (clip.level_dbfs / 10) for clip in clips)
    return 10 * math.log10(power / sum(clip.speech_s for clip in clips))


def script_share(language: str | None, text: str) -> tuple[float, int]:
    """Return the share of a text's letters in the scripts of its language, and its most frequent script."""
    expected = _scripts_of(language) if language else None
    if expected is None:
        return 1.0, UNKNOWN
    if text.isascii() and "LATIN" in expected:
        return 1.0, SCRIPTS.index("LATIN")
    counts: Counter[str] = Counter()
    for char, count in Counter(text).items():
        counts[_script(char)] += count
    del counts[""]
    if not counts:
        return 1.0, UNKNOWN
    share = sum(counts[script] for script in expected) / counts.total()
    return share, SCRIPTS.index(counts.most_common(1)[0][0])


@lru_cache
def _scripts_of(language: str) -> frozenset[str] | None:
    return _SCRIPTS_OF.get(primary_language(language))


def primary_language(label: str) -> str:
    """Return the language of a label without its region, in lower case; a label with a script is no language's own."""
    first, *rest = re.split(r"[-_]", label.strip().casefold())
    return label if any(len(part) == 4 and part.isalpha() for part in rest) else first


@lru_cache(maxsize=1 << 14)
def _script(char: str) -> str:
    """Return the script of a letter, the first word of its Unicode name, or "" for any other character."""
    if not char.isalpha():
        return ""
    name = unicodedata.name(unicodedata.normalize("NFKC", char)[0], "").partition(" ")[0]
    return name if name in SCRIPTS else ""
