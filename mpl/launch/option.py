"""One setting of a run: its declaration, its text on the command line, its rule."""

import dataclasses
import difflib
import math as math_lib
import numbers
import operator
import os
import types
import typing
from collections.abc import Sequence
from typing import Any

from mpl.errors import ConfigError

NoneType: Any = types.NoneType
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_TAKEN_AS: dict[type, Any] = {
    bool: bool, int: numbers.Integral, float: numbers.Real, str: (str, os.PathLike)
}  # fmt: skip
_HOLDS = {
    "at least": operator.ge, "above": operator.gt,
    "at most": operator.le, "below": operator.lt,
}  # fmt: skip
_TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def option(
    default: Any, help: str, *, choices: Sequence[str] = (),
    minimum: float | None = None, above: float | None = None,
    maximum: float | None = None, below: float | None = None, math: bool = True,
) -> Any:  # fmt: skip
    """Declares a field of a `RunConfig`, and with it a flag.

    The field's annotation says what the flag takes: `bool`, `int`, `float`, `str` or
    a union of these; with `| None` the flag also takes the word `none`.

    Args:
        default: value when the flag is not given.
        help: a sentence or two, with the unit and the rule behind a default `None`.
        choices: the words that a text may be; empty: any text.
        minimum: least allowed number.
        above: number that the value must exceed.
        maximum: greatest allowed number.
        below: number that the value must stay under.
        math: whether another value changes what training computes, so that a run
            resumed with it needs `--allow_changed_flags`.

    Returns:
        A dataclass field.
    """
    bounds = dict(zip(_HOLDS, (minimum, above, maximum, below)))
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    metadata = dict(help=help, choices=tuple(choices), bounds=given, math=math)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def kinds(field: dataclasses.Field) -> set[Any]:
    """Returns the types that a field with a resolved annotation takes."""
    return set(typing.get_args(field.type) or (field.type,))


def is_option(field: dataclasses.Field) -> bool:
    """Says whether a field has what makes it a flag."""
    return "help" in field.metadata and kinds(field) <= {*_WORDS, NoneType}


def read(field: dataclasses.Field, text: str) -> Any:
    """Returns the value that a command-line text stands for, not yet checked."""
    word = text.strip().lower()
    if NoneType in kinds(field) and word in ("", "none"):
        return None
    if bool in kinds(field) and word in _TRUTH:
        return _TRUTH[word]
    for kind in (int, float):
        try:
            if kind in kinds(field):
                return kind(text)
        except ValueError:
            pass
    return text


def written(value: Any) -> str:
    """Returns the text that `read` turns into this value."""
    return str(value).lower() if value in (None, True, False) else str(value)


def checked(field: dataclasses.Field, value: Any) -> Any:
    """Returns the value in the field's own type.

    Raises:
        ConfigError: the value breaks the field's rule.
    """
    if value is None and NoneType in kinds(field):
        return None
    for kind, taken in _TAKEN_AS.items():
        fits = isinstance(value, taken) and isinstance(value, bool) == (kind is bool)
        if fits and kind in kinds(field) and _keeps_rule(field, kind(value)):
            return kind(value)
    near = difflib.get_close_matches(str(value), field.metadata["choices"], 1)
    example = near[0] if near else f"{written(field.default)}, its default"
    raise ConfigError(
        f"`{field.name}` ({value}) must be {rule(field)}.",
        f"Write --{field.name}={example}.")


def _keeps_rule(field: dataclasses.Field, value: Any) -> bool:
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if isinstance(value, str):
        return value in choices if choices else value != "" and "\n" not in value
    holds = (_HOLDS[word](value, bound) for word, bound in bounds.items())
    return isinstance(value, bool) or math_lib.isfinite(value) and all(holds)


def rule(field: dataclasses.Field) -> str:
    """Says in words what values a field takes."""
    bounds = " and ".join(f"{w} {b}" for w, b in field.metadata["bounds"].items())
    parts = list(field.metadata["choices"])
    for kind, words in _WORDS.items():
        if kind in kinds(field) and not (kind is str and parts):
            parts.append(f"{words} {bounds}" if kind in (int, float) else words)
    parts = [part.strip() for part in parts + ["none"] * (NoneType in kinds(field))]
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def suggestion(name: str, names: Sequence[str]) -> str:
    """Returns the remedy for an unknown flag: the nearest one, and where all are."""
    near = difflib.get_close_matches(name, names, 1)
    return (f"Did you mean --{near[0]}? " if near else "") + "--helpfull lists all."
