"""Folders as known corpora lay them out: read without an option, with their speakers, and never a test set unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_formats import ROWS, WORDS, expect_faults, faults, plain, samples, write_lines, write_parquet

from higgs_ds.data.formats.recognition import recognize
from higgs_ds.model.sample import Sample


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Write text files, and empty files in place of audio, below a folder."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def spoken_in(root: Path, audio: str, words: str, text: str, speaker: str | None) -> Sample:
    """The sample of an audio file whose words are in a text file of its own."""
    return plain(str(root / audio), root / audio, words, speaker, text_files=(root / text,))


# LibriTTS

LIBRITTS = {
    "SPEAKERS.txt": "; ID |SEX",
    "train-clean-100/19/198/19_198.book.tsv": "",
    "train-clean-100/19/198/19_198_000000_000000.wav": "",
    "train-clean-100/19/198/19_198_000000_000000.original.txt": "Dr. Who",
    "train-clean-100/19/198/19_198_000000_000000.normalized.txt": "Doctor Who",
    "train-clean-100/19/198/19_198_000000_000002.wav": "",
    "train-clean-100/19/198/19_198_000000_000002.original.txt": "Two.",
    "train-other-500/20/205/20_205_000000_000001.wav": "",
    "train-other-500/20/205/20_205_000000_000001.normalized.txt": "Three.\n",
}


def test_libritts(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "LibriTTS", LIBRITTS)
    clip, other = "train-clean-100/19/198/19_198_000000_00000", "train-other-500/20/205/20_205_000000_000001"
    expected = [
        spoken_in(root, f"{clip}0.wav", "Doctor Who", f"{clip}0.normalized.txt", "19"),
        spoken_in(root, f"{clip}2.wav", "Two.", f"{clip}2.original.txt", "19"),
        spoken_in(root, f"{other}.wav", "Three.", f"{other}.normalized.txt", "20"),
    ]
    assert recognize(root) == "libritts"
    assert samples(root) == samples(tmp_path) == expected
    for below in ("train-clean-100", "train-clean-100/19", "train-clean-100/19/198"):
        assert samples(root / below) == expected[:2]


def test_libritts_with_names_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speaker is a folder's name if the file begins with it, also where only that speaker's folder is given."""
    files = {"anna/c1/anna_c1_x.flac": "", "anna/c1/anna_c1_x.normalized.txt": WORDS}
    files |= {"anna/c1/other.flac": "", "anna/c1/other.normalized.txt": WORDS}
    write_tree(tmp_path, files)
    assert [sample.speaker for sample in samples(tmp_path)] == ["anna", None]
    monkeypatch.chdir(tmp_path / "anna" / "c1")
    assert [sample.speaker for sample in samples(Path())] == ["anna", None]


def test_libritts_faults(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "1_1_0_0.wav": "",
            "1_1_0_0.normalized.txt": " ",
            "1_1_0_1.wav": "",
            "1_1_0_2.normalized.txt": WORDS,
            "1_1_0_3.flac": "",
            "1_1_0_3.wav": "",
            "1_1_0_3.normalized.txt": WORDS,
        },
    )
    expected = [
        "/1_1_0_0.wav: transcript: is empty or blank",
        "/1_1_0_1.wav: transcript: there is no .normalized.txt or .original.txt file of the same name",
        "/1_1_0_3.wav: audio: there are several audio files of this name",
        "/1_1_0_2.normalized.txt: audio: there is no audio file of the same name",
    ]
    expect_faults(root, expected)


# LibriSpeech

LIBRISPEECH = {
    "SPEAKERS.TXT": "",
    "train-clean-100/84/121123/84-121123-0000.flac": "",
    "train-clean-100/84/121123/84-121123-0001.flac": "",
    "train-clean-100/84/121123/84-121123.trans.txt": "84-121123-0000 GO\n84-121123-0001 DO YOU HEAR\n",
    "train-clean-100/84/121550/84-121550-0000.flac": "",
    "train-clean-100/84/121550/84-121550.trans.txt": "84-121550-0000 NO",
}


def test_librispeech(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "LibriSpeech", LIBRISPEECH)
    folder = root / "train-clean-100" / "84"
    expected = [
        plain(
            f"{folder / chapter}/84-{chapter}.trans.txt:{line}", folder / chapter / f"84-{chapter}-{clip}", words, "84"
        )
        for chapter, line, clip, words in (
            ("121123", 1, "0000.flac", "GO"),
            ("121123", 2, "0001.flac", "DO YOU HEAR"),
            ("121550", 1, "0000.flac", "NO"),
        )
    ]
    assert recognize(root) == "librispeech"
    assert samples(root) == samples(tmp_path) == expected
    assert samples(folder / "121550") == expected[2:]


def test_librispeech_resampled_to_wav(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"a/b/a-b.trans.txt": f"a-b-1 {WORDS}\n\n", "a/b/a-b-1.wav": ""})
    assert samples(root) == [plain(f"{root}/a/b/a-b.trans.txt:1", root / "a/b/a-b-1.wav", WORDS, "a")]


def test_librispeech_faults(tmp_path: Path) -> None:
    lines = "1-2-0 A\n1-2-1 B\n1-2-0 C\n1-2-2\n1-2-3 D\n"
    files = {f"1-2-{name}": "" for name in ("0.flac", "2.flac", "3.flac", "3.wav", "4.flac")}
    root = write_tree(tmp_path, {"1-2.trans.txt": lines} | files)
    expected = [
        "/1-2.trans.txt:2: audio: there must be one audio file '1-2-1' beside this file; found none",
        "/1-2.trans.txt:3: line: '1-2-0' has a line before",
        "/1-2.trans.txt:4: transcript: is empty or blank",
        "/1-2.trans.txt:5: audio: there must be one audio file '1-2-3' beside this file; found 1-2-3.flac, 1-2-3.wav",
        "/1-2-4.flac: transcript: no .trans.txt file of this folder has a line for it",
    ]
    expect_faults(root, expected)


@pytest.mark.parametrize("files", [LIBRITTS, LIBRISPEECH], ids=["LibriTTS", "LibriSpeech"])
def test_other_splits_are_not_read_with_the_training_data(tmp_path: Path, files: dict[str, str]) -> None:
    write_tree(tmp_path, files)
    num_training = len(samples(tmp_path))
    write_tree(tmp_path, {name.replace("train-", "dev-"): text for name, text in files.items() if "/" in name})
    expected = "folder: contains data of these splits: dev (dev-clean-100), train (train-clean-100); give the folder"
    expect_faults(tmp_path, [f": {expected}"])
    assert len(samples(tmp_path / "train-clean-100")) == len(samples(tmp_path / "dev-clean-100")) <= num_training


# VCTK


def test_vctk(tmp_path: Path) -> None:
    """Version 0.92: both microphones, each a recording."""
    root = write_tree(
        tmp_path,
        {
            "speaker-info.txt": "ID  AGE",
            "txt/p225/p225_001.txt": "Please call Stella.\n",
            "txt/p280/p280_001.txt": WORDS,
            "wav48_silence_trimmed/log.txt": "",
            "wav48_silence_trimmed/p225/p225_001_mic1.flac": "",
            "wav48_silence_trimmed/p225/p225_001_mic2.flac": "",
            "wav48_silence_trimmed/p280/p280_001_mic1.flac": "",
        },
    )
    audio, stella = "wav48_silence_trimmed/p225/p225_001_mic", "Please call Stella."
    assert recognize(root) == "vctk"
    assert samples(root) == [
        spoken_in(root, f"{audio}1.flac", stella, "txt/p225/p225_001.txt", "p225"),
        spoken_in(root, f"{audio}2.flac", stella, "txt/p225/p225_001.txt", "p225"),
        spoken_in(root, "wav48_silence_trimmed/p280/p280_001_mic1.flac", WORDS, "txt/p280/p280_001.txt", "p280"),
    ]


def test_vctk_first_version(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"txt/s5/s5_001.txt": WORDS, "wav48/s5/s5_001.wav": ""})
    assert samples(root) == [spoken_in(root, "wav48/s5/s5_001.wav", WORDS, "txt/s5/s5_001.txt", "s5")]


def test_vctk_faults(tmp_path: Path) -> None:
    """The texts of p315 are lost in version 0.92: one fault, not one for each of its recordings."""
    root = write_tree(
        tmp_path,
        {
            "txt/p225/p225_001.txt": WORDS,
            "txt/p225/p225_002.txt": WORDS,
            "txt/p362/p362_001.txt": WORDS,
            "wav48/p225/p225_001_mic1.flac": "",
            "wav48/p225/p225_003_mic1.flac": "",
            "wav48/p315/p315_001_mic1.flac": "",
            "wav48/p315/p315_001_mic2.flac": "",
        },
    )
    expected = [
        f"/wav48/p225/p225_003_mic1.flac: transcript: there is no {root}/txt/p225/p225_003.txt",
        f"/txt/p225/p225_002.txt: audio: there is no recording of it in {root}/wav48/p225",
        f"/wav48/p315: transcript: there is no folder {root}/txt/p315 with the texts of its 2 recordings",
        "/txt/p362: audio: there is no folder of recordings for its 1 texts in wav48",
    ]
    expect_faults(root, expected)
    write_tree(root, {"wav48_silence_trimmed/p225/p225_001_mic1.flac": ""})
    expect_faults(
        root, [": folder: must contain txt and one folder of audio, such as wav48; found wav48, wav48_silence"]
    )


# .lab


def test_lab(tmp_path: Path) -> None:
    """As fish-speech shows it: the names have dots."""
    files = {"SPK1/21.15-26.44": "One.", "SPK1/27.51-29.98": "Two.\n", "SPK2/38.79-40.85": "Three."}
    write_tree(tmp_path, {f"{name}.lab": text for name, text in files.items()} | {f"{name}.mp3": "" for name in files})
    assert recognize(tmp_path) == "lab"
    assert samples(tmp_path) == [
        spoken_in(tmp_path, f"{name}.mp3", text.strip(), f"{name}.lab", name[:4]) for name, text in files.items()
    ]


def test_lab_without_folders_of_speakers(tmp_path: Path) -> None:
    write_tree(tmp_path, {"recording1.wav": "", "recording1.lab": "1 2 buckle my shoe", "recording1.TextGrid": ""})
    assert samples(tmp_path) == [spoken_in(tmp_path, "recording1.wav", "1 2 buckle my shoe", "recording1.lab", None)]


LABELS = {
    "HTK": ("0 1000000 sil\n1000000 2500000 ah\n", "labels with times, such as '0 1000000 sil'"),
    "one word of HTK": ("0 12300000 hello\n", "labels with times, such as '0 12300000 hello'"),
    "HTS": ("  0 50000 x^x-sil+hh=ah@x_x/A:0_0_0\n", "labels with times, such as '0 50000 x^x-sil+hh"),
    "scores": ("0 3600000 s1 -23.5\n3600000 7200000 s2 -20.1", "labels with times"),
    "Audacity": ("0.000000\t1.500000\tGood morning.\n", "labels with times"),
    "MLF": ('#!MLF!#\n"*/a.lab"\nsil\n.\n', "labels of HTK"),
    "Festival": ("separator ;\nnfields 1\n#\n0.05 125 pau\n0.1 125 ao\n", "labels of Festival or ESPS, with times"),
    "phones": ("sil\nhh\nax\nl\now\n", "one label on each line, such as 'sil'"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_not_transcripts(tmp_path: Path, name: str) -> None:
    text, what = LABELS[name]
    write_tree(tmp_path, {"a.wav": "", "a.lab": text})
    expect_faults(tmp_path, [f"/a.wav: transcript: a.lab holds {what}"])


@pytest.mark.parametrize(
    "text", ["1999 2000 and 2001", "Number one.\nNumber two.", "No.\nYes.\nNo.", "# 1", "嗯\n好\n的"]
)
def test_transcripts_are_not_labels(tmp_path: Path, text: str) -> None:
    write_tree(tmp_path, {"a.wav": "", "a.lab": text})
    assert samples(tmp_path) == [spoken_in(tmp_path, "a.wav", text, "a.lab", None)]


def test_lab_faults(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a.wav": "", "a.lab": " ", "b.wav": "", "c.lab": WORDS})
    expected = [
        "/a.wav: transcript: is empty or blank",
        "/b.wav: transcript: there is no .lab file of the same name",
        "/c.lab: audio: there is no audio file of the same name",
    ]
    expect_faults(tmp_path, expected)


# AudioFolder

TABLES: dict[str, tuple[str, str]] = {
    "metadata.csv": ("file_name,transcription\na.wav,Good morning.\nsub/b.wav,Hi.\n", ":{}"),
    "metadata.jsonl": (
        '{"file_name": "a.wav", "transcription": "Good morning."}\n'
        '{"file_name": "sub/b.wav", "transcription": "Hi."}\n', ":{}",
    ),
    "metadata.parquet": ("", ":row {}"),
}  # fmt: skip


def write_audio_folder(folder: Path, name: str) -> list[Sample]:
    """Write a metadata file and empty clips; return the samples that it gives."""
    write_tree(folder, {"a.wav": "", "sub/b.wav": "", name: TABLES[name][0]})
    if name.endswith(".parquet"):
        write_parquet(folder / name, {"file_name": ["a.wav", "sub/b.wav"], "transcription": [WORDS, "Hi."]})
    first = 2 if name.endswith(".csv") else 1
    return [
        plain(str(folder / name) + TABLES[name][1].format(first + i), folder / clip, words)
        for i, (clip, words) in enumerate([("a.wav", WORDS), ("sub/b.wav", "Hi.")])
    ]


@pytest.mark.parametrize("name", TABLES)
def test_audio_folder(tmp_path: Path, name: str) -> None:
    """In the folder itself, in a folder of the split, and one below; other splits have to be named."""
    assert write_audio_folder(tmp_path / "flat", name) == samples(tmp_path / "flat")
    root = tmp_path / "corpus"
    expected = write_audio_folder(root / "data" / "train", name)
    assert recognize(root) == "audiofolder"
    assert samples(root) == samples(root / "data") == samples(root / "data" / "train") == expected
    assert write_audio_folder(root / "data" / "test", name) == samples(root / "data" / "test")
    expect_faults(
        root, [": folder: contains data of these splits: test (data/test), train (data/train); give the fold"]
    )


def test_audio_folder_of_the_library(tmp_path: Path) -> None:
    """Hugging Face's reader finds the same splits, and the same recordings in one."""
    import datasets

    for split in ("train", "test"):
        write_audio_folder(tmp_path / split, "metadata.jsonl")
    builder = datasets.load_dataset_builder("audiofolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    splits = {split.name: split for split in builder._split_generators(datasets.StreamingDownloadManager())}
    assert splits.keys() == {"train", "test"}
    rows = builder._generate_examples(**splits["train"].gen_kwargs)
    theirs = sorted((str(row["audio"]), row["transcription"]) for _, row in rows)
    ours = samples(tmp_path / "train")
    assert theirs == sorted((str(sample.clips[0].path), str(sample.messages[1].parts[0])) for sample in ours)


def test_audio_folders_of_speakers(tmp_path: Path) -> None:
    """Sub-folders that are no splits are read together; the only split may not be one for tests."""
    expected = [*write_audio_folder(tmp_path / "anna", "metadata.csv")]
    expected += write_audio_folder(tmp_path / "ben", "metadata.jsonl")
    assert samples(tmp_path) == expected
    write_audio_folder(tmp_path / "test-1", "metadata.csv")
    expect_faults(tmp_path, [": folder: contains data of these splits: test (test-1); give the folder or the file"])
    write_audio_folder(tmp_path / "anna", "metadata.jsonl")
    expect_faults(tmp_path, ["/anna: folder: contains metadata.csv, metadata.jsonl; keep one of them"])


# Detection


def test_pairs_stay_pairs(tmp_path: Path) -> None:
    """Whatever lies beside them."""
    write_tree(tmp_path, {"a/a.wav": "", "a/a.txt": WORDS, "a/a.lab": WORDS, "backup.tar": "", "b/metadata.csv": ""})
    write_tree(tmp_path, {"wav.scp": "", "text": "", "txt/a/a.txt": WORDS, "wav48/a/a.wav": "", "wav48/a/a.txt": WORDS})
    assert recognize(tmp_path) == "paired"
    write_tree(tmp_path, {"c/c.wav": "", "c/c.normalized.txt": WORDS})
    assert "found several formats: paired (a.txt), libritts (c.normalized.txt)" in faults(tmp_path)[0]


def test_tables_stay_tables(tmp_path: Path) -> None:
    write_parquet(tmp_path / "metadata.parquet", ROWS)
    assert recognize(tmp_path) == "table"
    write_parquet(tmp_path / "data.parquet", ROWS)
    write_tree(tmp_path, {"a/metadata.csv": "", "b.tar": ""})
    assert recognize(tmp_path) == "table"


def test_two_layouts_in_one_folder(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a/a.wav": "", "a/a.lab": WORDS, "b/b-1.wav": "", "b/b.trans.txt": WORDS})
    assert "found several formats: lab (a.lab), librispeech (b.trans.txt)" in faults(tmp_path)[0]
    assert len(samples(tmp_path / "a")) == 1


@pytest.mark.parametrize("name", ["audiofolder", "libritts", "librispeech", "vctk", "kaldi", "lab"])
def test_layouts_are_folders(tmp_path: Path, name: str) -> None:
    file = write_lines(tmp_path / "data", json.dumps("x"))
    expect_faults(file, [f": format: {name} needs a folder, but this is a file"], format=name)
    expect_faults(tmp_path / "none", [": cannot be read: No such file"], format=name)


def test_links_in_a_corpus_are_reported(tmp_path: Path) -> None:
    """As in a folder of pairs: each link that leads elsewhere is named."""
    trees: dict[str, dict[str, Any]] = {
        "libritts": LIBRITTS,
        "librispeech": LIBRISPEECH,
        "lab": {"a/a.wav": "", "a/a.lab": WORDS},
        "vctk": {"txt/a/a_1.txt": WORDS, "wav48/a/a_1.wav": ""},
        "audiofolder": {"train/metadata.csv": "audio,text\na.wav,Hi."},
    }
    for name, files in trees.items():
        root = write_tree(tmp_path / name, files)
        inside = root / "wav48" if name == "vctk" else root
        (inside / "away").symlink_to("../../none")
        assert recognize(root) == name
        (found,) = faults(root)
        assert found.startswith(f"{inside}/away: link: leads to ../../none, which cannot be found")
