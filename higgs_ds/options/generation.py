"""Checks of the options of launch/generate.py, before anything is opened."""

from __future__ import annotations

import re

from higgs_ds.options.commands import GenerateOptions, check_lora_scale

LAYOUT_TOKEN = re.compile(r"<\|[^|<>\s]*\|>")
LARGEST_SEED = 2**63


def check_generate_options(options: GenerateOptions) -> list[str]:
    """Return the problems of the options; empty if there are none. Files are not opened."""
    problems = _check_sources(options) + _check_sampling(options)
    problems += check_lora_scale(options.lora_scale, options.lora_adapter_path)
    given = [("text", options.text), ("scene", options.scene)]
    for name, text in [*given, *(("ref_text", text) for text in options.ref_text or ())]:
        problems += text_problems(f"--{name}", text)
    return problems


def text_problems(where: str, text: str) -> list[str]:
    """Return why a text cannot be a part of a prompt; empty if it can."""
    token = LAYOUT_TOKEN.search(text)
    return [f"{where}: contains {token[0]}, which the prompt layout adds itself; remove it"] if token else []


def _check_sources(options: GenerateOptions) -> list[str]:
    """Return the problems of what is to be spoken, and in which voices."""
    problems = []
    if options.text_file is not None and options.text:
        problems.append("--text and --text_file: give one of them")
    elif options.text_file is None and not options.text.strip():
        problems.append("--text: is empty; give the text to speak, or a file with it as --text_file")
    if options.each_line and options.text_file is None:
        problems.append("--each_line: needs --text_file, whose lines are spoken")
    clips, texts = options.ref_audio, options.ref_text
    if (clips is None) != (texts is None):
        problems.append("--ref_audio and --ref_text: give both, a reference clip and its text, or neither")
    elif len(clips or ()) != len(texts or ()):
        problems.append(
            f"--ref_audio and --ref_text: {len(clips or ())} clips and {len(texts or ())} texts; give a text for each "
            "clip, in quotes"
        )
    problems += [
        f"--ref_text {text!r}: is empty; give the words of its clip" for text in texts or () if not text.strip()
    ]
    if options.speaker is not None and clips is not None:
        problems.append("--speaker and --ref_audio: both choose the voice; give one of them")
    return problems


def _check_sampling(options: GenerateOptions) -> list[str]:
    problems = []

    def expect(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            problems.append(f"--{name} {getattr(options, name)}: must be {allowed}")

    expect("chunk_chars", options.chunk_chars >= 20, "20 or more")
    expect("chunk_context", options.chunk_context >= 0, "0 or more")
    expect("max_new_tokens", options.max_new_tokens is None or options.max_new_tokens >= 1, "1 or more")
    expect("temperature", options.temperature is None or 0 <= options.temperature < float("inf"), "0 or above")
    expect("top_k", options.top_k is None or options.top_k >= 1, "1 or more")
    expect("top_p", options.top_p is None or 0 < options.top_p <= 1, "above 0, up to 1")
    expect("seed", -LARGEST_SEED <= options.seed < LARGEST_SEED, "of 64 bits")
    if not options.temperature:
        given = "--temperature 0 takes the most likely codes" if options.temperature == 0 else "give a --temperature"
        problems += [
            f"--{name}: only applies to sampling, and needs --temperature above 0; {given}"
            for name in ("top_k", "top_p")
            if getattr(options, name) is not None
        ]
    return problems
