"""Reads pages of docs/: their code, their commands, the flags they name."""

import importlib
import pathlib
import re
import shlex

import mpl
from mpl.launch import flags
from mpl.launch.config import RunConfig

ROOT = pathlib.Path(__file__).parents[2]


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def block(text, language, holds):
    """The one block that holds a text."""
    (found,) = [block for block in blocks(text, language) if holds in block]
    return found


def executed(name, names):
    """Runs all Python of a page in order; returns what it defines, and how much."""
    found = blocks(page(name), "python")
    for number, code in enumerate(found):
        exec(compile(code, f"docs/{name}, block {number}", "exec"), names)
    return names, len(found)


def commands(text):
    """The words of each command in a text's blocks of bash."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_of(words):
    """The experiment and the settings of `python -m experiments.NAME --flag=value`."""
    words = words[words.index("python"):]  # of a launcher's command
    assert words[:2] == ["python", "-m"] and words[2].startswith("experiments."), words
    module = importlib.import_module(words[2])
    (kind,) = [member for member in vars(module).values()
               if isinstance(member, type) and issubclass(member, mpl.Experiment)
               and member.__module__ == words[2]]
    return kind, flags.parse(kind.Config or RunConfig, words[2:])
