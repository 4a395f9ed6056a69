"""Generate speech with a base model, an adapter or merged model: python launch/generate.py --text "..."; see --help."""

from higgs_ds.cli import generate

if __name__ == "__main__":
    generate()
