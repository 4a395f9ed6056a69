"""Convert a base model, a merged model or an adapter to the other layout; see --help."""

from higgs_ds.cli import convert

if __name__ == "__main__":
    convert()
