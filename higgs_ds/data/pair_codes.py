"""The codes that launch/prefer.py keeps beside its pairs: those that a model has spoken, not those of their sound."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterable
from pathlib import Path

from higgs_ds.common.files import replaced_file, saving
from higgs_ds.data.code_cache import CodeCache


def add_codes_beside(manifests: Iterable[Path], cache: CodeCache) -> int:
    """Copy codes from the folders of manifests into the cache, and return their number.

    The name of a file is the key of the codes: it depends on the clip's content and on the codec. So codes of another
    codec are never read.

    Raises:
        SaveError: the cache cannot be written.
    """
    found = 0
    for folder in dict.fromkeys(manifest.parent for manifest in manifests):
        beside = CodeCache(folder, cache.codec_digest)
        for path in sorted(beside.folder.glob("??/*.safetensors")):
            target = cache.path(path.stem)
            if target.exists() and filecmp.cmp(path, target, shallow=False):
                continue
            with saving(target), replaced_file(target) as temporary:
                shutil.copyfile(path, temporary)
            found += 1
    return found
