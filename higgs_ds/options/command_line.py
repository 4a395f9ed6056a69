"""Parse command lines and options files (`--config`). Does not import torch, so that `--help` is fast."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.options.commands import (
    BlendOptions,
    ConvertOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    InspectOptions,
    MergeOptions,
    PreferOptions,
    PrepareOptions,
)
from higgs_ds.options.flags import FlagOptions
from higgs_ds.options.options_file import read_options_file
from higgs_ds.options.parser import Parser, add_options
from higgs_ds.options.reviewing import ReviewOptions
from higgs_ds.options.slicing import SliceOptions
from higgs_ds.options.train import DataOptions, ModelOptions, TrainOptions


def _usage(script: str, usage: str, prog: str | None) -> dict[str, str]:
    """Return the parser's `prog` and `usage`: those of the script in launch/, unless `prog` names another program."""
    if prog is None:
        return {"prog": script, "usage": usage}
    return {"prog": prog, "usage": prog + usage[usage.index(script) + len(script) :]}


def parse_train_options(argv: Sequence[str] | None = None, prog: str | None = None) -> tuple[TrainOptions, set[str]]:
    """Parse the options of launch/train.py. Return them, and the names of those that were given, also in a file."""
    parser = Parser(
        **_usage("launch/train.py", "deepspeed launch/train.py [--config FILE] [--deepspeed FILE] [options]", prog),
        description="Fine-tune Higgs Audio: train LoRA adapters, or the model's own weights. Without options, the "
        "built-in base model is trained on the built-in samples.",
    )
    for group_class in typing.get_type_hints(TrainOptions).values():
        add_options(parser, group_class)
    _add_common_options(parser)
    given = _given_options(parser, argv)
    options = TrainOptions().replace(**given)
    if options.objective.is_dpo and "lora_dropout" not in given:
        options = options.replace(lora_dropout=0.0)  # it would hide what one step changes in a log-probability
    return options, set(given)


def parse_prepare_options(
    argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[DataOptions, ModelOptions, PrepareOptions, FlagOptions]:
    """Parse the options of launch/prepare.py, which shares the data and model options and options files of training."""
    groups = (DataOptions, ModelOptions, PrepareOptions, FlagOptions)
    parser = Parser(
        **_usage("launch/prepare.py", "[deepspeed|python] launch/prepare.py --train_manifest PATH [options]", prog),
        description="Check manifests, and encode their audio into the cache before training.",
    )
    for group_class in groups:
        add_options(parser, group_class)
    _add_common_options(parser)
    given = _given_options(parser, argv, also_known=TrainOptions().flat())
    parsed = [
        group(**{f.name: given[f.name] for f in dataclasses.fields(group) if f.name in given}) for group in groups
    ]
    return typing.cast(tuple[DataOptions, ModelOptions, PrepareOptions, FlagOptions], tuple(parsed))


def _add_local_rank(parser: Parser) -> None:
    """Accept the option that the deepspeed launcher passes to every script."""
    parser.add_argument("--local_rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add_common_options(parser: Parser) -> None:
    _add_local_rank(parser)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML or JSON file with options by name, for instance a run's settings.json; options on the command line "
        "override it",
    )


def _given_options(parser: Parser, argv: Sequence[str] | None, also_known: Iterable[str] = ()) -> dict[str, Any]:
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
    """Parse the options of launch/merge.py."""
    parser = Parser(
        **_usage(
            "launch/merge.py",
            "python launch/merge.py --lora_adapter_path DIR --output_path DIR [options]",
            prog,
        ),
        description="Merge a LoRA adapter into its base model, in float32, tensor by tensor. The merged model loads "
        "on its own.",
    )
    return parser.parse_group(MergeOptions, argv)


def parse_blend_options(argv: Sequence[str] | None = None, prog: str | None = None) -> BlendOptions:
    """Parse the options of launch/blend.py."""
    parser = Parser(
        **_usage(
            "launch/blend.py",
            "python launch/blend.py ADAPTER=WEIGHT [ADAPTER=WEIGHT ...] --output_path DIR [options]",
            prog,
        ),
        description="Make one LoRA adapter whose change of each weight is the weighted sum of other adapters' changes.",
    )
    return parser.parse_group(BlendOptions, argv)


def parse_export_options(argv: Sequence[str] | None = None, prog: str | None = None) -> ExportOptions:
    """Parse the options of launch/export.py."""
    parser = Parser(
        **_usage("launch/export.py", "python launch/export.py --checkpoint_path DIR --output_path DIR [options]", prog),
        description="Write a checkpoint of a run with --finetune full as a complete model, which loads on its own.",
    )
    return parser.parse_group(ExportOptions, argv)


def parse_convert_options(argv: Sequence[str] | None = None, prog: str | None = None) -> ConvertOptions:
    """Parse the options of launch/convert.py."""
    parser = Parser(
        **_usage(
            "launch/convert.py",
            "python launch/convert.py --input_path DIR --output_path DIR --to native|original",
            prog,
        ),
        description="Convert a base model, a merged model or an adapter to the other of the two layouts, without loss.",
    )
    return parser.parse_group(ConvertOptions, argv)


def parse_generate_options(argv: Sequence[str] | None = None, prog: str | None = None) -> GenerateOptions:
    """Parse the options of launch/generate.py."""
    parser = Parser(
        **_usage("launch/generate.py", "python launch/generate.py --text TEXT [options]", prog),
        description="Generate speech from text with a base model, an adapter or a merged model.",
    )
    return parser.parse_group(GenerateOptions, argv)


def parse_evaluate_options(argv: Sequence[str] | None = None, prog: str | None = None) -> EvaluateOptions:
    """Parse the options of launch/evaluate.py."""
    parser = Parser(
        **_usage("launch/evaluate.py", "[deepspeed|python] launch/evaluate.py --test_manifest PATH [options]", prog),
        description="Generate the speech of held-out samples, and measure how far it is from the recordings.",
    )
    add_options(parser, EvaluateOptions)
    _add_local_rank(parser)
    given = parser.given_options(argv)
    return EvaluateOptions(**{name: value for name, value in given.items() if name != "local_rank"})


def parse_prefer_options(argv: Sequence[str] | None = None, prog: str | None = None) -> PreferOptions:
    """Parse the options of launch/prefer.py."""
    parser = Parser(
        **_usage("launch/prefer.py", "[deepspeed|python] launch/prefer.py --manifest PATH [options]", prog),
        description="Speak each text of a manifest several times, score what was spoken, and write pairs of a better "
        "and a worse rendering, to train on. A command that was ended goes on where it was.",
    )
    add_options(parser, PreferOptions)
    _add_local_rank(parser)
    given = parser.given_options(argv)
    return PreferOptions(**{name: value for name, value in given.items() if name != "local_rank"})


def parse_slice_options(argv: Sequence[str] | None = None, prog: str | None = None) -> SliceOptions:
    """Parse the options of launch/slice.py."""
    parser = Parser(
        **_usage(
            "launch/slice.py",
            "python launch/slice.py RECORDING [RECORDING ...] --output_dir DIR "
            "(--subtitles PATH [PATH ...] | --recognizer RECOGNIZER) [options]",
            prog,
        ),
        description="Cut long recordings in their pauses into a folder of clips with their texts, which trains as it "
        "is. A command that was ended goes on where it was.",
    )
    return parser.parse_group(SliceOptions, argv)


def parse_review_options(argv: Sequence[str] | None = None, prog: str | None = None) -> ReviewOptions:
    """Parse the options of launch/review.py."""
    parser = Parser(
        **_usage("launch/review.py", "python launch/review.py FOLDER_OR_LIST [options]", prog),
        description="Check the clips of a list by ear, on a page on this machine: correct their texts, and drop clips. "
        "Every change is written into the list at once.",
    )
    return parser.parse_group(ReviewOptions, argv)


def parse_inspect_options(command: str, argv: Sequence[str] | None = None, prog: str | None = None) -> InspectOptions:
    """Parse the options of a command that inspects adapters or checkpoints."""
    description, path_help = INSPECTED[command]
    parser = Parser(prog=prog or f"launch/{command}.py", description=description)
    parser.add_argument("path", type=Path, nargs="?", default=Path(), help=f"{path_help} [.]")
    if command == "validate_adapter":
        parser.add_argument(
            "--base_model_path", metavar="BASE", help="also check that the adapter fits this base model"
        )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return InspectOptions(**vars(parser.parse_args(argv)))


INSPECTED = {
    "find_lora_adapters": ("List the adapters below a folder, with what is known about each.", "folder to search"),
    "validate_checkpoint_dir": ("Check a checkpoint-N/ folder, and report what is missing.", "checkpoint-N/ folder"),
    "validate_adapter": (
        "Check that an adapter is complete, finite and trained, and report its base model.",
        "folder of the adapter",
    ),
}
