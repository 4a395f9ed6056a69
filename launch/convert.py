"""Write a base, a merged model or an adapter in the other layout; see --help."""

from higgs_ds.cli import convert

if __name__ == "__main__":
    convert()
