"""Generate speech with a base model, an adapter or merged model: python launch/generate.py --text "..."; see --help."""

from higgs_ds.cli import generate
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(generate)
