"""Put a trained codec and base, in float16, where the package brings them along.

python pretraining/ship.py outputs/codec/speaking-codec outputs/base/final_model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ASSETS = Path(__file__).resolve().parent.parent / "higgs_ds" / "assets"
BASE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
LIMIT = 20_000_000  # bytes, of both together


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("codec", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    options = parser.parse_args(argv)
    codec, base = options.assets / "speaking-codec", options.assets / "speaking-base"
    ship(options.codec, codec, ())
    ship(options.base, base, BASE_FILES)
    size = sum(path.stat().st_size for folder in (codec, base) for path in folder.iterdir())
    if size > LIMIT:
        raise SystemExit(f"{size:,} bytes; at most {LIMIT:,} are shipped")
    print(f"{codec}, {base}: {size:,} bytes")


def ship(source: Path, target: Path, others: tuple[str, ...]) -> None:
    """Weights in float16, the configuration that says so, and other files as they are."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"dtype": "float16"}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in others:
        shutil.copy(source / name, target / name)


if __name__ == "__main__":
    main()
