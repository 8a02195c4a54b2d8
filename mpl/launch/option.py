"""One setting of a run: its declaration, its text on the command line, its rule."""

import dataclasses
import difflib
import math as math_lib
import numbers
import os
import types
import typing
from collections.abc import Sequence
from typing import Any

from mpl.errors import ConfigError

NoneType: Any = types.NoneType
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    math: bool = True,
) -> Any:
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
    bounds = {
        "at least": minimum, "above": above, "at most": maximum, "below": below
    }  # fmt: skip
    metadata = dict(help=help, choices=tuple(choices), bounds=bounds, math=math)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def kinds(field: dataclasses.Field) -> set[Any]:
    """Returns the types that a field with a resolved annotation takes."""
    return set(typing.get_args(field.type) or (field.type,))


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
    takes, choices = kinds(field), field.metadata["choices"]
    if value is None and NoneType in takes:
        return None
    if isinstance(value, bool):
        if bool in takes:
            return value
    elif isinstance(value, numbers.Integral) and int in takes:
        if _within(field, int(value)):
            return int(value)
    elif isinstance(value, numbers.Real) and float in takes:
        if _within(field, float(value)):
            return float(value)
    elif isinstance(value, (str, os.PathLike)) and str in takes:
        text = os.fspath(value)
        if text in choices or not choices and text and "\n" not in text:
            return text
    near = difflib.get_close_matches(str(value), choices, 1)
    example = near[0] if near else f"{written(field.default)}, its default"
    raise ConfigError(
        f"`{field.name}` ({value}) must be {rule(field)}.",
        f"Write --{field.name}={example}.",
    )


def _within(field: dataclasses.Field, value: float) -> bool:
    bounds = field.metadata["bounds"]
    return (
        math_lib.isfinite(value)
        and (bounds["at least"] is None or value >= bounds["at least"])
        and (bounds["above"] is None or value > bounds["above"])
        and (bounds["at most"] is None or value <= bounds["at most"])
        and (bounds["below"] is None or value < bounds["below"])
    )


def rule(field: dataclasses.Field) -> str:
    """Says in words what values a field takes."""
    given = {word: b for word, b in field.metadata["bounds"].items() if b is not None}
    bounds = " and ".join(f"{word} {bound}" for word, bound in given.items())
    parts = list(field.metadata["choices"])
    for kind, words in KINDS.items():
        if kind in kinds(field) and not (kind is str and parts):
            parts.append(f"{words} {bounds}" if kind in (int, float) else words)
    if NoneType in kinds(field):
        parts.append("none")
    parts = [part.strip() for part in parts]
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def suggestion(name: str, names: Sequence[str]) -> str:
    """Returns the remedy for an unknown flag: the nearest one, and where all are."""
    near = difflib.get_close_matches(name, names, 1)
    return (f"Did you mean --{near[0]}? " if near else "") + "--helpfull lists all."
