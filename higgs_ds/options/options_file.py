"""Options files (`--config`): read, checked, and converted like values of the command line."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from higgs_ds.common.errors import InputError
from higgs_ds.options.parser import Parser, meant_choice, meant_option


def read_options_file(path: Path, parser: Parser, also_known: Iterable[str] = ()) -> dict[str, Any]:
    """Read options by name from a YAML or JSON file; null leaves an option at its default.

    Args:
        also_known: names of options of other commands, which are ignored.

    Raises:
        InputError: with every problem of the file.
    """
    where = f"--config {path}"
    values = _read(path, where)
    if not isinstance(values, dict):
        raise InputError(f"{where}: must map option names to values, for instance lr: 0.0002")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config", "local_rank")}
    known = actions.keys() | set(also_known)
    problems, options = [], {}
    for name, value in values.items():
        if name not in known:
            problems.append(f"{where}: {name}: unknown option{meant_option(str(name), sorted(known))}")
        elif name in actions and value is not None:
            try:
                options[name] = _convert(actions[name], value)
            except (TypeError, ValueError):
                meant = meant_choice(value, actions[name].choices)
                problems.append(f"{where}: {name}: {value!r} is not {_expected_value(actions[name])}{meant}")
    if problems:
        raise InputError(problems)
    return options


def _read(path: Path, where: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error


def _convert(action: argparse.Action, value: Any) -> Any:
    """Convert a value of a file as the command line would. Raises TypeError or ValueError if it is not valid."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if action.nargs == "+":
        return tuple(_convert_single(action, item) for item in (value if isinstance(value, list) else [value]))
    return _convert_single(action, value)


def _convert_single(action: argparse.Action, value: Any) -> Any:
    is_number = action.type in (int, float)
    if isinstance(value, bool) or not isinstance(value, (int, float, str) if is_number else str):
        raise TypeError
    if action.type is int and isinstance(value, float):
        raise TypeError
    converted = typing.cast(Callable[[Any], Any], action.type)(value)
    if action.choices is not None and converted not in action.choices:
        raise ValueError
    return converted


def _expected_value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "true or false"
    kinds = {int: "a whole number", float: "a number", str: "a string", Path: "a path (a string)"}
    kind = f"one of {', '.join(map(str, action.choices))}" if action.choices else kinds[typing.cast(type, action.type)]
    return f"a list whose items are each {kind}" if action.nargs == "+" else kind
