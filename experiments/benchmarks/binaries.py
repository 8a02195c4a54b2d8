"""The binaries under experiments/, and what each hands to `mpl.run`."""

import ast
import importlib
import pathlib
from typing import Any

import mpl

FOLDER = pathlib.Path(__file__).parents[1]


def names() -> list[str]:
    """Returns the names of all binaries in order, such as "digits"."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def launched(name: str) -> tuple[type[mpl.Experiment], dict[str, Any]]:
    """Returns the class that a binary runs, and the settings that it gives.

    Raises:
        ValueError: it does not call `mpl.run` once, with a class of its own module.
    """
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    call, = (node for node in ast.walk(tree)
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "mpl.run")
    module = importlib.import_module(f"experiments.{name}")
    settings = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    return getattr(module, ast.unparse(call.args[0])), settings
