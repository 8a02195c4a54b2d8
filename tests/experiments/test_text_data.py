"""Text is read from files as it is, cut into windows, and refused where it is none."""

import collections
import math

import numpy as np
import pytest

import mpl
from experiments.datasets import text
from experiments.models import trigram
from mpl.data import Pipeline


def rows(*texts):
    return [list(each) for each in texts]


def test_files_by_split(tmp_path):
    for name, content in {"train-b.txt": "two\n", "train-a.txt": "\none", "test.txt":
                          "three", "notes.md": "four"}.items():
        (tmp_path / name).write_text(content)
    assert text.load("train", str(tmp_path)) == "one\n\n\ntwo"
    assert text.load("test", str(tmp_path)) == "three"
    assert text.load("validation", str(tmp_path)) is None


def test_other_files_are_cut(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(97 + n // 2) for n in range(40)))
    (tmp_path / "b.txt").write_text("ä" * 40)
    assert text.load("validation", str(tmp_path)) == "ss\n\n\nää"
    assert text.load("test", str(tmp_path)) == "tt\n\n\nää"
    assert text.load("train", str(tmp_path)) == (
        "aabbccddeeffgghhiijjkkllmmnnooppqqrr\n\n\n" + 36 * "ä")


@pytest.mark.parametrize("content, words", [
    (b"fine \xff not", r"byte 5 \(0xff\): invalid start byte"),
    ("cut ä".encode()[:-1], r"byte 4 \(0xc3\): unexpected end of data"),
    (b"a\0b", "text: byte 1 is 0")])
def test_what_is_no_text_is_named(content, words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(mpl.ConfigError, match=f"File {path} is no.*{words}"):
        text.load("train", str(tmp_path))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffäb".encode())
    assert text.read(str(tmp_path / "a.txt")) == "äb"


def test_folders_and_splits_that_are_wrong(tmp_path):
    with pytest.raises(mpl.ConfigError, match="holds no .txt file"):
        text.load("train", str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(mpl.ConfigError, match="holds no training text"):
        text.load("train", str(tmp_path))
    with pytest.raises(mpl.ConfigError, match=r"`split` \(valid\)"):
        text.load("valid", str(tmp_path))
    with pytest.raises(mpl.ConfigError, match="File .*none.txt cannot be read"):
        text.read(str(tmp_path / "none.txt"))


def test_windows_have_each_byte_once():
    got = text.windows("abcdé", 4)
    assert got.dtype == np.uint8
    assert got.tolist() == rows(b"\nabcd", b"d\xc3\xa9\0\0")
    assert text.windows("abcd", 4).tolist() == rows(b"\nabcd")


def test_crops_are_windows_of_the_text():
    letters = "".join(map(chr, range(33, 33 + 90)))
    made = Pipeline(text.crops(letters, 10), global_batch_size=4, seed=0, shuffle=True,
                    repeat=True)
    assert made.num_examples == 8
    batches = [batch["text"] for batch in made.dataset().take(40).as_numpy_iterator()]
    starts = np.concatenate(batches)[:, :1].astype(int)
    np.testing.assert_array_equal(np.concatenate(batches), starts + np.arange(11))
    starts = set(starts.ravel() - 33)
    assert starts <= set(range(80)) and len(starts) > 60  # 320 of 80
    again = [b["text"] for b in made.dataset(position=30).take(10).as_numpy_iterator()]
    np.testing.assert_array_equal(again, batches[30:])


def test_a_text_too_short_for_crops_is_refused():
    assert text.crops("x" * 20, 10).num_examples == 1
    with pytest.raises(mpl.ConfigError, match="has 19 bytes, less than two windows of"):
        text.crops("x" * 19, 10)


def bits(train, test):
    """The baseline, straight from its formula."""
    train, test = (b"\n\n" + each.encode() for each in (train, test))
    after = collections.defaultdict(collections.Counter)
    for place in range(2, len(train)):
        for order in range(3):
            after[train[place - order:place]][train[place]] += 1

    def chance(byte, context):
        seen = after[context]
        different = len(seen)
        shorter = chance(byte, context[1:]) if context else 1 / 256
        if not seen:
            return shorter
        return (seen[byte] + different * shorter) / (seen.total() + different)

    return -sum(math.log2(chance(test[place], test[place - 2:place]))
                for place in range(2, len(test)))


@pytest.mark.parametrize("train, test", [
    ("abracadabra", "abra cadabra"), ("a", "zä"), ("the cat sat on the mat", "é sat")])
def test_the_baseline_is_its_formula(train, test):
    want = bits(train, test) / len(test)
    assert trigram.bits_per_character(train, test) == pytest.approx(want, rel=1e-12)


def test_the_baseline_by_hand():
    """After "aa" came a and b: (1 + 2 p(b given a)) / 4, and so on."""
    # Of "\n\n" + "aaab": bytes a a a b; after a: a, a, b (2 kinds); after "aa": a, b.
    p_b = (1 + 2 / 256) / 6
    p_b_after_a = (1 + 2 * p_b) / 5
    p_b_after_aa = (1 + 2 * p_b_after_a) / 4
    p_a = (3 + 2 / 256) / 6
    p_a_first = (1 + 1 * (1 + 1 * p_a) / 2) / 2  # after "\n\n", and after "\n", only a
    p_a_second = (1 + 1 * (2 + 2 * p_a) / 5) / 2  # after "\na" only a
    want = -sum(map(math.log2, (p_a_first, p_a_second, p_b_after_aa))) / 3
    assert trigram.bits_per_character("aaab", "aab") == pytest.approx(want, rel=1e-12)
