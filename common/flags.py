"""Dataclass fields as command-line flags: their texts are parsed, checked and kept as JSON in one place."""

import argparse
import difflib
import json
import math
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from common.errors import UserError, did_you_mean

ConfigType = TypeVar("ConfigType")
Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is expected in words


def at_least(low: float) -> Rule:
    return lambda value: value >= low, f"at least {low}"


def between(low: float, high: float) -> Rule:
    return lambda value: low <= value <= high, f"{low} to {high}"


ABOVE_0: Rule = lambda value: value > 0, "above 0"
BELOW_1: Rule = lambda value: 0 <= value < 1, "at least 0 and below 1"


def flag(
    default: Any,
    help: str,
    unit: str = "",
    rule: Rule | None = None,
    predicts: bool = False,
    names: Literal["", "runs", "weights"] = "",
) -> Any:
    """A field that is also a command-line flag, with its default, help line, unit and rule for allowed values.

    Numbers must always be finite; a tuple's rule applies to each of its numbers. A flag that `predicts` is also one of
    `make predict`: it changes the predictions, but not the training. `names` marks a flag that names runs, or weights
    (imagenet, none or a path): these may exist on this machine only, which `make kernel` checks.
    """
    facts = {"help": help, "unit": unit, "rule": rule, "predicts": predicts, "names": names}
    return field(default=default, metadata=facts)


def cache_flag() -> Any:
    """The flag `cache_gb` of competitions whose images are kept resized (common.vision.store)."""
    what = "resized images are kept in one file up to this size; 0 decodes every time"
    return flag(20.0, what, "GB", at_least(0), predicts=True)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError, and suggests the nearest flag for an unknown one."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}. See: {self.prog} --help")

    def parse_args(self, args: list[str]) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            hint = did_you_mean(unknown[0].split("=")[0], flags, cutoff=0.5)
            raise UserError(f"unknown flag {unknown[0]}.{hint} See: {self.prog} --help")
        return known


class Joined(argparse.Action):
    """A flag of values separated by commas that may be given again: "--oof a --oof b" is "--oof a,b"."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, ",".join(filter(None, (getattr(namespace, self.dest), values))))


def add_flags(parser: argparse.ArgumentParser, config: Any) -> None:
    """Give `parser` a flag for every field of the config's class; the help shows `config`'s values as the defaults."""
    for item in fields(config):
        unit = item.metadata.get("unit", "")
        add_flag(parser, type(config), item, f"{value_text(getattr(config, item.name))}{' ' + unit if unit else ''}")


def add_flag(parser: argparse.ArgumentParser, config_class: type, item: Field, default: str) -> None:
    hint = get_type_hints(config_class)[item.name]
    parser.add_argument(
        f"--{item.name.replace('_', '-')}",
        dest=item.name,
        default=MISSING,
        metavar=_type_text(hint),
        help=f"{item.metadata.get('help', '')} [{default}]".replace("%", "%%"),
        **({"nargs": "?", "const": "true"} if hint is bool else {}),
    )


def with_given(config: ConfigType, given: argparse.Namespace) -> ConfigType:
    """`config` with the fields that were given on the command line replaced."""
    hints = get_type_hints(type(config))
    values = {item.name: getattr(given, item.name, MISSING) for item in fields(config)}
    changes = {
        name: _parse_value(name.replace("_", "-"), hints[name], text)
        for name, text in values.items()
        if text is not MISSING
    }
    return replace(config, **changes)


def with_checked_values(config: ConfigType, base: type) -> ConfigType:
    """`config` with values of the declared types; raises UserError for a value that a rule of its field forbids.

    A field that a subclass of `base` redefines without a rule keeps the rule of `base`.
    """
    hints = get_type_hints(type(config))
    values = {item.name: _as_flag(item.name, hints[item.name], getattr(config, item.name)) for item in fields(config)}
    config = replace(config, **values)
    inherited = {item.name: item.metadata["rule"] for item in fields(base)}
    for item in fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise refused(item.name, value, f"one of {', '.join(map(str, get_args(hint)))}{_nearest(value, hint)}")
        rule = item.metadata.get("rule") or inherited.get(item.name) or (lambda value: True, "a finite number")
        holds, expected = rule
        for number in value if isinstance(value, tuple) else (value,):
            if (isinstance(number, float) and not math.isfinite(number)) or not holds(number):
                raise refused(item.name, value, expected)
    return config


def to_json(config: Any) -> str:
    return json.dumps({item.name: getattr(config, item.name) for item in fields(config)}, indent=2)


def from_values(config_class: type[ConfigType], values: dict[str, Any]) -> ConfigType:
    """The config that `to_json` wrote; raises UserError when it has fields that `config_class` does not have.

    A flag that is newer than the run gets its default. So the default of a new flag must be the earlier behaviour.
    Values of other types, as a hand may have written them, are converted or refused like those of flags.
    """
    if gone := sorted(values.keys() - {item.name for item in fields(config_class)}):
        raise UserError(f"the run has settings that this version no longer has ({', '.join(gone)}): train it again")
    hints = get_type_hints(config_class)
    try:
        for name, value in values.items():
            if value is None and type(None) not in get_args(hints[name]):
                raise refused(name, "null", _type_text(hints[name]))
        return config_class(**{name: _as_flag(name, hints[name], value) for name, value in values.items()})
    except UserError as error:
        raise UserError(f"config.json of the run: {error}") from error


def _as_flag(name: str, hint: Any, value: Any) -> Any:
    """Convert a recipe's value to what its flag and config.json would give: fold=0 becomes "0", a list a tuple."""
    if isinstance(value, list):
        return tuple(value)
    is_word = hint in (bool, int, float, str) or get_origin(hint) in (Union, types.UnionType)
    return _parse_value(name, hint, value_text(value)) if is_word and value is not None else value


def _parse_value(name: str, hint: Any, text: str) -> Any:
    """Parse a flag's text as its type; raises UserError naming the flag, the value and what is expected."""
    for choice in _choices(hint):
        if text == str(choice):
            return choice
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        values = tuple(_parse_value(name, item, part) for part in text.replace("x", ",").split(",") if part)
        expected = len(get_args(hint)) if get_args(hint)[-1] is not Ellipsis else len(values)
        if len(values) != expected:
            raise UserError(f"--{name} {text}: expected {expected} values separated by commas, found {len(values)}")
        return values
    if hint is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() in words:
            return words[text.lower()]
    kinds = [part for part in (get_args(hint) or (hint,)) if part in (int, float, str)]
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    raise refused(name, text, f"{_type_text(hint)}{_nearest(text, hint)}")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The literal values that a type allows: Literal["a", "b"] and int | Literal["auto"] alike."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for part in get_args(hint) for choice in _choices(part))
    return ()


def _type_text(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return ",".join(_type_text(item) for item in get_args(hint) if item is not Ellipsis)
    names = [part.__name__ for part in (get_args(hint) or (hint,)) if isinstance(part, type)]
    return "|".join([*names, *map(str, _choices(hint))]).replace("bool", "true|false")


def value_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def refused(name: str, value: Any, expected: str) -> UserError:
    return UserError(f"--{name.replace('_', '-')} {value_text(value)}: expected {expected}. See --help")


def _nearest(value: Any, hint: Any) -> str:
    near = difflib.get_close_matches(str(value), map(str, _choices(hint)), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
