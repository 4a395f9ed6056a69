"""The memory of this process."""

from __future__ import annotations

import numpy as np

from higgs_ds.common.resources import peak_resident_bytes, resident_bytes


def test_memory_in_use_and_its_peak() -> None:
    before, peak_before = resident_bytes(), peak_resident_bytes()
    assert before <= peak_before
    size = peak_before - before + (64 << 20)
    block = np.ones(size, np.uint8)
    in_use, peak = resident_bytes(), peak_resident_bytes()
    del block
    assert in_use <= peak
    assert in_use - before > 0.9 * size
    assert peak > peak_before
    assert resident_bytes() < in_use - 0.9 * size
    assert peak_resident_bytes() >= peak
