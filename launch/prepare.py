"""Check manifests and encode their audio: python launch/prepare.py --train_manifest PATH [options]; see --help."""

from higgs_ds.cli import prepare

if __name__ == "__main__":
    prepare()
