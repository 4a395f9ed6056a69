"""List the adapters below a folder: python launch/find_lora_adapters.py PATH [--json]; see --help."""

from higgs_ds.cli import find_lora_adapters

if __name__ == "__main__":
    find_lora_adapters()
