"""TOML tables into frozen dataclasses: strict, and with one clear sentence for each mistake.

Used for plans and for the configuration of both programs. A key that no field has is refused with the nearest known
one; a value of the wrong type is refused with what was expected. Only an integer is taken for a float.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from foedus_common.errors import LocalError

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises LocalError for a file that is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LocalError(f"{path} does not exist; give the path of a TOML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LocalError(f"{path} cannot be read: {error}.") from None
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits, or brackets without end
        raise LocalError(f"{path} is not valid TOML: {error}.") from None


def parse(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """One table as an instance of the dataclass `kind`; `where` names it in errors, e.g. "[privacy] in plan.toml".

    Raises LocalError for an unknown key (naming the nearest known one), a missing key or a wrong type.
    """
    hints = _hints(kind)  # type: ignore[arg-type]
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise LocalError(f"{where} has an unknown key {_shown(key)}{_nearest(key, list(fields))}")
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], f"{name!r} in {where}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise LocalError(f"{where} lacks the key {name!r}; add it.")
    return kind(**values)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return (
        f"; did you mean {close[0]!r}?"
        if close
        else f"; there {'are' if len(known) > 1 else 'is'} {', '.join(sorted(known))}."
    )


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            hint_text = _nearest(value, list(arguments)) if isinstance(value, str) else "."
            choices = ", ".join(repr(a) for a in arguments)
            raise LocalError(f"{where} is {_shown(value)}, but must be one of {choices}{hint_text}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise LocalError(f"{where} must be a list, not {_shown(value)}.")
        return tuple(_value(arguments[0], item, f"an item of {where}") for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise LocalError(f"{where} must be a table.")
        return {key: _value(arguments[1], item, f"{_shown(key)} of {where}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise LocalError(f"{where} must be a table.")
        return parse(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise LocalError(f"{where} must be {_ARTICLES[hint]}, not {_shown(value)}.")
    return value


def _shown(value: object) -> str:
    """The value as it was written, cut to what fits a line."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no number of thousands of digits
        return "a number of that length"
    return text if len(text) <= 80 else f"{text[:77]}..."


_LARGEST = int(sys.float_info.max)
_ARTICLES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
