"""The running Python's documentation, split so that no paragraph is in two splits."""

import ast
import hashlib
import re

import numpy as np
import pytest
from pydoc_data import topics as pydoc_topics

import mpl
from experiments.datasets import documentation

TOPICS = pydoc_topics.topics


def paragraphs_of(split):
    return {" ".join(paragraph.split())
            for text in documentation.load(split) for paragraph in text.split("\n\n")}


def test_no_paragraph_is_in_two_splits_and_none_is_lost():
    parts = {split: paragraphs_of(split) for split in documentation.SPLITS}
    assert not parts["train"] & parts["validation"]
    assert not (parts["train"] | parts["validation"]) & parts["test"]
    everything = {" ".join(paragraph.split())
                  for text in TOPICS.values() for paragraph in text.split("\n\n")}
    assert set.union(*parts.values()) | {""} == everything | {""}
    size = {split: sum(map(len, documentation.load(split))) for split in parts}
    assert size["train"] > 8 * size["validation"] / 2 > 0 < size["test"]


def test_topics_are_split_by_their_place_in_the_alphabet():
    first, sixth = sorted(TOPICS)[0], sorted(TOPICS)[5]
    for name, split in ((first, "validation"), (sixth, "test")):
        whole = " ".join(TOPICS[name].split())
        opening = next(iter(documentation.load(split)))
        assert whole.startswith(" ".join(opening.split("\n\n")[0].split()))


def test_its_description_holds_its_hash():
    text = "".join(f"{name}\n{TOPICS[name]}\n" for name in sorted(TOPICS))
    digest = hashlib.sha256(text.encode()).hexdigest()
    said = documentation.describe()
    assert re.fullmatch(
        rf"the documentation of Python 3\.\d+\.\S+, {len(TOPICS)} topics, "
        rf"{len(text):,} characters, SHA-256 {digest[:16]}", said)


@pytest.mark.parametrize("split", documentation.SPLITS)
def test_lines_are_labelled_by_the_parser(split):
    texts, label = documentation.lines(split)
    assert label.dtype == np.int32 and set(label) == {0, 1}
    assert len(texts) == len(label) == 2 * label.sum() >= 60
    for text, is_python in zip(texts, label):
        try:
            tree = ast.parse(f"{text} pass" if text.endswith(":") else text)
        except SyntaxError:
            assert not is_python and re.search(r"\w+ \w+ \w+ \w", text), text
        else:
            assert is_python == (len(tree.body) > 0), text
        assert not text.startswith(">>> ") and text == text.strip()


def test_no_line_is_there_twice():
    texts = [text for split in documentation.SPLITS
             for text in documentation.lines(split)[0]]
    assert len(set(texts)) == len(texts)


def test_an_unknown_split_is_an_error():
    with pytest.raises(mpl.ConfigError, match=r"`split` \(dev\).*\nUse one of"):
        documentation.load("dev")
    with pytest.raises(mpl.ConfigError, match=r"`split` \(dev\)"):
        documentation.lines("dev")
