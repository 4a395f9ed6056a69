"""Convert a base model, a merged model or an adapter to the other layout; see --help."""

from higgs_ds.cli import convert
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(convert)
