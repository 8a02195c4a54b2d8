"""What the tests of the pages in docs/ share: their blocks, and how they are typed."""

import linecache
import os
import pathlib
import re
import shlex
import subprocess
import sys

from mpl.launch import app

ROOT = pathlib.Path(__file__).parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT)}


def text_of(page):
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def blocks(page, language=""):
    """Returns the blocks in a language, in order; "": those that name none."""
    parts = re.split(r"^```(\w*)\n", text_of(page), flags=re.MULTILINE)
    # Text, language, block, "" of its end, text, ...
    return [body for word, body in zip(parts[1::4], parts[2::4]) if word == language]


def names_of(page, *numbers):
    """Runs blocks of Python, by default all; returns the names they define."""
    names = {"__name__": "page"}
    found = blocks(page, "python")
    for number in numbers or range(len(found)):
        file, code = f"<docs/{page} {number}>", found[number]
        # Where AutoGraph looks for the source, as in a notebook.
        linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file
        exec(compile(code, file, "exec"), names)
    return names


def commands(page):
    """Returns the lines of the blocks of bash, without comments."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [shlex.join(each) for each in words if each]


def typed(command, experiment, *more):
    """Runs a command of a page in this process; returns the metrics."""
    flags = [word for word in shlex.split(command) if word.startswith("--")]
    return app.run_program(experiment, {}, ["program", *flags, *more])


def started(words, folder, timeout=120):
    """Runs a program in a process of its own, in a folder; returns it when it ended."""
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=ENVIRON, timeout=timeout,
        capture_output=True, text=True)


def section(page, title):
    """Returns the text of a section of a page."""
    return text_of(page).partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def row_names(text, head):
    """Returns what is in backticks in the first column of the table with this head."""
    table = text.partition(f"\n{head}\n")[2].partition("\n\n")[0]
    rows = table.splitlines()[1:]
    return re.findall(r"`(.*?)`", " ".join(row.split(" | ")[0] for row in rows))
