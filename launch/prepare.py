"""Check manifests and encode their audio: python launch/prepare.py --train_manifest PATH [options]; see --help."""

from higgs_ds.cli import prepare
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(prepare)
