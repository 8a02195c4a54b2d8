"""Sequences of text, and masks that follow from the seed and the position alone."""

import collections

import numpy as np
import pytest
import tensorflow as tf

import mpl
from bert_files import COUNTED, PIECES
from experiments.datasets import masked_text
from experiments.datasets.wordpiece import WordPieces
from mpl.data import Pipeline

VOCABULARY = WordPieces(PIECES)
ONE = PIECES.index("one")


def test_documents_are_cut_into_sequences():
    documents = ["one two three four five", "six"]
    rows = masked_text.sequences(documents, VOCABULARY, 5)
    assert rows.dtype == np.int32
    assert (rows - ONE).tolist() == [
        [2 - ONE, 0, 1, 2, 3 - ONE], [2 - ONE, 3, 4, 3 - ONE, -ONE],
        [2 - ONE, 5, 3 - ONE, -ONE, -ONE]]
    assert masked_text.sequences(["", "  "], VOCABULARY, 5).shape == (0, 5)


def masked(ids, most, seed=(1, 2)):
    batch = masked_text.masking(VOCABULARY, most)(
        {"input_ids": tf.constant(ids, tf.int32)}, tf.constant(seed, tf.int32))
    return {name: value.numpy() for name, value in batch.items()}


def text_rows(count, length, words):
    """`count` sequences of so many random words."""
    random = np.random.default_rng(0)
    rows = np.zeros([count, length], int)
    rows[:, 0], rows[:, words + 1] = 2, 3
    rows[:, 1:words + 1] = random.integers(5, len(PIECES), [count, words])
    return rows


@pytest.mark.parametrize("words, most, number", [
    (40, 10, 6), (40, 4, 4), (1, 10, 1), (0, 10, 0), (13, 10, 2)])
def test_how_many_words_are_masked(words, most, number):
    rows = text_rows(50, 64, words)
    batch = masked(rows, most)
    assert batch["masked_lm_positions"].shape == (50, most)
    counts = batch["masked_lm_weights"]
    assert counts.tolist() == [[1.0] * number + [0.0] * (most - number)] * 50
    places, old = batch["masked_lm_positions"], batch["masked_lm_ids"]
    for row, own, words_of in zip(rows, places, old):
        own, words_of = own[:number], words_of[:number]
        assert len(set(own)) == number
        assert row[own].tolist() == words_of.tolist() and (row[own] > 3).all()
    assert not places[:, number:].any() and not old[:, number:].any()
    untouched = np.ones(rows.shape, bool)
    np.put_along_axis(untouched, places[:, :number], False, 1)
    np.testing.assert_array_equal(batch["input_ids"][untouched], rows[untouched])
    np.testing.assert_array_equal(batch["input_mask"], rows != 0)
    assert not batch["segment_ids"].any()


def test_what_a_masked_word_becomes():
    """Of 60,000 words 80 % [MASK], 10 % any piece, 10 % what they were."""
    batch = masked(text_rows(6000, 72, 67), 10)
    places, old = batch["masked_lm_positions"], batch["masked_lm_ids"]
    new = np.take_along_axis(batch["input_ids"], places, 1)
    share = (new == VOCABULARY.mask).mean()
    # A piece drawn at random is [MASK], or the word itself, once in len(PIECES).
    assert abs(share - (0.8 + 0.1 / len(PIECES))) < 0.006
    assert abs((new == old).mean() - (0.1 + 0.1 / len(PIECES))) < 0.005
    other = new[(new != old) & (new != VOCABULARY.mask)]
    assert set(other) == set(range(len(PIECES))) - {VOCABULARY.mask}
    assert np.bincount(places.ravel(), minlength=72)[1:68].min() > 600  # of about 896


def batches(position, count, seed=0):
    source = masked_text.load(
        [" ".join(COUNTED * 30)], VOCABULARY, length=12, masked=3)
    pipeline = Pipeline(
        source, global_batch_size=8, seed=seed, shuffle=True, repeat=True)
    assert pipeline.batches_per_epoch == 3
    return [{name: value.numpy() for name, value in batch.items()}
            for batch in pipeline.dataset(position).take(count)]


def test_masks_follow_from_seed_and_position():
    whole, rest = batches(0, 7), batches(4, 3)
    for got, want in zip(rest, whole[4:], strict=True):
        assert got.keys() == want.keys() and len(got) == 7  # and the weight
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    other = batches(0, 1, seed=1)[0]
    assert (other["masked_lm_positions"] != whole[0]["masked_lm_positions"]).any()


def test_masks_differ_from_epoch_to_epoch():
    def counted(epoch, *names):
        """How often each sequence was there before it was masked, with features."""
        return collections.Counter(
            (tuple(row), *(tuple(sorted(batch[name][number])) for name in names))
            for batch in epoch for number, row in enumerate(unmasked(batch)))

    whole = batches(0, 6)
    first, second = whole[:3], whole[3:]
    assert counted(first) == counted(second)
    assert counted(first, "masked_lm_positions") != counted(
        second, "masked_lm_positions")


def unmasked(batch):
    """The ids before they were masked."""
    ids = batch["input_ids"].copy()
    chosen = batch["masked_lm_weights"] > 0
    rows = np.nonzero(chosen)[0]
    ids[rows, batch["masked_lm_positions"][chosen]] = batch["masked_lm_ids"][chosen]
    return ids


def test_questions(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("the film is [MASK] .\n\n[MASK] and [MASK]\n")
    got = masked_text.questions(str(path), VOCABULARY, length=8, masked=3)
    the, film, is_, stop, and_ = (
        PIECES.index(word) for word in ("the", "film", "is", ".", "and"))
    assert got["input_ids"].tolist() == [
        [2, the, film, is_, 4, stop, 3, 0], [2, 4, and_, 4, 3, 0, 0, 0]]
    assert got["masked_lm_positions"].tolist() == [[4, 0, 0], [1, 3, 0]]
    assert got["input_mask"].tolist() == [[1] * 7 + [0], [1] * 5 + [0] * 3]
    assert not got["segment_ids"].any()
    assert {array.dtype for array in got.values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("line, found", [
    ("the film", r"0 \[MASK\] in 4 pieces"),
    ("[MASK] [MASK]", r"2 \[MASK\] in 4 pieces"),
    ("the film is the film is [MASK]", r"1 \[MASK\] in 9 pieces"),
])
def test_a_line_that_cannot_be_asked_is_named(line, found, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text(f"[MASK]\n{line}\n")
    with pytest.raises(mpl.ConfigError, match=rf"{path}, line 2 has {found}, and must "
                       r"have 1 ... 1 in at most 8"):
        masked_text.questions(str(path), VOCABULARY, length=8, masked=1)


def test_text_without_words_is_an_error():
    with pytest.raises(mpl.ConfigError, match="no examples"):
        masked_text.load(["", " "], VOCABULARY, length=8, masked=1)
