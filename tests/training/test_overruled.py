"""Options that a DeepSpeed file, the device or few samples overrule are named with what is done instead."""

from __future__ import annotations

import json
from pathlib import Path

from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.ds_config import read_ds_config, resolve
from higgs_ds.training.overruled import overruled_by_data, overruled_by_file


def test_by_the_file_and_auto_values(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    values = {"gradient_accumulation_steps": 3, "gradient_clipping": "auto", "optimizer": {"params": {"lr": 1e-3}}}
    path.write_text(json.dumps(values | {"zero_optimization": {"stage": 2}}))
    options, given = parse_train_options(["--deepspeed", str(path), "--max_grad_norm", "2"])
    _, resolved = resolve(read_ds_config(path), options, given, 1, "fp32")
    assert overruled_by_file(options, resolved, path) == [
        "--precision auto: fp32",
        f"--grad_accum {options.optim.grad_accum}: 3, as mine.json says",
        f"--lr {options.optim.lr}: 0.001, as mine.json says",
    ]
    assert overruled_by_file(resolved, resolved, path) == []


def test_by_few_samples() -> None:
    argv = ["--batch_size", "4", "--grad_accum", "2", "--warmup_ratio", "0.03", "--log_steps", "5", "--val_steps", "7"]
    options, _ = parse_train_options([*argv, "--save_steps", "100", "--sample_steps", "6"])
    assert overruled_by_data(options, num_samples=7, total_steps=6, warmup_steps=0) == [
        "--batch_size 4, --grad_accum 2: a step has 7 samples: all",
        "--warmup_ratio 0.03: no step, of 6",
        "--val_steps 7: at the last step only, which is 6",
        "--save_steps 100: at the last step only, which is 6",
    ]
    assert overruled_by_data(options, num_samples=8, total_steps=100, warmup_steps=3) == []
