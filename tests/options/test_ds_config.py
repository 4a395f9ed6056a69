"""DeepSpeed files: unknown keys, and values that disagree with the options, are errors with their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

from higgs_ds.common.errors import InputError
from higgs_ds.options.ds_config import (
    AUTO_ZERO_SETTINGS,
    DEEPSPEED_BUCKET_SIZE,
    KNOWN_KEYS,
    fit_buckets,
    read_ds_config,
    resolve,
)
from higgs_ds.options.train import TrainOptions

SHIPPED = sorted((PROJECT / "ds_configs").glob("*.json"))


def write(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values, indent=2))
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_ds_config(path)
    return caught.value.problems


def test_known_keys_are_deepspeeds() -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    aliases = {field.alias for field in fields.values()}
    assert KNOWN_KEYS["zero_optimization"].keys() <= fields.keys() | aliases
    assert AUTO_ZERO_SETTINGS.keys() <= KNOWN_KEYS["zero_optimization"].keys()
    top = {value for value in vars(constants).values() if isinstance(value, str)}
    elsewhere = {"bf16", "fp16", "zero_optimization", "activation_checkpointing"}
    assert KNOWN_KEYS.keys() - elsewhere <= top


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_resolve(path: Path) -> None:
    settings, options = resolve(read_ds_config(path), TrainOptions(), set(), world_size=3)
    assert "auto" not in json.dumps(settings)
    assert options == TrainOptions().replace(precision="bf16")
    assert settings["train_batch_size"] == 2 * 8 * 3
    assert settings["bf16"]["enabled"] is True
    assert settings["zero_optimization"].get("reduce_bucket_size", 0) <= 20_000_000


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "ds.json",
        {
            "gradient_clippping": 1.0,
            "scheduler": {"type": "WarmupLR"},
            "fp16": {"enabled": "yes please"},
            "optimizer": {"type": "Lamb"},
            "zero_optimization": {
                "stage": 2,
                "reduce_bucket_sise": 5,
                "offload_param": {"device": "cpu"},
                "offload_optimizer": {"device": "nvme"},
            },
        },
    )
    lines = path.read_text().split("\n")

    def at(key: str) -> str:
        return f"{path}:{next(i for i, line in enumerate(lines, start=1) if key in line)}: "

    found = problems_of(path)
    expected = [
        (at("clippping") + "gradient_clippping: is not an option of this trainer; did you mean 'gradient_clipping'?"),
        (at("scheduler") + "scheduler: the learning rate schedule comes from --lr_scheduler_type"),
        (
            at("bucket_sise")
            + "zero_optimization.reduce_bucket_sise: is not an option of this trainer; did you mean 'redu"
        ),
        (at('"enabled"') + 'fp16.enabled: must be true, false or "auto"; is "yes please"'),
        (at("Lamb") + 'optimizer.type: must be "AdamW" or "Adam"; is "Lamb"; the optimizer is AdamW'),
        (at("nvme") + 'zero_optimization.offload_optimizer.device: must be "cpu" or "none"; is "nvme"'),
        (at("offload_param") + "zero_optimization.offload_param: needs stage 3, the stage is 2"),
    ]
    assert len(found) == len(expected)
    for problem, start in zip(sorted(found), sorted(expected), strict=True):
        assert problem.startswith(start)


def test_file_overrides_defaults_but_not_given_options(tmp_path: Path) -> None:
    path = write(
        tmp_path / "ds.json",
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.999]}},
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"},
        },
    )
    config = read_ds_config(path)
    settings, options = resolve(config, TrainOptions(), set(), world_size=2)
    assert (options.optim.batch_size, options.optim.grad_accum, options.optim.lr) == (4, 2, 0.001)
    assert options.model.precision == "fp32"
    assert settings["train_batch_size"] == 16
    assert settings["zero_optimization"]["stage3_prefetch_bucket_size"] > 0
    assert "optimizer" not in settings  # the optimizer is passed as an object

    given = TrainOptions().replace(batch_size=1, lr=0.001)
    with pytest.raises(InputError) as caught:
        resolve(config, given, {"batch_size", "lr"}, world_size=2)
    assert caught.value.problems == [
        f"{path}:2: train_micro_batch_size_per_gpu is 4, but --batch_size is 1: remove one of them"
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"train_batch_size": 10}, "train_batch_size is 10, but 2 per rank x 8 accumulated x 2 ranks are 32"),
        (
            {"zero_optimization": {"stage": "auto"}},
            'zero_optimization.stage: "auto" has no meaning here; must be 0, 1, 2 or 3',
        ),
        ({"zero_optimization": {"stage": 1, "overlap_comm": "auto"}}, 'overlap_comm: "auto" has no meaning here'),
        ({"optimizer": {"params": {"betas": [0.8, 0.9]}}}, "optimizer.params.betas is [0.8, 0.9]; this trainer uses"),
        ({"bf16": True}, "bf16: must be a JSON object; is true"),
    ],
)
def test_refused_values(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    path = write(tmp_path / "ds.json", values)
    with pytest.raises(InputError) as caught:
        resolve(read_ds_config(path), TrainOptions(), set(), world_size=2)
    assert len(caught.value.problems) == 1
    assert expected in caught.value.problems[0]


@pytest.mark.parametrize("given", ["zero3.json", "ds_configs/zero3.json"])
def test_shipped_files_need_no_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_ds_config(Path(given)).values["zero_optimization"]["stage"] == 3
    Path(given).parent.mkdir(exist_ok=True)
    Path(given).write_text('{"zero_optimization": {"stage": 1}}')
    assert read_ds_config(Path(given)).values == {"zero_optimization": {"stage": 1}}  # the user's file comes first
    with pytest.raises(InputError, match=f"--deepspeed other/{Path(given).name}: cannot be read"):
        read_ds_config(Path("other") / Path(given).name)


def test_invalid_json_and_missing_file(tmp_path: Path) -> None:
    assert "cannot be read" in problems_of(tmp_path / "none.json")[0]
    path = tmp_path / "ds.json"
    path.write_text('{"a": 1,}')
    assert "not JSON" in problems_of(path)[0]
    path.write_text('{"steps_per_print": 1, "steps_per_print": 2}')
    assert problems_of(path) == [f"{path}:1: steps_per_print: is given twice, first in line 1; remove one of them"]
    path.write_text('{\n  "a": 1,\n}')
    assert problems_of(path)[0].startswith(f"{path}:3: not JSON: ")
    path.write_text("[" * 100_000)
    assert "nested too deeply" in problems_of(path)[0]


def test_deepspeeds_default_bucket() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig().reduce_bucket_size == DEEPSPEED_BUCKET_SIZE


@pytest.mark.parametrize(("given", "trained", "expected"), [(100, 40, 40), (100, 400, 100), (None, 40, 40)])
def test_buckets_fit_what_is_trained(given: int | None, trained: int, expected: int) -> None:
    zero: dict[str, Any] = {"stage": 2, "overlap_comm": True}
    if given is not None:
        zero["reduce_bucket_size"] = given
    several = fit_buckets({"zero_optimization": zero}, trained, 2)["zero_optimization"]
    assert several == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": expected}
    alone = fit_buckets({"zero_optimization": zero}, trained, 1)["zero_optimization"]
    assert alone == several | {"overlap_comm": False, "contiguous_gradients": False}
