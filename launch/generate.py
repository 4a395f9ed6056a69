"""Speak a text with a base, an adapter or a merged model: python launch/generate.py --text "..."; see --help."""

from higgs_ds.cli import generate

if __name__ == "__main__":
    generate()
