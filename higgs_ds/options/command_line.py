"""The command line, and files of options (`--config`): what was given, by name. Without torch, for a quick `--help`."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.options.commands import (
    ConvertOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    InspectOptions,
    MergeOptions,
    PrepareOptions,
)
from higgs_ds.options.options_file import read_options_file
from higgs_ds.options.parser import Parser, add_options
from higgs_ds.options.train import DataOptions, ModelOptions, TrainOptions


def _called(script: str, usage: str, prog: str | None) -> dict[str, str]:
    """A parser's name and usage, those of a script of launch/ unless it was started by another name."""
    if prog is None:
        return {"prog": script, "usage": usage}
    return {"prog": prog, "usage": prog + usage[usage.index(script) + len(script) :]}


def parse_train_options(argv: Sequence[str] | None = None, prog: str | None = None) -> tuple[TrainOptions, set[str]]:
    """The options of launch/train.py, and which of them were given, on the command line or in a file."""
    parser = Parser(
        **_called("launch/train.py", "deepspeed launch/train.py [--config FILE] [--deepspeed FILE] [options]", prog),
        description="Train Higgs Audio v2: adapters, or its own weights. Without options: built-in base and samples.",
    )
    for group_class in typing.get_type_hints(TrainOptions).values():
        add_options(parser, group_class)
    _add_common(parser)
    given = _given_with_file(parser, argv)
    return TrainOptions().replace(**given), set(given)


def parse_prepare_options(
    argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[DataOptions, ModelOptions, PrepareOptions]:
    """The options of launch/prepare.py; those of the data and the base are the ones of training, as is its file."""
    groups = (DataOptions, ModelOptions, PrepareOptions)
    parser = Parser(
        **_called("launch/prepare.py", "[deepspeed|python] launch/prepare.py --train_manifest PATH [options]", prog),
        description="Check manifests, and encode their audio once, ahead of training.",
    )
    for group_class in groups:
        add_options(parser, group_class)
    _add_common(parser)
    given = _given_with_file(parser, argv, also_known=TrainOptions().flat())
    made = [group(**{f.name: given[f.name] for f in dataclasses.fields(group) if f.name in given}) for group in groups]
    return typing.cast(tuple[DataOptions, ModelOptions, PrepareOptions], tuple(made))


def _add_local_rank(parser: Parser) -> None:
    """What the deepspeed launcher gives to every script."""
    parser.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_common(parser: Parser) -> None:
    _add_local_rank(parser)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="options by name in a YAML or JSON file, such as a run's settings.json; those given here overrule it",
    )


def _given_with_file(parser: Parser, argv: Sequence[str] | None, also_known: Iterable[str] = ()) -> dict[str, Any]:
    given = parser.given_options(argv)
    given.pop("local_rank", None)
    path = given.pop("config", None)
    if path is None:
        return given
    try:
        return read_options_file(path, parser, also_known) | given
    except InputError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


def parse_merge_options(argv: Sequence[str] | None = None, prog: str | None = None) -> MergeOptions:
    """The options of launch/merge.py."""
    parser = Parser(
        **_called(
            "launch/merge.py",
            "python launch/merge.py --base_model_path BASE --lora_adapter_path DIR --output_path DIR [options]",
            prog,
        ),
        description="Merge a LoRA adapter into its base, in float32, tensor by tensor; the result loads by itself.",
    )
    return parser.parse_group(MergeOptions, argv)


def parse_export_options(argv: Sequence[str] | None = None, prog: str | None = None) -> ExportOptions:
    """The options of launch/export.py."""
    parser = Parser(
        **_called(
            "launch/export.py", "python launch/export.py --checkpoint_path DIR --output_path DIR [options]", prog
        ),
        description="Make a complete model of a checkpoint of a run with --finetune full; it loads by itself.",
    )
    return parser.parse_group(ExportOptions, argv)


def parse_convert_options(argv: Sequence[str] | None = None, prog: str | None = None) -> ConvertOptions:
    """The options of launch/convert.py."""
    parser = Parser(
        **_called(
            "launch/convert.py",
            "python launch/convert.py --input_path DIR --output_path DIR --to native|original",
            prog,
        ),
        description="Write a base, a merged model or an adapter in the other of the two layouts, without loss.",
    )
    return parser.parse_group(ConvertOptions, argv)


def parse_generate_options(argv: Sequence[str] | None = None, prog: str | None = None) -> GenerateOptions:
    """The options of launch/generate.py."""
    parser = Parser(
        **_called("launch/generate.py", "python launch/generate.py --text TEXT [options]", prog),
        description="Speak a text with a base, an adapter or a merged model.",
    )
    return parser.parse_group(GenerateOptions, argv)


def parse_evaluate_options(argv: Sequence[str] | None = None, prog: str | None = None) -> EvaluateOptions:
    """The options of launch/evaluate.py."""
    parser = Parser(
        **_called("launch/evaluate.py", "[deepspeed|python] launch/evaluate.py --test_manifest PATH [options]", prog),
        description="Have a model say what held-out samples say, and measure how far it is from them.",
    )
    add_options(parser, EvaluateOptions)
    _add_local_rank(parser)
    given = parser.given_options(argv)
    return EvaluateOptions(**{name: value for name, value in given.items() if name != "local_rank"})


def parse_inspect_options(command: str, argv: Sequence[str] | None = None, prog: str | None = None) -> InspectOptions:
    """The options of the commands that look at adapters and checkpoints."""
    what, meant = INSPECTED[command]
    parser = Parser(prog=prog or f"launch/{command}.py", description=what)
    parser.add_argument("path", type=Path, nargs="?", default=Path(), help=f"{meant} [.]")
    if command == "validate_adapter":
        parser.add_argument("--base_model_path", metavar="BASE", help="also see whether it fits this base")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return InspectOptions(**vars(parser.parse_args(argv)))


INSPECTED = {
    "find_lora_adapters": ("List the adapters below a folder, with what is known of each.", "a folder"),
    "validate_checkpoint_dir": ("Check a checkpoint-N/ folder, and say what is missing.", "a checkpoint-N folder"),
    "validate_adapter": ("Check an adapter: whole, finite, trained, and for which base.", "an adapter's folder"),
}
