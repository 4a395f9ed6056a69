"""Files of options (`--config`): read, checked, and converted as the command line converts its values."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from higgs_ds.common.errors import InputError
from higgs_ds.options.parser import Parser, meant_option


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
