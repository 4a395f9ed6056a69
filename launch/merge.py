"""Merge a LoRA adapter into its base model; see --help."""

from higgs_ds.cli import merge

if __name__ == "__main__":
    merge()
