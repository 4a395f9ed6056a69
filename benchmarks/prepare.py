"""Encode audio once, ahead of training, against encoding it in the training process in every epoch.

    python benchmarks/prepare.py [--clips 24] [--epochs 3] [--codec released|builtin] [--json]

Clips are noise in the rhythm of speech, as long as those of benchmarks/epoch.py. Ahead: launch/prepare.py as a user
runs it, first with an empty cache, then with a full one. Its startup is included; it takes the same time for many clips
as for few. In the loop: one process with torch's default number of threads reads and encodes clip by clip in each
epoch; its startup is not included. The codec has random weights, and the geometry of the released one or of the random
base's.

Ahead, one worker process is started for each 60 s of audio, at most one per core. The machine should be otherwise idle:
torch's threads wait for one another, and lose far more than their share of time to other processes. An epoch on one
thread is timed too; if it takes no longer than an epoch on all threads, the loop was slowed down by other processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import epoch
import numpy as np
from record import parser_of, report
from sides import child

PROJECT = Path(__file__).resolve().parent.parent
RATE = 24000
RELEASED, BUILTIN = "released", "builtin"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--codec", choices=(RELEASED, BUILTIN), default=RELEASED, help="use builtin for a quick try")
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)  # the folder that a child process reads from
    args = parser.parse_args()
    if args.loop:
        print(json.dumps(run_loop(args.loop, args.epochs)))
        return
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        result = compare(Path(name), args)
    for key, value in result.items():
        print(f"{key:<24}{value:>12.3f}" if isinstance(value, float) else f"{key:<24}{value!s:>12}")
    report(args, f"prepare-{args.codec}", result)


def compare(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return clips and seconds of audio per second for both, and the total seconds of encoding over all epochs."""
    write_codec(folder, args.codec)
    write_clips(folder, args.clips)
    audio_s = float(epoch.seconds(args.clips).sum())
    ahead_s, again_s = run_ahead(folder), run_ahead(folder)
    loop = child(__file__, [f"--loop={folder}", f"--epochs={args.epochs}"])
    ahead_total_s = ahead_s + args.epochs * loop["cached_s"]
    return {
        "codec": args.codec,
        "clips": args.clips,
        "audio_s": audio_s,
        "cores": os.cpu_count(),
        "loop_threads": loop["threads"],
        "ahead_s": ahead_s,
        "ahead_clips_per_s": args.clips / ahead_s,
        "ahead_audio_s_per_s": audio_s / ahead_s,
        "again_s": again_s,
        "loop_epoch_s": loop["epoch_s"],
        "loop_clips_per_s": args.clips / loop["epoch_s"],
        "loop_audio_s_per_s": audio_s / loop["epoch_s"],
        "one_thread_epoch_s": loop["one_thread_s"],
        "cached_epoch_s": loop["cached_s"],
        "epochs": args.epochs,
        "ahead_total_s": ahead_total_s,
        "loop_total_s": loop["total_s"],
        "time_ratio": loop["total_s"] / ahead_total_s,
        "clips_differing": loop["clips_differing"],
    }


def write_codec(folder: Path, kind: str) -> None:
    """Write the random base to the cache, where launch/prepare.py expects it; and the codec."""
    import torch
    from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

    from higgs_ds.bases.builtin import RANDOM_BASE, builtin_base
    from higgs_ds.bases.tiny_random import CODEC_NAME

    base = builtin_base(RANDOM_BASE, folder / "cache")
    if kind == BUILTIN:
        (folder / "codec").symlink_to(base.parent / CODEC_NAME)
        return
    # Values of transformers' script that converts the released codec; where it keeps a default, so does this.
    ratios = [8, 5, 4, 2, 3]
    acoustic = {"model_type": "dac", "downsampling_ratios": ratios, "upsampling_ratios": ratios}
    config = HiggsAudioV2TokenizerConfig(target_bandwidths=[0.5, 1, 1.5, 2], acoustic_model_config=acoustic)
    torch.manual_seed(0)
    model = HiggsAudioV2TokenizerModel(config)
    for quantizer in model.quantizer.quantizers:
        quantizer.codebook.embed.normal_()  # they are initialized to zero, which makes every code the same
    model.save_pretrained(folder / "codec")


def write_clips(folder: Path, count: int) -> None:
    """Write clips of noise (falling by 6 dB per octave, four syllables per second) and a manifest of them."""
    import soundfile

    draw = np.random.default_rng(1)
    entries = []
    for i, seconds in enumerate(epoch.seconds(count)):
        samples = int(seconds * RATE)
        spectrum = np.fft.rfft(draw.standard_normal(samples))
        spectrum /= np.maximum(np.fft.rfftfreq(samples, 1 / RATE), 100)
        wave = np.fft.irfft(spectrum, samples) * np.sin(4 * np.pi * np.arange(samples) / RATE) ** 2
        path = folder / f"{i:05d}.wav"
        soundfile.write(path, 0.5 * wave / np.abs(wave).max(), RATE)
        audio = {"role": "assistant", "content": {"type": "audio", "audio_url": path.name}}
        entries.append({"messages": [{"role": "user", "content": f"Sentence {i}."}, audio]})
    (folder / "clips.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def run_ahead(folder: Path) -> float:
    """Return the seconds that launch/prepare.py takes, from its start to its end."""
    command: list[str | Path] = [sys.executable, PROJECT / "launch" / "prepare.py"]
    command += ["--base_ckpt", "tiny-random-base", "--train_manifest", folder / "clips.jsonl"]
    command += ["--cache_dir", folder / "cache", "--codec_ckpt", folder / "codec"]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def run_loop(folder: Path, epochs: int) -> dict[str, float]:
    """Encode all clips in each epoch in this process; then read the codes that were encoded ahead."""
    from higgs_ds.common.console import quiet_libraries

    quiet_libraries()
    import torch

    from higgs_ds.data.audio import read_audio
    from higgs_ds.data.code_cache import CodeCache
    from higgs_ds.data.codec import Codec
    from higgs_ds.data.codec_info import codec_digest
    from higgs_ds.model.sample import AudioClip

    codec = Codec(folder / "codec", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    clips = [AudioClip(path) for path in sorted(folder.glob("*.wav"))]
    codes: list[torch.Tensor] = []
    threads = torch.get_num_threads()
    epochs_s = []
    for i in range(epochs + 1):
        torch.set_num_threads(threads if i < epochs else 1)
        began = time.perf_counter()
        codes = [codec.encode(read_audio(clip, codec.sample_rate)) for clip in clips]
        epochs_s.append(time.perf_counter() - began)
    one_thread_s = epochs_s.pop()
    cache = CodeCache(folder / "cache", codec_digest(folder / "codec"))
    keys = [cache.key(clip) for clip in clips]  # training reads them from the index
    began = time.perf_counter()
    cached = [cache.load(key, len(codes[0])) for key in keys]
    return {
        "cached_s": time.perf_counter() - began,
        "threads": threads,
        "epoch_s": statistics.median(epochs_s),
        "one_thread_s": one_thread_s,
        "total_s": sum(epochs_s),
        "clips_differing": sum(
            stored is None or not torch.equal(stored.codes.long(), encoded)
            for stored, encoded in zip(cached, codes, strict=True)
        ),
    }


if __name__ == "__main__":
    main()
