"""Small files in the layouts that BERT reads, for its tests."""

import itertools

import numpy as np
import tensorflow as tf

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NOUNS, VERBS = ["film", "plot", "cast", "scene"], ["is", "was", "seems"]
GOOD, BAD = ["good", "great", "fine", "lovely"], ["bad", "poor", "awful", "dull"]
COUNTED = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
PIECES = [*SPECIAL, "the", "and", ".", *NOUNS, *VERBS, *GOOD, *BAD, *COUNTED]
LENGTH, MASKED = 16, 3  # of the records
V1 = ("input_ids", "input_mask", "segment_ids", "masked_lm_positions", "masked_lm_ids")
V2 = ("input_word_ids", "input_mask", "input_type_ids", *V1[3:])


def write_vocabulary(folder):
    path = folder / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in PIECES))
    return str(path)


def reviews(start):
    """Every second one of all sentences of a kind, and 1 for those that praise."""
    sentences = [
        (f"the {noun} {verb} {first} and {second} .", int(praises))
        for praises, words in enumerate((BAD, GOOD))
        for noun, verb, first, second in itertools.product(NOUNS, VERBS, words, words)]
    return sentences[start::2]


def write_sst2(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, start in (("train.tsv", 0), ("dev.tsv", 1)):
        lines = [f"{sentence}\t{label}\n" for sentence, label in reviews(start)]
        (folder / name).write_text("sentence\tlabel\n" + "".join(lines))
    return str(folder)


def write_text(folder):
    """Counting from any number on: each word follows from its neighbours."""
    counting = COUNTED * 40
    for split, start in (("train", 0), ("validation", 3)):
        (folder / f"{split}.txt").write_text(" ".join(counting[start:]))
    return str(folder)


def record_arrays(count, seed=0):
    """Random pairs of texts with masked words, as `create_pretraining_data` pads."""
    random = np.random.default_rng(seed)
    ids = random.integers(5, len(PIECES), [count, LENGTH])
    real = np.arange(LENGTH) < random.integers(8, LENGTH + 1, [count, 1])
    ids[:, 0], ids[:, 4] = 2, 3
    masks = np.arange(MASKED) < random.integers(1, MASKED + 1, [count, 1])
    places = np.sort(np.stack([random.permutation([1, 2, 3, 5, 6, 7])[:MASKED]
                               for _ in range(count)]), 1)
    return {
        "input_ids": np.where(real, ids, 0),
        "input_mask": real.astype(int),
        "segment_ids": ((np.arange(LENGTH) > 4) & real).astype(int),
        "masked_lm_positions": np.where(masks, places, 0),
        "masked_lm_ids": np.where(masks, np.take_along_axis(ids, places, 1), 0),
        "masked_lm_weights": masks.astype(np.float32),
        "next_sentence_labels": random.integers(0, 2, [count, 1]),
    }


def write_records(path, arrays, names=V1):
    """Writes TFRecords; `names` are those of the first features."""
    names = dict(zip(V1, names))
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number in range(len(arrays["input_ids"])):
            features = {}
            for name, array in arrays.items():
                values = array[number].tolist()
                if array.dtype.kind == "f":
                    feature = tf.train.Feature(
                        float_list=tf.train.FloatList(value=values))
                else:
                    feature = tf.train.Feature(
                        int64_list=tf.train.Int64List(value=values))
                features[names.get(name, name)] = feature
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())


def write_pretraining(folder, names=V1, without=()):
    """A folder with records and a vocabulary."""
    for split, count, seed in (("train", 24, 0), ("validation", 12, 1)):
        arrays = {name: array for name, array in record_arrays(count, seed).items()
                  if name not in without}
        for part in range(2):
            own = {name: array[part::2] for name, array in arrays.items()}
            write_records(
                folder / f"{split}-{part:05d}-of-00002.tfrecord", own, names)
    write_vocabulary(folder)
    return str(folder)
