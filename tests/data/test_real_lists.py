"""Lists and folders as the documentation of other trainers shows them, with other values: read without an option."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from test_corpora import write_tree
from test_formats import samples

from higgs_ds.data.formats.recognition import recognize


class Spoken(NamedTuple):
    """What a list says about a clip; paths are relative to the folder."""

    clip: str
    words: str
    speaker: str | None = None
    language: str | None = None


class Example(NamedTuple):
    """The files of an example, what is given to the trainer, its format, and what must be read."""

    files: dict[str, str]
    given: str
    format: str
    expected: list[Spoken]


HE, SHE = "He was here by noon.", "她说得对。"
EXAMPLES = {
    "NeMo": Example(
        {
            "manifest.json": f'{{"audio_filepath": "wavs/a.wav", "duration": 2.59, "text": "{HE}"}}\n'
            f'{{"audio_filepath": "wavs/b.wav", "duration": 1.5, "text": "{SHE}", "speaker": 12}}\n'
        },
        "manifest.json",
        "flat",
        [Spoken("wavs/a.wav", HE), Spoken("wavs/b.wav", SHE, "12")],
    ),
    "AudioFolder": Example(
        {
            "data/train/metadata.csv": f'file_name,transcription\nfirst.mp3,{HE}\nsecond.mp3,"{SHE}"\n',
            "data/train/first.mp3": "",
            "data/train/second.mp3": "",
        },
        ".",
        "audiofolder",
        [Spoken("data/train/first.mp3", HE), Spoken("data/train/second.mp3", SHE)],
    ),
    "VoxCPM": Example(
        {
            "train.jsonl": f'{{"audio": "a.wav", "text": "{HE}"}}\n'
            f'{{"audio": "b.wav", "text": "{SHE}", "duration": 3.5}}\n'
            f'{{"audio": "c.wav", "text": "{HE}", "dataset_id": 1}}\n'
        },
        "train.jsonl",
        "flat",
        [Spoken("a.wav", HE), Spoken("b.wav", SHE), Spoken("c.wav", HE)],
    ),
    "CosyVoice": Example(
        {
            "wav.scp": "19_198_000000_000000 LibriTTS/19/198/a.wav\n20_205_000000_000001 LibriTTS/20/205/b.wav\n",
            "text": f"19_198_000000_000000 {HE}\n20_205_000000_000001 {SHE}\n",
            "utt2spk": "19_198_000000_000000 19\n20_205_000000_000001 20\n",
            "spk2utt": "19 19_198_000000_000000\n20 20_205_000000_000001\n",
            "utt2embedding.pt": "",
            "parquet/parquet_000000000.tar": "PAR1",
        },
        ".",
        "kaldi",
        [Spoken("LibriTTS/19/198/a.wav", HE, "19"), Spoken("LibriTTS/20/205/b.wav", SHE, "20")],
    ),
    "Qwen3-TTS": Example(
        {
            "train_raw.jsonl": f'{{"audio":"./data/utt1.wav","text":"{SHE}","ref_audio":"./data/ref.wav"}}\n'
            f'{{"audio":"./data/utt2.wav","text":"{HE}","ref_audio":"./data/ref.wav"}}\n'
        },
        "train_raw.jsonl",
        "flat",
        [Spoken("data/utt1.wav", SHE), Spoken("data/utt2.wav", HE)],
    ),
    "F5-TTS": Example(
        {"metadata.csv": f"audio_file|text\nwavs/audio_1.wav|{HE}\nwavs/audio_2.wav|{SHE}\n", "wavs/audio_1.wav": ""},
        ".",
        "csv",
        [Spoken("wavs/audio_1.wav", HE), Spoken("wavs/audio_2.wav", SHE)],
    ),
    "OmniVoice": Example(
        {
            "data.jsonl": f'{{"id": "s_1", "audio_path": "audio/001.wav", "text": "{HE}", "language_id": "en"}}\n'
            f'{{"id": "s_2", "audio_path": "audio/002.wav", "text": "{SHE}", "language_id": "zh"}}\n'
        },
        "data.jsonl",
        "flat",
        [Spoken("audio/001.wav", HE, None, "en"), Spoken("audio/002.wav", SHE, None, "zh")],
    ),
    "fish-speech": Example(
        {
            "SPK1/21.15-26.44.lab": HE,
            "SPK1/21.15-26.44.mp3": "",
            "SPK1/21.15-26.44.npy": "",
            "SPK2/38.79-40.85.lab": SHE,
            "SPK2/38.79-40.85.mp3": "",
        },
        ".",
        "lab",
        [Spoken("SPK1/21.15-26.44.mp3", HE, "SPK1"), Spoken("SPK2/38.79-40.85.mp3", SHE, "SPK2")],
    ),
    "LJSpeech": Example(
        {
            "metadata.csv": f"LJ001-0001|He was here by 12.|{HE}\nLJ001-0002|He was here by noon|{HE}\n",
            "wavs/LJ001-0001.wav": "",
            "README": "",
        },
        ".",
        "list",
        [Spoken("wavs/LJ001-0001.wav", HE), Spoken("wavs/LJ001-0002.wav", HE)],
    ),
    "GPT-SoVITS": Example(
        {"my.list": f"output/slicer/a_0.wav|my|en|{HE}\noutput/slicer/a_1.wav|my|zh|{SHE}\n"},
        "my.list",
        "list",
        [Spoken("output/slicer/a_0.wav", HE, "my", "en"), Spoken("output/slicer/a_1.wav", SHE, "my", "zh")],
    ),
    "Common Voice": Example(
        {
            "train.tsv": "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tlocale\n"
            f"9f\tcommon_voice_en_1.mp3\t5a\t{HE}\t\t2\t0\t\ten\n"
        },
        "train.tsv",
        "csv",
        [Spoken("common_voice_en_1.mp3", HE, "9f", "en")],
    ),
    "StyleTTS 2": Example(
        {"train_list.txt": f"LJ022-0023.wav|{HE}|0\nLJ043-0030.wav|{SHE}|0\n"},
        "train_list.txt",
        "list",
        [Spoken("LJ022-0023.wav", HE, "0"), Spoken("LJ043-0030.wav", SHE, "0")],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_real_lists(tmp_path: Path, name: str) -> None:
    files, given, format_name, expected = EXAMPLES[name]
    path = write_tree(tmp_path, files) / given
    assert recognize(path) == format_name
    found = [
        Spoken(
            str(sample.clips[-1].path.relative_to(tmp_path)),
            str(sample.messages[-2].parts[0]),
            sample.speaker,
            sample.language,
        )
        for sample in samples(path)
    ]
    assert found == expected
    assert all(sample.clips[-1].duration_s is None for sample in samples(path))
