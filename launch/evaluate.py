"""Evaluate generated speech: python launch/evaluate.py --test_manifest PATH [options]; see --help."""

from higgs_ds.cli import evaluate

if __name__ == "__main__":
    evaluate()
