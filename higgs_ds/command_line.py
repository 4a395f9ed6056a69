"""The command line, and files of options (`--config`): what was given, by name. Without torch, for a quick `--help`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from higgs_ds.config import (
    PROJECT_ROOT,
    REQUIRED,
    ConvertOptions,
    DataOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    InspectOptions,
    MergeOptions,
    ModelOptions,
    PrepareOptions,
    TrainOptions,
)
from higgs_ds.errors import InputError

T = typing.TypeVar("T")
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def add_options(parser: Parser, group_class: type) -> None:
    """Add one dataclass of options to a parser. Options that are not given do not appear in its result."""
    group = parser.add_argument_group(group_class.__doc__)
    hints = typing.get_type_hints(group_class)
    for option_field in dataclasses.fields(group_class):
        meta = option_field.metadata
        default: Any = option_field.default
        value_type, many = _value_type(hints[option_field.name])
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": meta["help"]}
        if value_type is bool:
            kwargs["action"] = "store_true"
        else:
            metavar = meta["metavar"] or (None if meta["choices"] else METAVARS[value_type])
            kwargs.update(type=value_type, choices=meta["choices"], metavar=metavar)
            if many:
                kwargs["nargs"] = "+"
            if default is REQUIRED:
                kwargs["required"] = True
            elif default is not None:
                shown = " ".join(map(str, default)) if many else _shown_default(default)
                kwargs["help"] += f" [{shown}]"
        group.add_argument(f"--{option_field.name}", **kwargs)


def _shown_default(default: Any) -> str:
    if isinstance(default, Path) and default.is_relative_to(PROJECT_ROOT):
        return str(default.relative_to(PROJECT_ROOT))
    return str(default)


def _value_type(hint: Any) -> tuple[Any, bool]:
    """The type that a command line value is turned into, and whether an option takes several."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


class Parser(argparse.ArgumentParser):
    """A parser that asks, of an option that there is not, which one was meant; options are never abbreviated."""

    def __init__(self, **shown: Any) -> None:
        super().__init__(**shown, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        meant = [meant_option(name.removeprefix("--"), self.names()) for name in unknown]
        super().error(message + "".join(meant))

    def names(self) -> list[str]:
        """Every option's name, without its dashes."""
        return [name.removeprefix("--") for action in self._actions for name in action.option_strings]

    def parse_group(self, group_class: type[T], argv: Sequence[str] | None) -> T:
        """Parse one group of options, which is all that a command has."""
        add_options(self, group_class)
        return group_class(**_given(self, argv))


def meant_option(name: str, known: Sequence[str]) -> str:
    """A question for an unknown name that is close to a known one."""
    close = difflib.get_close_matches(name.replace("-", "_"), known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def parse_train_options(argv: Sequence[str] | None = None) -> tuple[TrainOptions, set[str]]:
    """The options of launch/train.py, and which of them were given, on the command line or in a file."""
    parser = Parser(
        prog="launch/train.py",
        usage="deepspeed launch/train.py [--config FILE] [--deepspeed FILE] [options]",
        description="Train Higgs Audio v2: adapters, or its own weights. Without options: built-in base and samples.",
    )
    for group_class in typing.get_type_hints(TrainOptions).values():
        add_options(parser, group_class)
    _add_common(parser)
    given = _given_with_file(parser, argv)
    return TrainOptions().replace(**given), set(given)


def parse_prepare_options(argv: Sequence[str] | None = None) -> tuple[DataOptions, ModelOptions, PrepareOptions]:
    """The options of launch/prepare.py; those of the data and the base are the ones of training, as is its file."""
    groups = (DataOptions, ModelOptions, PrepareOptions)
    parser = Parser(
        prog="launch/prepare.py",
        usage="[deepspeed|python] launch/prepare.py --train_manifest PATH [options]",
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
    given = _given(parser, argv)
    given.pop("local_rank", None)
    path = given.pop("config", None)
    if path is None:
        return given
    try:
        return read_options_file(path, parser, also_known) | given
    except InputError as error:
        parser.exit(error.exit_code, f"error: {error}\n")


def read_options_file(path: Path, parser: Parser, also_known: Iterable[str] = ()) -> dict[str, Any]:
    """Options by name from a YAML or JSON file; null leaves an option at its default.

    Args:
        also_known: names that are passed over.

    Raises InputError with all that is wrong.
    """
    where = f"--config {path}"
    values = _read(path, where)
    if not isinstance(values, dict):
        raise InputError(f"{where}: must hold options by name, for instance lr: 0.0002")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config", "local_rank")}
    known = actions.keys() | set(also_known)
    problems, made = [], {}
    for name, value in values.items():
        if name not in known:
            problems.append(f"{where}: {name}: there is no such option{meant_option(str(name), sorted(known))}")
        elif name in actions and value is not None:
            try:
                made[name] = _converted(actions[name], value)
            except (TypeError, ValueError):
                problems.append(f"{where}: {name}: {value!r} is not {_expected(actions[name])}")
    if problems:
        raise InputError(problems)
    return made


def _read(path: Path, where: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{where}: is no YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise InputError(f"{where}: is no JSON: {error}") from error


def _converted(action: argparse.Action, value: Any) -> Any:
    """A value of a file as the command line would give it. Raises TypeError, ValueError where it could not."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if action.nargs == "+":
        return tuple(_one(action, each) for each in (value if isinstance(value, list) else [value]))
    return _one(action, value)


def _one(action: argparse.Action, value: Any) -> Any:
    number = action.type in (int, float)
    if isinstance(value, bool) or not isinstance(value, (int, float, str) if number else str):
        raise TypeError
    if action.type is int and isinstance(value, float):
        raise TypeError
    made = typing.cast(Callable[[Any], Any], action.type)(value)
    if action.choices is not None and made not in action.choices:
        raise ValueError
    return made


def _expected(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "true or false"
    kinds = {int: "a whole number", float: "a number", str: "a text", Path: "a path, a text"}
    one = f"one of {', '.join(map(str, action.choices))}" if action.choices else kinds[typing.cast(type, action.type)]
    return f"a list of which each is {one}" if action.nargs == "+" else one


def parse_merge_options(argv: Sequence[str] | None = None) -> MergeOptions:
    """The options of launch/merge.py."""
    parser = Parser(
        prog="launch/merge.py",
        usage="python launch/merge.py --base_model_path BASE --lora_adapter_path DIR --output_path DIR [options]",
        description="Merge a LoRA adapter into its base, in float32, tensor by tensor; the result loads by itself.",
    )
    return parser.parse_group(MergeOptions, argv)


def parse_export_options(argv: Sequence[str] | None = None) -> ExportOptions:
    """The options of launch/export.py."""
    parser = Parser(
        prog="launch/export.py",
        usage="python launch/export.py --checkpoint_path DIR --output_path DIR [options]",
        description="Make a complete model of a checkpoint of a run with --finetune full; it loads by itself.",
    )
    return parser.parse_group(ExportOptions, argv)


def parse_convert_options(argv: Sequence[str] | None = None) -> ConvertOptions:
    """The options of launch/convert.py."""
    parser = Parser(
        prog="launch/convert.py",
        usage="python launch/convert.py --input_path DIR --output_path DIR --to native|original",
        description="Write a base, a merged model or an adapter in the other of the two layouts, without loss.",
    )
    return parser.parse_group(ConvertOptions, argv)


def parse_generate_options(argv: Sequence[str] | None = None) -> GenerateOptions:
    """The options of launch/generate.py."""
    parser = Parser(
        prog="launch/generate.py",
        usage="python launch/generate.py --text TEXT [options]",
        description="Speak a text with a base, an adapter or a merged model.",
    )
    return parser.parse_group(GenerateOptions, argv)


def parse_evaluate_options(argv: Sequence[str] | None = None) -> EvaluateOptions:
    """The options of launch/evaluate.py."""
    parser = Parser(
        prog="launch/evaluate.py",
        usage="[deepspeed|python] launch/evaluate.py --test_manifest PATH [options]",
        description="Have a model say what held-out samples say, and measure how far it is from them.",
    )
    add_options(parser, EvaluateOptions)
    _add_local_rank(parser)
    given = _given(parser, argv)
    return EvaluateOptions(**{name: value for name, value in given.items() if name != "local_rank"})


def _given(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    values = vars(parser.parse_args(argv))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def parse_inspect_options(prog: str, argv: Sequence[str] | None = None) -> InspectOptions:
    """The options of the commands that look at adapters and checkpoints."""
    what, meant = INSPECTED[prog]
    parser = Parser(prog=f"launch/{prog}.py", description=what)
    parser.add_argument("path", type=Path, nargs="?", default=Path(), help=f"{meant} [.]")
    if prog == "validate_adapter":
        parser.add_argument("--base_model_path", metavar="BASE", help="also see whether it fits this base")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return InspectOptions(**vars(parser.parse_args(argv)))


INSPECTED = {
    "find_lora_adapters": ("List the adapters below a folder, with what is known of each.", "a folder"),
    "validate_checkpoint_dir": ("Check a checkpoint-N/ folder, and say what is missing.", "a checkpoint-N folder"),
    "validate_adapter": ("Check an adapter: whole, finite, trained, and for which base.", "an adapter's folder"),
}
