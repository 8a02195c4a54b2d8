"""Text for pre-training: cut into sequences once, its words masked anew each time."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf

import mpl
from experiments.datasets import text, wordpiece
from experiments.datasets.wordpiece import WordPieces

Batch = dict[str, tf.Tensor]
_SHARE = 0.15  # of the pieces of a sequence


def load(
    documents: Iterable[str], vocabulary: WordPieces, *, length: int, masked: int
) -> mpl.ArraySource:
    """Returns sequences of text whose masks differ from epoch to epoch.

    They have the features of `bert_records`, without `next_sentence_labels`. The masks
    follow from the run's seed and the position in training, so that a run that is
    resumed, or spread over workers, sees the same ones.

    Args:
        documents: texts.
        vocabulary: what cuts them.
        length: pieces in a sequence.
        masked: masked words in a sequence, at most.
    """
    ids = sequences(documents, vocabulary, length)
    return mpl.ArraySource({"input_ids": ids}, masking(vocabulary, masked))


def sequences(
    documents: Iterable[str], vocabulary: WordPieces, length: int
) -> np.ndarray:
    """Cuts documents into sequences `[CLS] pieces [SEP]`, int32 `[number, length]`.

    None goes over the end of a document; the last one of each is filled up with [PAD].
    """
    room, parts = length - 2, [np.zeros([0, length], np.int32)]
    for document in documents:
        ids = vocabulary.ids(document)
        rows = np.full([math.ceil(len(ids) / room), length], vocabulary.pad, np.int32)
        rows[:, 0] = vocabulary.first
        for number, row in enumerate(rows):
            part = [*ids[number * room:(number + 1) * room], vocabulary.last]
            row[1:1 + len(part)] = part
        parts.append(rows)
    return np.concatenate(parts)


def masking(vocabulary: WordPieces, masked: int) -> Callable[[Batch, tf.Tensor], Batch]:
    """Returns a function of (batch with `input_ids`, seed) that masks words.

        of the pieces that are not special ones: 15 %, at least 1, at most `masked`
        each becomes [MASK] with 80 %, any piece with 10 %, and stays with 10 %

    Source: Devlin et al. 2018, appendix A.1, https://arxiv.org/abs/1810.04805; masks of
    each epoch's own: Liu et al. 2019, section 4.1, https://arxiv.org/abs/1907.11692
    """
    special = [vocabulary.pad, vocabulary.first, vocabulary.last]

    def transform(batch: Batch, seed: tf.Tensor) -> Batch:
        ids = batch["input_ids"]
        seeds = tf.random.split(seed, 3)
        word = tf.reduce_all(ids[..., tf.newaxis] != special, -1)
        lots = tf.random.stateless_uniform(tf.shape(ids), seeds[0])
        positions = tf.math.top_k(tf.where(word, lots, -1.0), masked).indices
        count = tf.reduce_sum(tf.cast(word, tf.float32), 1, keepdims=True)
        number = tf.minimum(tf.maximum(tf.round(_SHARE * count), 1.0), count)
        chosen = tf.range(masked, dtype=tf.float32) < number  # [batch, masked]
        positions = tf.where(chosen, positions, 0)
        old = tf.gather(ids, positions, batch_dims=1)
        lots = tf.random.stateless_uniform(tf.shape(old), seeds[1])
        new = tf.random.stateless_uniform(
            tf.shape(old), seeds[2], 0, len(vocabulary), tf.int32)
        new = tf.where(lots < 0.8, vocabulary.mask, tf.where(lots < 0.9, new, old))
        change = tf.where(chosen, new - old, 0)[..., tf.newaxis]
        places = tf.one_hot(positions, ids.shape[1], dtype=tf.int32)
        return {
            "input_ids": ids + tf.reduce_sum(places * change, 1),
            "input_mask": tf.cast(ids != vocabulary.pad, tf.int32),
            "segment_ids": tf.zeros_like(ids),
            "masked_lm_positions": positions,
            "masked_lm_ids": tf.where(chosen, old, 0),
            "masked_lm_weights": tf.cast(chosen, tf.float32),
        }

    return transform


def questions(
    path: str, vocabulary: WordPieces, *, length: int, masked: int
) -> dict[str, np.ndarray]:
    """Reads lines of text with [MASK] in place of the words to name.

    Args:
        path: of a file of text.
        vocabulary: what cuts it.
        length: pieces in a sequence.
        masked: masked words in a line, at most.

    Returns:
        `input_ids`, `input_mask`, `segment_ids` and `masked_lm_positions`; these are 0
        beyond a line's masks.

    Raises:
        ConfigError: a line has no mask, too many, or too many pieces.
    """
    rows, places = list[list[int]](), list[list[int]]()
    for number, line in enumerate(text.read(path).split("\n"), 1):
        if not line.strip():
            continue
        ids, positions = [vocabulary.first], list[int]()
        for part in line.split(wordpiece.MASK):
            ids += [*vocabulary.ids(part), vocabulary.mask]
            positions.append(len(ids) - 1)
        ids[positions.pop()] = vocabulary.last
        if not 1 <= len(positions) <= masked or len(ids) > length:
            raise mpl.ConfigError(
                f"File {path}, line {number} has {len(positions)} [MASK] in {len(ids)} "
                f"pieces, and must have 1 ... {masked} in at most {length}.",
                "Cut the line, or mask some of its words.")
        rows.append(ids + [vocabulary.pad] * (length - len(ids)))
        places.append(positions + [0] * (masked - len(positions)))
    ids_of = np.array(rows, np.int32).reshape(-1, length)
    return {
        "input_ids": ids_of,
        "input_mask": (ids_of != vocabulary.pad).astype(np.int32),
        "segment_ids": np.zeros_like(ids_of),
        "masked_lm_positions": np.array(places, np.int32).reshape(-1, masked),
    }
