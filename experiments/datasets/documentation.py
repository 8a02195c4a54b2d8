"""The running Python's own documentation: `pydoc_data.topics`, which `help()` shows.

Some 80 topics in English with examples of code. Each belongs to one split, by its place
in the alphabet: every tenth to validation, every tenth to test. Topics repeat each
other's paragraphs; each is kept once, so that no paragraph is in two splits.

Licence: that of the Python that runs, https://docs.python.org/3/license.html
"""

import ast
import functools
import hashlib
import platform
import re
import warnings

import numpy as np
from pydoc_data import topics as pydoc_topics

import mpl

SPLITS = ("train", "validation", "test")
_OF_LAST_FIGURE = {0: "validation", 5: "test"}


def describe() -> str:
    """Says what text this is, with its hash."""
    topics = sorted(pydoc_topics.topics.items())
    text = "".join(f"{name}\n{text}\n" for name, text in topics)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (f"the documentation of Python {platform.python_version()}, {len(topics)} "
            f"topics, {len(text):,} characters, SHA-256 {digest[:16]}")


def load(split: str) -> list[str]:
    """Returns the topics of a split as texts, paragraphs apart by an empty line.

    Raises:
        ConfigError: another split.
    """
    return ["\n\n".join(paragraphs) for paragraphs in _paragraphs(split)]


def lines(split: str) -> tuple[list[str], np.ndarray]:
    """Returns lines of Python and lines of prose, as many of each.

    Python is what its parser reads as a statement, of at least four words and signs;
    prose is the rest where four words stand in a row. What is neither, as grammar, is
    left out. No line is there twice, or in two splits.

    Returns:
        Texts, and int32 labels, 1 for Python.
    """
    later = SPLITS[SPLITS.index(split) + 1:] if split in SPLITS else ()
    taken = set().union(*map(_lines, later))
    texts = [line for line in _lines(split) if line not in taken]
    label = np.array([_parses(text) for text in texts], np.int32)
    in_row = np.array([
        re.search(r"([A-Za-z]+ ){3}[A-Za-z]", text) is not None for text in texts])
    code, prose = np.flatnonzero(label), np.flatnonzero(in_row & (label == 0))
    fewer = min(len(code), len(prose))
    kept = np.sort(np.concatenate([
        each[np.arange(fewer) * len(each) // fewer] for each in (code, prose)]))
    return [texts[number] for number in kept], label[kept]


@functools.cache
def _lines(split: str) -> dict[str, None]:
    """The lines of a split, without the prompts of Python's shell."""
    found = (
        re.sub(r"^(>>>|\.\.\.) *", "", line.strip())
        for topic in _paragraphs(split) for text in topic for line in text.split("\n"))
    return {line: None for line in found if len(re.findall(r"\w+|[^\w\s]", line)) > 3}


@functools.cache
def _paragraphs(split: str) -> list[list[str]]:
    if split not in SPLITS:
        raise mpl.ConfigError(
            f"`split` ({split}) is not a part of the documentation.",
            f"Use one of {list(SPLITS)}.")
    topics, seen = pydoc_topics.topics, set[str]()
    documents: dict[str, list[list[str]]] = {"test": [], "validation": [], "train": []}
    for of_split, parts in documents.items():  # the small ones take theirs first
        for number, name in enumerate(sorted(topics)):
            if _OF_LAST_FIGURE.get(number % 10, "train") != of_split:
                continue
            kept = []
            for paragraph in topics[name].split("\n\n"):
                key = " ".join(paragraph.split())  # lines break elsewhere
                if key and key not in seen:
                    seen.add(key)
                    kept.append(paragraph.strip("\n"))
            parts += [kept] * bool(kept)
    return documents[split]


def _parses(line: str) -> bool:
    line += " pass" * line.endswith(":")  # as the body of what it begins
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(ast.parse(line).body)  # a comment has none
        except (SyntaxError, ValueError):
            return False
