"""Write a checkpoint of full fine-tuning as a complete model; see --help."""

from higgs_ds.cli import export

if __name__ == "__main__":
    export()
