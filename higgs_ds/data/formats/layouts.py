"""Detection of the format of a folder from the names of its files. Audio is not opened, and texts are not read."""

from __future__ import annotations

import os
from pathlib import Path

from higgs_ds.data.formats import audiofolder, kaldi, lab, librispeech, libritts, paired, table, vctk, webdataset
from higgs_ds.data.formats.folders import Listing, walk
from higgs_ds.data.formats.recordings import AUDIO_SUFFIXES

AUDIO = "audio"  # found, whatever it belongs to
_LISTED = (
    *AUDIO_SUFFIXES, table.PARQUET, webdataset.SUFFIX, paired.TEXT_SUFFIX, lab.TEXT_SUFFIX,
    *(Path(name).suffix for name in audiofolder.READERS),
)  # fmt: skip


def formats_of_files(folder: Path) -> dict[str, str]:
    """Return the formats that the files of a folder and its sub-folders have, each with the name of one such file.

    Pairs of audio and `.txt` are `paired`, and Parquet files a `table`, whatever lists, shards or labels lie beside
    them. Several formats are returned where no such rule decides.
    """
    found: dict[str, str] = {}
    has_faults = False
    for listing in walk(folder, _LISTED):
        has_faults |= bool(listing.faults)
        _add_evidence(listing, found)
    audio, shard = found.pop(AUDIO, None), found.pop("webdataset", None)
    metadata_table = found.pop(audiofolder.PARQUET_NAME, None)
    if metadata_table:
        found.setdefault("audiofolder" if audio else "table", metadata_table)
    if found.keys() & {"paired", "table"}:
        for name in ("lab", "audiofolder"):
            found.pop(name, None)
    else:
        if all((folder / name).is_file() for name in (kaldi.FILE_NAME, kaldi.TEXT)):
            return {"kaldi": kaldi.FILE_NAME}
        if folders := vctk.audio_folders(folder):
            return {"vctk": folders[0].name}
    if audio and found.keys() <= {"table"}:
        found["paired"] = audio  # its reader reports the texts that are missing
    if not found and shard:
        found["webdataset"] = shard
    if not found and has_faults:
        found["paired"] = "links"  # the reader of any of these formats then reports them
    return found


def _add_evidence(listing: Listing, found: dict[str, str]) -> None:
    """Add to `found` the formats that the files of one folder speak for."""
    audios, texts = set[str](), list[tuple[str, str, str]]()
    for name in listing.names:
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if suffix in AUDIO_SUFFIXES:
            audios.add(stem)
            found.setdefault(AUDIO, name)
        elif name in audiofolder.READERS:
            found.setdefault(name if name == audiofolder.PARQUET_NAME else "audiofolder", name)
        elif suffix in _FORMAT_OF_SUFFIX:
            found.setdefault(_FORMAT_OF_SUFFIX[suffix], name)
        elif suffix in (paired.TEXT_SUFFIX, lab.TEXT_SUFFIX):
            texts.append((stem, suffix, name))
    for stem, suffix, name in texts if audios else ():
        if stem in audios:
            found.setdefault("lab" if suffix == lab.TEXT_SUFFIX else "paired", name)
        elif name.endswith(librispeech.TEXT_ENDING):
            found.setdefault("librispeech", name)
        elif any(name.removesuffix(ending) in audios for ending in libritts.TEXT_ENDINGS):
            found.setdefault("libritts", name)


_FORMAT_OF_SUFFIX = {table.PARQUET: "table", webdataset.SUFFIX: "webdataset"}
