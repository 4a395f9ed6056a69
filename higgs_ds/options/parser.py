"""The parser of a command: options come from dataclasses, and unknown options get a suggestion."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import shlex
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from higgs_ds.common.resources import DS_CONFIGS
from higgs_ds.options.fields import REQUIRED
from higgs_ds.options.other_names import OPTION_OF

T = typing.TypeVar("T")
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def add_options(parser: Parser, group_class: type) -> None:
    """Add a dataclass of options to a parser. Options that are not given do not appear in the parsed result."""
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
            kwargs.update(type=value_type, choices=meta["choices"], metavar=metavar, action=StoreOnce)
            if many:
                kwargs["nargs"] = "+"
            if meta["positional"]:
                group.add_argument(option_field.name, **kwargs)
                continue
            if default is REQUIRED:
                kwargs["required"] = True
            elif default is not None:
                shown = " ".join(map(str, default)) if many else _shown_default(default)
                kwargs["help"] += f" [{shown}]"
        group.add_argument(f"--{option_field.name}", **kwargs)


class StoreOnce(argparse.Action):
    """Store the value of an option; the option given again is an error, because one of the two would be ignored."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, name: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):
            both = " and ".join(shlex.join(_texts(value)) for value in (getattr(namespace, self.dest), values))
            mend = f"give all values after one {name}" if self.nargs == "+" else "leave one out"
            raise argparse.ArgumentError(self, f"given twice, with {both}; {mend}")
        setattr(namespace, self.dest, values)


def _texts(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def _shown_default(default: Any) -> str:
    if isinstance(default, Path) and default.is_relative_to(DS_CONFIGS):
        return str(default.relative_to(DS_CONFIGS.parent))
    return str(default)


def _value_type(hint: Any) -> tuple[Any, bool]:
    """Return the type that a command line value is converted to, and whether the option takes several values."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


class Parser(argparse.ArgumentParser):
    """A parser that suggests a known option for an unknown one. Options cannot be abbreviated."""

    def __init__(self, **shown: Any) -> None:
        super().__init__(**shown, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        meant = [f"; {name}{hint[1:]}" for name in unknown if (hint := meant_option(name, self.names()))]
        super().error(message + "".join(meant))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += meant_choice(value, action.choices)
            raise

    def names(self) -> list[str]:
        """Return the names of all options, without the leading dashes."""
        return [name.removeprefix("--") for action in self._actions for name in action.option_strings]

    def parse_group(self, group_class: type[T], argv: Sequence[str] | None) -> T:
        """Parse the options of a command that has a single group."""
        add_options(self, group_class)
        return group_class(**self.given_options(argv))

    def given_options(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """Return the options given on the command line, by name. Options with several values are tuples."""
        values = vars(self.parse_args(argv))
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def meant_option(name: str, known: Sequence[str]) -> str:
    """Return "; did you mean OPTION?" if an unknown name is another trainer's or close to a known one, otherwise ""."""
    plain = name.removeprefix("--").replace("-", "_")
    option = OPTION_OF.get(plain, "")
    if option.split(" ")[0] not in known:
        option = next(iter(difflib.get_close_matches(plain, known, 1)), "")
    return f"; did you mean {'--' if name.startswith('--') else ''}{option}?" if option else ""


def meant_choice(value: Any, choices: Iterable[Any] | None) -> str:
    """Return "; did you mean CHOICE?" if a value is close to one of an option's choices, otherwise ""."""
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices or ()], 1)
    return f"; did you mean {near[0]}?" if near else ""
