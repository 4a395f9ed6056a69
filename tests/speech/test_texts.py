"""Texts to speak: files and lines, and long texts in chunks."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from higgs_ds.common.errors import InputError
from higgs_ds.options.commands import GenerateOptions
from higgs_ds.options.generation import check_generate_options
from higgs_ds.speech.texts import chunks_of, texts_to_speak

WORDS = [
    "Dr", "a", "the", "e.g.", "3.50", "J.", "said", "No!", "why?", "end.", "\u201cyes.\u201d", "(so.)", "clause,",
    "half;", "[SPEAKER0]", "[SPEAKER1]", "[laugh]", "\u4eca\u5929\u5f88\u597d\u3002", "\u597d\uff0c", "x" * 45, "\n",
    "\n\n",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "longest", "expected"),
    [
        ("One. Two. Three. Four.", 20, ["One. Two.", "Three. Four."]),
        ("One. Two. Three. Four.", 22, ["One. Two. Three. Four."]),
        ("It cost 3.50, said J. R. Smith. He left.", 35, ["It cost 3.50, said J. R. Smith.", "He left."]),
        ("He said \u201cNo.\u201d Then he left us.", 20, ["He said \u201cNo.\u201d", "Then he left us."]),
        ("It is e.g. this. And so on.", 20, ["It is e.g. this.", "And so on."]),
        ("A clause, a clause, and no end of it", 20, ["A clause, a clause,", "and no end of it"]),
        ("Title\n\nA line\nof text here.", 20, ["Title", "A line\nof text here."]),
        ("\u4eca\u5929\u5f88\u597d\u3002" * 6, 20, ["\u4eca\u5929\u5f88\u597d\u3002" * 3] * 2),
        ("x" * 50, 20, ["x" * 20, "x" * 20, "x" * 10]),
        (
            "[SPEAKER1] One, two, three. Four, five. [SPEAKER0] Six.",
            30,
            ["[SPEAKER1] One, two, three.", "[SPEAKER1] Four, five. [SPEAKER0] Six."],
        ),
    ],
)  # fmt: skip
def test_where_a_text_is_cut(text: str, longest: int, expected: list[str]) -> None:
    assert chunks_of(text, longest) == expected


def said_by(text: str) -> list[tuple[str, str]]:
    """Return each letter with the last speaker tag before it, without tags and white space."""
    found, speaker = [], ""
    for part in re.split(r"(\[SPEAKER\d\])", text):
        speaker = part if part.startswith("[SPEAKER") else speaker
        found += [(speaker, letter) for letter in part if part != speaker and not letter.isspace()]
    return found


def test_nothing_is_lost_and_nothing_is_too_long() -> None:
    """Each chunk alone says of every letter who speaks it, as the whole text does."""
    draw = random.Random(1)
    for _ in range(300):
        text = " ".join(["Begin.", *draw.choices(WORDS, k=draw.randint(0, 60))])
        longest = draw.randint(20, 90)
        chunks = chunks_of(text, longest)
        assert [letter for chunk in chunks for letter in said_by(chunk)] == said_by(text)
        assert all(len(c) <= longest + len("[SPEAKER0] ") or len(said_by(c)) <= longest for c in chunks)
        assert all(chunk.strip() == chunk for chunk in chunks)
        assert all(said_by(chunk) for chunk in chunks[:-1])  # the text may end in a tag


def options_of(folder: Path, content: str | bytes, **values: bool) -> GenerateOptions:
    (folder / "text.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return GenerateOptions(text_file=folder / "text.txt", output=folder / "out.wav", **values)


def test_files(tmp_path: Path) -> None:
    text = "\ufeffOne.\r\n\n Two. \n" + "\n" * 7 + "\u4e8c"
    assert texts_to_speak(options_of(tmp_path, text)) == {tmp_path / "out.wav": text[1:]}
    lines = texts_to_speak(options_of(tmp_path, text, each_line=True))
    assert lines == {
        tmp_path / f"out-{number}.wav": line for number, line in (("01", "One."), ("03", "Two."), ("11", "\u4e8c"))
    }
    assert texts_to_speak(GenerateOptions(text=" Hi. ")) == {Path("speech.wav"): "Hi."}


@pytest.mark.parametrize("each_line", [False, True])
def test_files_that_are_refused(tmp_path: Path, each_line: bool) -> None:
    for content, reason in (
        (" \n\n", "is empty"),
        (b"caf\xe9", "is not UTF-8"),
        ("Hi.\nNo <|eot_id|>.", "contains <|eot_id|>, which the prompt layout adds itself"),
        (b"a" * ((10 << 20) + 1), "has more than 10 MiB"),
    ):
        with pytest.raises(InputError, match=re.escape(reason)):
            texts_to_speak(options_of(tmp_path, content, each_line=each_line))
    for path, reason in ((tmp_path, "is not a file"), (tmp_path / "none", "No such file"), ("/dev/zero", "not a file")):
        with pytest.raises(InputError, match=reason):
            texts_to_speak(GenerateOptions(text_file=Path(path)))


def test_all_bad_options_at_once() -> None:
    clip = Path("a.wav")
    bad = GenerateOptions(
        text="<|AUDIO|>", text_file=clip, chunk_chars=19, chunk_context=-1, ref_audio=(clip, clip), ref_text=(" ",),
        speaker=("anna",), scene="<|scene_desc_end|>", max_new_tokens=0, temperature=-1.0, top_k=0, top_p=0.0,
        seed=2**63, lora_scale=0.5,
    )  # fmt: skip
    starts = [
        "--text and --text_file: give one", "--ref_audio and --ref_text: 2 clips and 1 texts",
        "--ref_text ' ': is empty", "--speaker and --ref_audio: ", "--chunk_chars 19: ", "--chunk_context -1: ",
        "--max_new_tokens 0: ", "--temperature -1.0: ", "--top_k 0: ", "--top_p 0.0: ", "--seed ",
        "--lora_scale 0.5: needs", "--text: contains <|AUDIO|>", "--scene: contains <|scene_desc_end|>",
    ]  # fmt: skip
    for start, problem in zip(starts, check_generate_options(bad), strict=True):
        assert problem.startswith(start)
    assert check_generate_options(GenerateOptions(text="Hi. [laugh] a < b | c > d")) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"top_k": 5}, "--top_k: only applies to sampling, and needs --temperature above 0; give a --temperature"),
        ({"top_p": 0.5, "temperature": 0.0}, "--top_p: only applies to sampling, .* --temperature 0 takes the most"),
        ({"text": ""}, "--text: is empty"),
        ({"each_line": True}, "--each_line: needs --text_file"),
        ({"ref_text": ("Hi.",)}, "--ref_audio and --ref_text: give both"),
        ({"temperature": float("nan")}, "--temperature nan: must be"),
    ],
)
def test_contradictions(values: dict[str, Any], problem: str) -> None:
    (found,) = check_generate_options(GenerateOptions(**({"text": "Hi."} | values)))
    assert re.match(problem, found)
