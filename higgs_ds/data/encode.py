"""Encode clips into the cache: batched on a GPU, in worker processes on CPUs."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from higgs_ds.common.errors import InputError
from higgs_ds.common.forks import blocked_signals, end_with_parent
from higgs_ds.common.interrupts import finishing
from higgs_ds.common.threads import one_thread
from higgs_ds.data.audio import AudioError, read_audio
from higgs_ds.data.code_cache import CachedCodes, CodeCache
from higgs_ds.data.coder import Coder
from higgs_ds.data.mel_features import MelFeatureStore
from higgs_ds.data.survey import ClipToEncode

if TYPE_CHECKING:
    from higgs_ds.data.codec import Codec  # takes seconds to import, and worker processes import it themselves

WINDOW_CLIPS, WINDOW_BYTES = 4096, 64 << 20  # limits of a window: clips, and bytes of audio embedded in manifests
BATCH_S = 120.0  # seconds of audio per batch on a GPU
WORTH_A_WORKER_S = 60.0  # seconds of audio below which a worker process takes longer to start than it saves


def encode_clips(
    clips: Iterable[ClipToEncode], count: int, seconds: float, coder: Coder,
    device: torch.device, num_workers: int, show_progress: bool,
) -> None:  # fmt: skip
    """Encode `count` clips of `seconds` in total into the cache, with a progress bar.

    Each clip is stored as soon as it is encoded, so a clip that an interrupted run has encoded is not encoded again. On
    CPUs every clip is encoded alone, on one thread, so that its codes do not depend on the number of processes.
    """
    workers = min(num_workers, int(seconds / WORTH_A_WORKER_S))
    folder, code_store = coder.codec.folder, CodeStore(coder.cache, coder.hearing)
    disable = None if show_progress else True  # None: no bar if stderr is not a terminal
    with tqdm(total=count, desc="encoding", unit="clip", disable=disable, dynamic_ncols=True) as bar:
        if device.type == "cuda":
            _encode_batched(clips, code_store, _load_codec(folder, device), num_workers, bar)
        elif workers > 1:
            _encode_in_processes(clips, code_store, folder, workers, bar)
        else:
            with one_thread():
                codec = _load_codec(folder, device)
                for clip in clips:
                    _encode_one(clip, code_store, codec)
                    bar.update()


def _load_codec(folder: Path, device: torch.device) -> Codec:
    from higgs_ds.data.codec import Codec

    return Codec(folder, device)


@dataclass(frozen=True)
class CodeStore:
    """Stores the codes and mel features of clips."""

    cache: CodeCache
    hearing: MelFeatureStore | None = None

    def store(self, clip: ClipToEncode, codes: torch.Tensor) -> None:
        """Store a clip's codes (C, F) and, if a Whisper tower encodes it, its features."""
        self.cache.store(clip.key, CachedCodes(codes, clip.quality))
        if self.hearing is not None and clip.is_heard:
            self.hearing.store(clip.key, clip.clip, codes.shape[1])


def _encode_one(clip: ClipToEncode, code_store: CodeStore, codec: Codec) -> None:
    cached = code_store.cache.load(clip.key, codec.num_codebooks)
    try:
        codes = cached.codes if cached else codec.encode(read_audio(clip.clip, codec.sample_rate))
        code_store.store(clip, codes)
    except AudioError as error:
        raise InputError(f"{clip.clip.path}: has changed since it was checked: {error}") from error


def _encode_batched(
    clips: Iterable[ClipToEncode], code_store: CodeStore, codec: Codec, threads: int, bar: tqdm
) -> None:
    """Encode clips of similar length together. Threads read and resample them."""
    with ThreadPoolExecutor(threads) as readers:
        for window in _windows(clips):
            for batch in _batches(window, codec.sample_rate):
                waveforms = list(readers.map(lambda clip: read_audio(clip.clip, codec.sample_rate), batch))
                list(readers.map(code_store.store, batch, codec.encode_batch(waveforms)))
                bar.update(len(batch))


def _windows(clips: Iterable[ClipToEncode]) -> Iterator[list[ClipToEncode]]:
    window: list[ClipToEncode] = []
    size = 0
    for clip in clips:
        window.append(clip)
        size += len(clip.clip.data or b"")
        if len(window) == WINDOW_CLIPS or size > WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _batches(window: list[ClipToEncode], sample_rate: int) -> Iterator[list[ClipToEncode]]:
    """Yield clips of similar length, up to BATCH_S seconds in total with their padding."""
    batch: list[ClipToEncode] = []
    for clip in sorted(window, key=lambda clip: clip.num_samples):
        if batch and (len(batch) + 1) * clip.num_samples > BATCH_S * sample_rate:
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch


def _encode_in_processes(
    clips: Iterable[ClipToEncode], code_store: CodeStore, codec_folder: Path, workers: int, bar: tqdm
) -> None:
    """Encode the longest clips of a window first, so that the workers finish at about the same time."""
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (codec_folder, code_store)
    ) as pool:
        pending: set[Future[None]] = set()
        try:
            for window in _windows(clips):
                for clip in sorted(window, key=lambda clip: -clip.num_samples):
                    with blocked_signals({signal.SIGINT, signal.SIGHUP}):  # workers start at the first clip
                        pending.add(pool.submit(_encode_in_worker, clip))
                    if len(pending) >= 4 * workers:
                        pending = _collect(pending, bar)
            while pending:
                pending = _collect(pending, bar)
        except KeyboardInterrupt:
            with finishing("as soon as the clips in work are stored"):
                pool.shutdown(cancel_futures=True)
            raise


def _collect(pending: set[Future[None]], bar: tqdm) -> set[Future[None]]:
    done, pending = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
        bar.update()
    return pending


_worker: tuple[CodeStore, Codec]  # set in worker processes only


def _start_worker(codec_folder: Path, code_store: CodeStore) -> None:
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()
    global _worker
    _worker = code_store, _load_codec(codec_folder, torch.device("cpu"))


def _encode_in_worker(clip: ClipToEncode) -> None:
    _encode_one(clip, *_worker)
