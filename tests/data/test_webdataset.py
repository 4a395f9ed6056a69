"""WebDataset shards: samples without extraction, what is refused, and shards that are damaged."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from test_formats import WORDS, expect_faults, plain, samples, spoken, system, user

from higgs_ds.data.formats.reader import read_entries
from higgs_ds.data.formats.recognition import recognize
from higgs_ds.model.sample import AudioClip, Sample
from higgs_ds.options.train import DataOptions

Members = list[tuple[str, bytes | tarfile.TarInfo]]


def write_shard(path: Path, members: Members, kind: int = tarfile.PAX_FORMAT) -> Path:
    """Write members with their contents; a TarInfo stands for a link, a device or a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return name, info


def described(**values: object) -> bytes:
    return json.dumps(values).encode()


EMILIA: Members = [
    ("EN_B0_S1_W0.json", described(id="EN_B0_S1_W0", wav="x/EN_B0_S1_W0.mp3", text=" Good morning.", duration=9.5,
                                   speaker="EN_B0_S1", language="en", dnsmos=3.3, phone_count=9)),
    ("EN_B0_S1_W0.mp3", b"ID3"),
    ("EN_B0_S1_W1.json", described(id="EN_B0_S1_W1", wav="x/EN_B0_S1_W1.mp3", text="Hi.", duration=1.5,
                                   speaker="EN_B0_S1", language="en", dnsmos=3.3, phone_count=2)),
    ("EN_B0_S1_W1.mp3", b"ID3+"),
]  # fmt: skip
TEXTS: Members = [
    special("sub", tarfile.DIRTYPE),
    ("__meta__/info.json", b"{"),
    ("sub/._001.txt", b"not a member"),
    ("./sub/001.FLAC", b"fLaC"),
    ("./sub/001.spectrogram.npy", b"\x93NUMPY"),
    ("./sub/001.txt", "\ufeff Good morning.\n".encode()),
    ("002.original.txt", b"1"),
    ("002.normalized.txt", b"One"),
    ("002.audio.wav", b"RIFF"),
    ("002.json", described(text="Ignored.", speaker_id=7, offset=1)),
]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards(tmp_path: Path, kind: int) -> None:
    first = write_shard(tmp_path / "train-000.tar", EMILIA, kind)
    second = write_shard(tmp_path / "train-001.tar", TEXTS, kind)
    expected = [
        plain(f"{first}:EN_B0_S1_W0", AudioClip(first, data=b"ID3"), WORDS, "EN_B0_S1", "en"),
        plain(f"{first}:EN_B0_S1_W1", AudioClip(first, data=b"ID3+"), "Hi.", "EN_B0_S1", "en"),
        plain(f"{second}:./sub/001", AudioClip(second, data=b"fLaC"), WORDS),
        plain(f"{second}:002", AudioClip(second, data=b"RIFF"), "One", "7"),
    ]
    assert recognize(first) == recognize(tmp_path) == "webdataset"
    assert samples(first) == expected[:2]
    assert samples(tmp_path) == expected


def test_style(tmp_path: Path) -> None:
    """A JSON member may have the keys of a flat list."""
    path = write_shard(tmp_path / "a", [("1.wav", b"RIFF"), ("1.json", described(sentence=WORDS, style="old, slow"))])
    scene = system("Audio is recorded from a quiet room.\n\nSPEAKER0: old, slow")
    assert samples(path) == [Sample((scene, user(WORDS), spoken(AudioClip(path, data=b"RIFF"))), 1, None, f"{path}:1")]


def test_as_the_library_groups_them(tmp_path: Path) -> None:
    """Hugging Face's reader, which has webdataset's rule, finds the same samples; members apart make it several."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    def theirs(path: Path) -> list[str]:
        with tarfile.open(path) as tar:
            files = ((member.name, tar.extractfile(member)) for member in tar if member.isreg())
            return [example["__key__"] for example in WebDataset._get_pipeline_from_tar(str(path), files)]

    path = write_shard(tmp_path / "a.tar", [*EMILIA, TEXTS[3], *TEXTS[5:]])
    assert [sample.source.removeprefix(f"{path}:") for sample in samples(path)] == theirs(path)
    apart = write_shard(tmp_path / "b.tar", [EMILIA[0], EMILIA[3], EMILIA[1], EMILIA[2]])
    first, second = "EN_B0_S1_W0", "EN_B0_S1_W1"
    assert theirs(apart) == [first, second, first, second]
    missing = "key: has no member with {} beside the others; write them one after the other"
    again = "key: members of this sample come earlier in the shard, with others between them"
    expected = [
        f":{first}: {missing.format('audio (.wav, .mp3, .flac, .ogg, .opus, .m4a, .aac)')}",
        f":{second}: {missing.format('text (.txt or .json)')}",
        f":{first}: {again}",
        f":{second}: {again}",
    ]
    expect_faults(apart, expected)


def test_faults(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "a.tar",
        [
            special("1.wav", tarfile.SYMTYPE),
            ("1.txt", b"Hi."),
            special("2.wav", tarfile.LNKTYPE),
            special("3.wav", tarfile.CHRTYPE),
            ("4.a.wav", b"RIFF"),
            ("4.b.wav", b"RIFF"),
            ("4.txt", b"Hi."),
            ("5.wav", b"RIFF"),
            ("5.wav", b"RIFF"),
            ("6.wav", b"RIFF"),
            ("6.json", b"{"),
            ("7.wav", b"RIFF"),
            ("7.json", b"[1]"),
            ("8.wav", b"RIFF"),
            ("8.json", described(speker="anna", text="Hi.")),
            ("9.wav", b""),
            ("9.txt", b"Hi."),
            ("13.wav", b"RIFF"),
            ("13.txt", b"\xff"),
            ("10.txt", b"x" * ((1 << 20) + 1)),
            ("11.json", described(text="Hi.")),
            ("12.cls", b"1"),
        ],
    )
    link = "is a link or a device; write the file itself into the shard"
    expected = [
        f":1: wav: {link}",
        f":2: wav: {link}",
        f":3: wav: {link}",
        ":4: key: has several members with audio: .a.wav, .b.wav; a key ends at the first dot of a name",
        ":5: wav: there are two such members with this key; webdataset stops at the second",
        ":6: json: is not JSON: Expecting property name",
        ":7: json: must be an object, but is a list",
        ":8: speker: is not a known key; did you mean 'speaker'?",
        ":9: wav: is empty",
        ":13: text: '\\udcff' is not UTF-8",
        ":10: txt: has 1048577 bytes; the limit is 1048576",
        ":11: key: has no member with audio",
    ]
    expect_faults(path, expected)


def test_splits(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", EMILIA)
    write_shard(tmp_path / "dev-0.tar", EMILIA)
    expected = (
        ": folder: contains data of these splits: dev (dev-0.tar), train (train-0.tar); give the folder or the file"
    )
    expect_faults(tmp_path, [expected])
    assert len(samples(tmp_path / "dev-0.tar")) == 2


@pytest.mark.parametrize(
    ("change", "num_samples", "expected"),
    [
        (lambda raw: raw[:1600], 0, "tar file: unexpected end of data"),
        (lambda raw: raw[: 4 * 1024], 1, "after sample 'EN_B0_S1_W0': it ends before its end mark"),
        (lambda raw: raw[:3100], 1, "after sample 'EN_B0_S1_W0': the header at byte 3072 is damaged"),
        (lambda raw: raw[: 3 * 1024] + b"x" + raw[3 * 1024 + 1 :], 1, "the header at byte 3072 is damaged"),
        (lambda raw: raw[:300], 0, "tar file: truncated header"),
        (lambda raw: b"\x1f\x8b" + raw, 0, "tar file: "),
        (lambda raw: b"", 0, "tar file: empty file"),
    ],
)
def test_damaged_shards(tmp_path: Path, change: Callable[[bytes], bytes], num_samples: int, expected: str) -> None:
    """tarfile itself takes a damaged header for the end of the archive, and the samples after it would be lost."""
    path = write_shard(tmp_path / "a.tar", EMILIA)
    path.write_bytes(change(path.read_bytes()))
    found = list(read_entries(path, DataOptions(format="webdataset")))
    assert sum(entry.sample is not None for entry in found) == num_samples
    assert expected in found[-1].faults[0]


def test_wrong_bytes(tmp_path: Path) -> None:
    """A damaged shard gives samples or printable faults, never an exception."""
    raw = write_shard(tmp_path / "a.tar", [*EMILIA, *TEXTS]).read_bytes()
    draw, num_bad = random.Random(0), 0
    for _ in range(500):
        damaged = bytearray(raw)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(damaged))
            damaged[at] = draw.choice([damaged[at] ^ 1 << draw.randrange(8), draw.randrange(256)])
        (tmp_path / "a.tar").write_bytes(damaged)
        entries = list(read_entries(tmp_path / "a.tar", DataOptions(format="webdataset")))
        assert all((entry.sample is None) == bool(entry.faults) for entry in entries)
        "".join(fault for entry in entries for fault in entry.faults).encode()
        num_bad += any(entry.faults for entry in entries)
    assert num_bad > 50
