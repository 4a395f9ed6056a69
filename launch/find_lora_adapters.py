"""List the adapters below a folder: python launch/find_lora_adapters.py PATH [--json]; see --help."""

from higgs_ds.cli import find_lora_adapters
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(find_lora_adapters)
