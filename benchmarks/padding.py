"""Padding in batches by length, compared with shuffled batches of the same size.

    python benchmarks/padding.py [--samples 20000] [--json]

Durations are log-normal, like those of read speech: median 5 s, sigma 0.6, at most 30 s. A sample has 25 rows of codes
per second, 9 more for the delay pattern, and a prompt of 80 tokens.
"""

from __future__ import annotations

import numpy as np
from record import parser_of, report

from higgs_ds.data.sampler import WindowSampler
from higgs_ds.options.optim import OptimOptions

LAYOUTS = [(2, 8, 1), (8, 1, 1), (16, 2, 8)]  # batch size, gradient accumulation, ranks
TOKENS = [2048, 4096, 8192]


def lengths_of_speech(count: int) -> list[int]:
    seconds = np.random.default_rng(0).lognormal(np.log(5), 0.6, count).clip(0.5, 30)
    return (80 + 9 + np.ceil(25 * seconds)).astype(int).tolist()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    args = parser.parse_args()
    lengths, bucket_size = lengths_of_speech(args.samples), OptimOptions().bucket_size
    result = {}
    print(f"{'micro-batch':<42} {'shuffled':>9} {'by length':>10}")
    for batch, accumulation, ranks in LAYOUTS:

        def waste(size: int, batch: int = batch, accumulation: int = accumulation, ranks: int = ranks) -> float:
            return WindowSampler(lengths, batch, accumulation, 0, ranks, seed=42, bucket_size=size).padding()

        name = f"{batch} samples x {accumulation} accumulated x {ranks} ranks"
        result[name] = {"shuffled": round(waste(1), 4), "by_length": round(waste(bucket_size), 4)}
    for tokens in TOKENS:

        def filled(size: int, tokens: int = tokens) -> float:
            return WindowSampler(lengths, 1, 1, 0, 1, seed=42, bucket_size=size, max_tokens=tokens).padding()

        result[f"up to {tokens} tokens"] = {"shuffled": round(filled(1), 4), "by_length": round(filled(bucket_size), 4)}
    for name, values in result.items():
        print(f"{name:<42} {values['shuffled']:>9.1%} {values['by_length']:>10.1%}")
    report(args, "padding", {"samples": args.samples, "bucket_size": bucket_size, "padding": result})


if __name__ == "__main__":
    main()
