"""Merge a LoRA adapter into its base; see --help."""

import argparse
import sys
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/merge.py",
        description="Merge a LoRA adapter into its base, in float32, shard by shard; the result loads by itself.",
        allow_abbrev=False,
    )
    parser.add_argument("--base_model_path", required=True, metavar="BASE", help="the base, a folder or a hub id")
    parser.add_argument(
        "--lora_adapter_path", required=True, type=Path, metavar="DIR", help="lora_adapters/, not a checkpoint-N/"
    )
    parser.add_argument("--output_path", required=True, type=Path, metavar="DIR", help="a new folder for the result")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse()
    from higgs_ds.quiet import quiet_libraries

    quiet_libraries()
    from higgs_ds.errors import exit_code_of
    from higgs_ds.hub import resolve_folder
    from higgs_ds.merge import merge

    def main() -> None:
        merge(resolve_folder(args.base_model_path, "--base_model_path"), args.lora_adapter_path, args.output_path)
        print(f"Merged model: {args.output_path}")

    sys.exit(exit_code_of(main))
