"""Make a complete model of a checkpoint of full fine-tuning; see --help."""

from higgs_ds.cli import export

if __name__ == "__main__":
    export()
