"""Evaluate generated speech: python launch/evaluate.py --test_manifest PATH [options]; see --help."""

from higgs_ds.cli import evaluate
from higgs_ds.common.process import run_command

if __name__ == "__main__":
    run_command(evaluate)
