"""Copy a trained codec and base, in float16, to the package's assets.

python pretraining/ship.py outputs/codec/speaking-codec outputs/base/final_model
python pretraining/ship.py outputs/codec/speaking-codec outputs/base-v3/final_model --as speaking-base-v3
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from higgs_ds.bases.builtin import ASSETS, DEFAULT_BASE, PARTS, SPEAKING_BASES, SPEAKING_CODEC, WEIGHTS

LIMIT = 20_000_000  # bytes, both together


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("codec", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--as", dest="name", choices=SPEAKING_BASES, default=DEFAULT_BASE)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    options = parser.parse_args(argv)
    codec, base = options.assets / SPEAKING_CODEC, options.assets / options.name
    ship(options.codec, codec)
    ship(options.base, base)
    size = sum(path.stat().st_size for folder in (codec, base) for path in folder.iterdir())
    if size > LIMIT:
        raise SystemExit(f"{codec}, {base}: {size:,} bytes; at most {LIMIT:,} bytes may be shipped")
    print(f"{codec}, {base}: {size:,} bytes")


def ship(source: Path, target: Path) -> None:
    """Write weights and their configured dtype as float16; copy the other files unchanged."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    for name in PARTS[target.name]:
        if name == "config.json":
            config = json.loads((source / name).read_text(encoding="utf-8")) | {"dtype": "float16"}
            (target / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        elif name != WEIGHTS:
            shutil.copy(source / name, target / name)


if __name__ == "__main__":
    main()
