"""Values of DeepSpeed files: wrong ones are errors with their line; the others are what DeepSpeed makes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launcher import RANDOM, run_script

from higgs_ds.common.errors import InputError
from higgs_ds.options.checks import check_options
from higgs_ds.options.ds_config import SHARED_SETTINGS, read_ds_config, resolve
from higgs_ds.options.ds_values import KNOWN_KEYS, Kind
from higgs_ds.options.train import TrainOptions

ZERO, OPTIMIZER = "zero_optimization", "optimizer.params"
# JSON text, so that Infinity, 5e8 and 500000000.0 are as in a file.
VALUES = [
    "0", "1", "2", "3", "5", "-1", "-5", "0.0", "-0.0", "1.0", "2.0", "0.5", "5e8", "1e18", "1e400", "Infinity",
    "-Infinity", "NaN", f"{10**18}", f"{10**19}", f"{10**400}", "true", "false", "null", "[]", "[1]", "{}", '""',
    '"0"', '"1"', '"2"', '"02"', '"5"', '"-5"', '"+5"', '" 5 "', '"5.0"', '"5."', '"5.5"', '"5e8"', '"1_000"',
    '"1__0"', '"_1"', '"0x10"', '"inf"', '"nan"', '"true"', '"True"', '"FALSE"', '"yes"', '"N"', '"on"', '"off"',
    '"t"', '" true"', '"tru"', '"cpu"', '"none"', '"CPU"', '"gpu"', f'"{"9" * 5000}"',
]  # fmt: skip


def file_with(folder: Path, key: str, text: str) -> Path:
    """Write a file with one value, on a line of its own; it is at stage 3, where most values have a meaning."""
    *sections, name = key.split(".")
    head = "{"
    for section in sections:
        head += f'"{section}":\n{{' + ('"stage": 3, ' if section == ZERO and name != "stage" else "")
    path = folder / "ds.json"
    path.write_text(f'{head}\n"{name}": {text}{"}" * len(sections)}}}\n')
    return path


def problem_of(folder: Path, key: str, text: str) -> str | None:
    """Return the problem of a value, without its file, line and key, or None if there is none."""
    path = file_with(folder, key, text)
    try:
        read_ds_config(path)
    except InputError as error:
        (problem,) = error.problems
        start = f"{path}:{key.count('.') + 2}: {key}"
        assert problem.startswith(start)
        return problem.removeprefix(start).removeprefix(": ")
    return None


def kinds(known: dict[str, Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[str, Kind]]:
    for name, kind in known.items():
        if isinstance(kind, dict):
            yield from kinds(kind, (*parents, name))
        else:
            yield ".".join((*parents, name)), kind


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("steps_per_print", '"inf"', 'must be a whole number, 1 or more; is "inf"; leave it out to print nothing'),
        ("steps_per_print", '"10"', 'must be a whole number, 1 or more; is "10"; write it without quotes'),
        ("steps_per_print", "true", "must be a whole number, 1 or more; is true"),
        ("steps_per_print", "0", "must be a whole number, 1 or more; is 0"),
        ("steps_per_print", "-5", "must be a whole number, 1 or more; is -5"),
        ("steps_per_print", "2.5", "must be a whole number, 1 or more; is 2.5"),
        ("steps_per_print", "NaN", "must be a whole number, 1 or more; is NaN"),
        ("steps_per_print", "-Infinity", "must be a whole number, 1 or more; is -Infinity"),
        ("steps_per_print", '"auto"', '"auto" has no meaning here; must be a whole number, 1 or more'),
        ("steps_per_print", "{}", "is an object"),
        ("train_batch_size", '"64"', 'must be a whole number, 1 or more, or "auto"; is "64"; write it without quotes'),
        ("train_micro_batch_size_per_gpu", "0", 'must be a whole number, 1 or more, or "auto"; is 0'),
        ("gradient_accumulation_steps", "1.5", 'must be a whole number, 1 or more, or "auto"; is 1.5'),
        ("gradient_accumulation_steps", "true", 'must be a whole number, 1 or more, or "auto"; is true'),
        ("gradient_clipping", '"1.0"', 'must be a number, 0 or more, or "auto"; is "1.0"; write it without quotes'),
        ("gradient_clipping", "-1", 'must be a number, 0 or more, or "auto"; is -1'),
        ("gradient_clipping", "Infinity", 'must be a number, 0 or more, or "auto"; is Infinity'),
        ("gradient_clipping", "[1.0]", 'must be a number, 0 or more, or "auto"; is [1.0]'),
        (f"{OPTIMIZER}.lr", '"2e-4"', 'must be a number above 0, or "auto"; is "2e-4"; write it without quotes'),
        (f"{OPTIMIZER}.lr", "true", 'must be a number above 0, or "auto"; is true'),
        (f"{OPTIMIZER}.lr", "0", 'must be a number above 0, or "auto"; is 0'),
        (f"{OPTIMIZER}.lr", f"{10**400}", 'must be a number above 0, or "auto"; is 1000000000'),
        (f"{OPTIMIZER}.weight_decay", "-0.1", 'must be a number, 0 or more, or "auto"; is -0.1'),
        (f"{OPTIMIZER}.betas", "[0.9, [0.99]]", " is a list; this trainer uses [0.9, 0.999]"),
        (f"{OPTIMIZER}.eps", '"1e-8"', ' is "1e-8"; this trainer uses 1e-08'),
        ("optimizer", "null", "must be a JSON object; is null"),
        ("optimizer.type", "1", 'must be "AdamW" or "Adam"; is 1; the optimizer is AdamW'),
        ("bf16.enabled", "2", 'must be true, false or "auto"; is 2'),
        ("bf16.enabled", "null", 'must be true, false or "auto"; is null; leave the key out for the default'),
        ("fp16", "[]", "must be a JSON object; is []"),
        ("fp16.enabled", '"maybe"', 'must be true, false or "auto"; is "maybe"'),
        ("fp16.auto_cast", "true", "must be false; is true; inputs are never cast here"),
        ("fp16.loss_scale_window", "0", "must be a whole number, 1 or more; is 0"),
        ("fp16.min_loss_scale", "0.5", "must be a whole number, 1 or more; is 0.5"),
        ("fp16.initial_scale_power", "33", "must be a whole number from 0 to 32; is 33"),
        ("fp16.loss_scale", "-1", "must be a number, 0 or more; is -1"),
        ("fp16.loss_scale_sindow", "1", "is not an option of this trainer; did you mean 'loss_scale_window'?"),
        ("activation_checkpointing", "true", "must be a JSON object; is true"),
        ("activation_checkpointing.profile", '"no"', 'must be true or false; is "no"'),
        ("activation_checkpointing.number_checkpoints", "-1", "must be a whole number, 0 or more; is -1"),
        ("communication_data_type", '"float32"', 'must be "fp32", "bf16" or "fp16"; is "float32"'),
        ("communication_data_type", "16", 'must be "fp32", "bf16" or "fp16"; is 16'),
        ("data_types", "null", "must be a JSON object; is null"),
        ("data_types.grad_accum_dtype", '"int8"', 'must be "fp32", "bf16" or "fp16"; is "int8"'),
        ("data_types.grad_accum_dtype", "32", 'must be "fp32", "bf16" or "fp16"; is 32'),
        ("wall_clock_breakdown", '"true"', 'must be true or false; is "true"; write it without quotes'),
        ("wall_clock_breakdown", "null", "must be true or false; is null; leave the key out for the default"),
        ("zero_allow_untested_optimizer", '"maybe"', 'must be true or false; is "maybe"'),
        (ZERO, "true", "must be a JSON object; is true"),
        (f"{ZERO}.stage", "4", "must be 0, 1, 2 or 3; is 4"),
        (f"{ZERO}.stage", "true", "must be 0, 1, 2 or 3; is true"),
        (f"{ZERO}.overlap_comm", '"maybe"', 'must be true or false; is "maybe"'),
        (f"{ZERO}.contiguous_gradients", "null", "must be true or false; is null; leave the key out for the default"),
        (f"{ZERO}.reduce_bucket_size", '"5e8"', 'below 9.2e+18; is "5e8"; write it without quotes'),
        (f"{ZERO}.reduce_bucket_size", "0", "must be a whole number, 1 or more, below 9.2e+18; is 0"),
        (f"{ZERO}.reduce_bucket_size", "1e19", "must be a whole number, 1 or more, below 9.2e+18; is 1e+19"),
        (f"{ZERO}.stage3_max_live_parameters", "Infinity", "must be a whole number, 0 or more; is Infinity"),
        (f"{ZERO}.offload_param", '"cpu"', 'must be a JSON object; is "cpu"'),
        (f"{ZERO}.offload_param.device", "null", 'must be "cpu" or "none"; is null; leave the key out for the default'),
        (f"{ZERO}.offload_optimizer.pin_memory", "3", "must be true or false; is 3"),
    ],
)  # fmt: skip
def test_wrong_values(tmp_path: Path, key: str, text: str, expected: str) -> None:
    problem = problem_of(tmp_path, key, text)
    assert problem is not None
    assert expected in problem


@pytest.mark.parametrize(
    ("key", "text", "converted"),
    [
        ("steps_per_print", "10.0", 10),
        ("steps_per_print", "Infinity", None),  # as accelerate writes it; None is the same as no key
        ("steps_per_print", "null", None),
        ("train_batch_size", "1.6e1", 16),
        ("gradient_clipping", "1", 1.0),
        ("gradient_clipping", "0", 0.0),
        ("gradient_clipping", '"auto"', "auto"),
        (f"{OPTIMIZER}.lr", "1", 1.0),
        ("optimizer.params", "null", None),
        ("optimizer.type", '"adamw"', "AdamW"),
        ("bf16", "null", None),
        ("bf16.enabled", '"false"', False),
        ("fp16.enabled", '"auto"', "auto"),
        ("fp16.enabled", "0", False),
        ("fp16.loss_scale", '"0"', 0.0),
        ("activation_checkpointing.number_checkpoints", "null", None),
        ("communication_data_type", '"BF16"', "bf16"),
        ("data_types.grad_accum_dtype", '"torch.float32"', "fp32"),
        ("wall_clock_breakdown", "1", True),
        ("zero_allow_untested_optimizer", "null", None),
        (f"{ZERO}.stage", '"2"', 2),
        (f"{ZERO}.overlap_comm", "null", None),
        (f"{ZERO}.overlap_comm", '"no"', False),
        (f"{ZERO}.reduce_bucket_size", "5e8", 500_000_000),
        (f"{ZERO}.reduce_bucket_size", '"auto"', "auto"),
        (f"{ZERO}.sub_group_size", '"1_000"', 1000),
        (f"{ZERO}.stage3_max_live_parameters", "1e20", 10**20),
        (f"{ZERO}.offload_param", "null", None),
        (f"{ZERO}.offload_param.device", '"none"', "none"),
    ],
)
def test_right_values_are_converted(tmp_path: Path, key: str, text: str, converted: Any) -> None:
    config = read_ds_config(file_with(tmp_path, key, text))
    value = config.get(tuple(key.split(".")))
    assert value == converted
    assert type(value) is type(converted)
    settings, _ = resolve(config, TrainOptions(), set(), world_size=1)
    assert "null" not in json.dumps(settings)


def models() -> dict[str, Any]:
    """Return DeepSpeed's model of each section that has one."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import config, offload_config

    return {
        ZERO: config.DeepSpeedZeroConfig,
        f"{ZERO}.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
        f"{ZERO}.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }


MODEL_SECTIONS = (ZERO, f"{ZERO}.offload_param", f"{ZERO}.offload_optimizer", "bf16", "fp16")
LARGE = {"5e8", "1e18", f"{10**18}", f"{10**19}", f"{10**400}", f'"{"9" * 5000}"'}
TRUE = {"1", "1.0", "true", '"1"', '"true"', '"True"', '"yes"', '"on"', '"t"'}
NOT_POSITIVE = {"0", "0.0", "-0.0", "-1", "-5", '"-5"', '"0"', "0.5"}
# What is refused although DeepSpeed's model accepts it.
REFUSED = {
    f"{ZERO}.reduce_bucket_size": {f"{10**19}", f"{10**400}"},  # too large for a tensor
    # What this trainer does not do, and scales that DeepSpeed fails on where it uses them.
    "fp16.auto_cast": TRUE,
    "fp16.fp16_master_weights_and_grads": TRUE,
    "fp16.initial_scale_power": {"-1", "-5", '"-5"', '"1_000"', *LARGE},
    "fp16.hysteresis": NOT_POSITIVE,
    "fp16.loss_scale_window": NOT_POSITIVE,
    "fp16.min_loss_scale": NOT_POSITIVE | LARGE,  # above the initial scale
}


@pytest.mark.parametrize(
    "key", [key for key, _ in kinds(KNOWN_KEYS) if key.rpartition(".")[0] in MODEL_SECTIONS], ids=str
)
def test_values_are_those_of_deepspeeds_models(tmp_path: Path, key: str) -> None:
    section, _, name = key.rpartition(".")
    model = models()[section]
    aliases = {field.alias or attribute: attribute for attribute, field in model.model_fields.items()}
    is_switch = model.model_fields[aliases[name]].annotation in (bool, bool | None)
    for text in VALUES:
        value = json.loads(text)
        try:
            expected, accepts = getattr(model(**{name: value}), aliases[name]), True
        except (ValueError, OverflowError):  # fp16.loss_scale lets the second pass through
            expected, accepts = None, False
        if isinstance(value, bool) and not is_switch:
            accepts = False
        assert (problem_of(tmp_path, key, text) is None) == (accepts and text not in REFUSED.get(key, ())), text
        if problem_of(tmp_path, key, text) is None and value is not None:
            assert read_ds_config(tmp_path / "ds.json").get(tuple(key.split("."))) == expected, text


def test_sections_are_null_as_in_deepspeed(tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    batch = {"train_micro_batch_size_per_gpu": 1}
    for section in ("zero_optimization", "bf16", "fp16", "optimizer", "activation_checkpointing", "data_types"):
        try:
            DeepSpeedConfig(batch | {section: None})
            accepts = True
        except (AttributeError, TypeError):
            accepts = False
        assert (problem_of(tmp_path, section, "null") is None) == accepts, section
    for name in ("offload_param", "offload_optimizer"):
        assert problem_of(tmp_path, f"{ZERO}.{name}", "null") is None
        assert getattr(models()[ZERO](**{name: None}), name) is None


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_deepspeed_accepts_every_accepted_value(tmp_path: Path, stage: int, precision: str) -> None:
    """Also in sections without a model, where DeepSpeed fails with a type error."""
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    options = TrainOptions().replace(precision=precision)
    texts = [*VALUES, '"fp32"', '"BF16"', '"half"', '"torch.float32"', '"auto"', '"Adam"']
    for key, _ in kinds(KNOWN_KEYS):
        *sections, name = key.split(".")
        for text in texts:
            values: dict[str, Any] = {ZERO: {"stage": stage}}
            section = values
            for parent in sections:
                section = section.setdefault(parent, {})
            section[name] = json.loads(text)
            path = tmp_path / "ds.json"
            path.write_text(json.dumps(values))
            try:
                config = read_ds_config(path)
                settings, _ = resolve(config, options, {"precision"}, world_size=1)
            except InputError:
                continue
            made = DeepSpeedConfig(settings)
            assert 1000 % made.steps_per_print >= 0
            assert made.gradient_clipping >= 0.0
            assert isinstance(made.wall_clock_breakdown, bool)
            assert made.grad_accum_dtype is None or DtypeEnum(made.grad_accum_dtype)


@pytest.mark.parametrize("name", [*SHARED_SETTINGS.values()])
def test_ranges_are_those_of_the_options(tmp_path: Path, name: str) -> None:
    """The file's values replace options that have been checked already."""
    (keys,) = [keys for keys, option in SHARED_SETTINGS.items() if option == name]
    if name == "precision":
        return
    is_count = isinstance(TrainOptions().flat()[name], int)
    for value in (-1, 0, 1, 2, 1e-5, 0.5, -0.5, math.inf):
        if is_count and not float(value).is_integer():
            continue  # the command line accepts whole numbers only
        is_allowed = check_options(TrainOptions().replace(**{name: value})) == []
        assert (problem_of(tmp_path, ".".join(keys), json.dumps(value)) is None) == is_allowed, value


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_odd_allgather_bucket(tmp_path: Path, stage: int) -> None:
    path = tmp_path / "ds.json"
    path.write_text(f'{{"{ZERO}": {{"stage": {stage},\n"allgather_bucket_size": 5e0}}}}')
    if stage in (0, 3):
        assert read_ds_config(path).get((ZERO, "allgather_bucket_size")) == 5
        return
    with pytest.raises(InputError) as caught:
        read_ds_config(path)
    expected = f"must be even at stages 1 and 2; is 5, the stage is {stage}"
    assert caught.value.problems == [f"{path}:2: {ZERO}.allgather_bucket_size: {expected}"]


def test_all_values_and_repeated_keys_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        f'{{"steps_per_print": "inf",\n"{ZERO}": {{\n"stage": "two",\n"offload_param": {{"device": "cpu"}},\n'
        f'"stage": null,\n"overlap_comm": []}},\n"wall_clock_breakdown": "yes"\n}}'
    )
    with pytest.raises(InputError) as caught:
        read_ds_config(path)
    starts = [
        f"5: {ZERO}.stage: is given twice, first in line 3; remove one of them",
        '1: steps_per_print: must be a whole number, 1 or more; is "inf"',
        f"5: {ZERO}.stage: must be 0, 1, 2 or 3; is null",
        f"6: {ZERO}.overlap_comm: must be true or false; is []",
        '7: wall_clock_breakdown: must be true or false; is "yes"',
    ]
    for problem, start in zip(caught.value.problems, starts, strict=True):
        assert problem.startswith(f"{path}:{start}")


@pytest.mark.slow
@pytest.mark.parametrize("dry_run", ["", "--dry_run"])
def test_command_ends_before_anything_is_loaded(tmp_path: Path, dry_run: str) -> None:
    """A case of the issue: accelerate's users paste "inf", and DeepSpeed fails after the first step."""
    path = tmp_path / "ds.json"
    path.write_text(f'{{"train_batch_size": "auto",\n"steps_per_print": "inf",\n"{ZERO}": {{"stage": 2}}}}')
    options = f"--deepspeed {path} --precision fp32 --max_steps 2 --output_dir {tmp_path / 'run'} {dry_run}"
    done = run_script("train", [*RANDOM, *options.split()], tmp_path)
    assert done.returncode == 2, done.stderr[-4000:]
    assert done.stderr.splitlines()[-1] == (
        f'error: {path}:2: steps_per_print: must be a whole number, 1 or more; is "inf"; leave it out to print nothing'
    )


@pytest.mark.slow
def test_unusual_values_train(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        f"""{{"train_batch_size": 2.0, "gradient_accumulation_steps": 1e0, "gradient_clipping": 1, "bf16": null,
        "steps_per_print": Infinity, "wall_clock_breakdown": 0, "communication_data_type": "FP32",
        "fp16": {{"enabled": "auto", "loss_scale": 0}}, "data_types": {{"grad_accum_dtype": null}},
        "optimizer": {{"type": "adamw", "params": {{"lr": 1e-4, "betas": "auto"}}}},
        "{ZERO}": {{"stage": "2", "reduce_bucket_size": "5_000", "allgather_bucket_size": 5e3, "overlap_comm": "no",
        "stage3_max_live_parameters": 1e20, "offload_param": null, "offload_optimizer": {{}}}}}}"""
    )
    options = f"--deepspeed {path} --precision fp32 --max_steps 2 --output_dir {tmp_path / 'run'} --no_report"
    done = run_script("train", [*RANDOM, *options.split()], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
