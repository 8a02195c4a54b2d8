"""BERT's pre-training examples: TFRecords with words masked beforehand.

What `create_pretraining_data.py` of https://github.com/google-research/bert writes, and
what TensorFlow's Model Garden does, where two features have other names.
"""

import re
from collections.abc import Sequence

import tensorflow as tf
from google.protobuf.message import DecodeError

import mpl
from experiments.datasets import tfrecords

_SHUFFLED = 10_000  # examples, in all streams together
_STREAMS = 64  # of an `mpl.FileSource`, at most
_LOOKED_AT = 1000  # records, for how many words are masked
_RENAMED = {"input_word_ids": "input_ids", "input_type_ids": "segment_ids"}
_OF_LENGTH = ("input_ids", "input_mask", "segment_ids")
_OF_WORDS = ("masked_lm_positions", "masked_lm_ids", "masked_lm_weights")
_PAIR = "next_sentence_labels"


def load(
    files: Sequence[str], *, length: int, masked: int, has_pairs: bool | None = None,
    max_bad_records: int = 0,
) -> tuple[mpl.FileSource, bool, float]:
    """Returns the examples in files, `has_pairs`, and how many words are masked.

    By the first layout's names, `input_ids`, `input_mask` and `segment_ids`, int32
    `[length]`; `masked_lm_positions` and `masked_lm_ids`, int32 `[masked]`, with
    `masked_lm_weights`, float32: 0 for what only fills up. With `has_pairs` also
    `next_sentence_labels`, int32 `[]`: 1 for a second text that does not follow the
    first. How many words: the mean over the first 1,000 examples of the first file.

    Args:
        files: paths.
        length: pieces in a sequence.
        masked: masked words in a sequence.
        has_pairs: whether to read `next_sentence_labels`; None: where there are any.
        max_bad_records: as in `mpl.FileSource`.

    Raises:
        ConfigError: a file ends inside a record, or its first example is another; as of
            `mpl.FileSource`.
    """
    features = _first(files[0])
    names = {_RENAMED.get(name, name): name for name in features}
    wanted = {**dict.fromkeys(_OF_LENGTH, length), **dict.fromkeys(_OF_WORDS, masked)}
    if has_pairs is None:
        has_pairs = _PAIR in names
    wanted |= {_PAIR: 1} if has_pairs else {}
    for name, size in wanted.items():
        if name not in names:
            raise mpl.ConfigError(
                f"File {files[0]}, record 0 has no `{name}`; it has "
                f"{', '.join(sorted(features))}.",
                "Give TFRecords of create_pretraining_data.py.")
        values = features[names[name]]
        found = len(values.int64_list.value) or len(values.float_list.value)
        if found != size and name != _PAIR:
            flag = "--length" if name in _OF_LENGTH else "--masked"
            raise mpl.ConfigError(
                f"File {files[0]}, record 0 has {found} values of `{name}`, and "
                f"{flag} asks for {size}.", f"Use {flag}={found}.")
    spec = {
        names[name]: tf.io.FixedLenFeature(
            [] if name == _PAIR else [size],
            tf.float32 if name == "masked_lm_weights" else tf.int64)
        for name, size in wanted.items()}

    def parse(record: tf.Tensor) -> dict[str, tf.Tensor]:
        parsed = tf.io.parse_single_example(record, spec)
        return {
            name: value if value.dtype.is_floating else tf.cast(value, tf.int32)
            for name, value in ((name, parsed[names[name]]) for name in wanted)}

    def read(path: tf.Tensor) -> tf.data.Dataset:
        records = tf.data.TFRecordDataset(path)
        return records.map(parse, num_parallel_calls=tf.data.AUTOTUNE)

    source = mpl.FileSource(
        files, read, max_bad_records=max_bad_records,
        examples_per_file=None if max_bad_records else tfrecords.counts(files),
        shuffle_buffer=_SHUFFLED // min(len(files), _STREAMS))
    some = read(tf.constant(files[0])).take(_LOOKED_AT).ignore_errors()
    words = [example["masked_lm_weights"].sum()
             for example in some.as_numpy_iterator()]
    return source, has_pairs, sum(words) / len(words)


def ranges(
    vocabulary: int, length: int, has_pairs: bool
) -> dict[str, tuple[float, float]]:
    """Returns what values examples may have, for `Experiment.ranges`."""
    flag, piece = (0, 1), (0, vocabulary - 1)
    allowed: dict[str, tuple[float, float]] = {
        "input_ids": piece, "masked_lm_ids": piece, "input_mask": flag,
        "segment_ids": flag, "masked_lm_positions": (0, length - 1)}
    return allowed | ({_PAIR: flag} if has_pairs else {})


def _first(path: str) -> dict[str, tf.train.Feature]:
    """The features of a file's first record."""
    try:
        for record in tf.data.TFRecordDataset(path).take(1):
            example = tf.train.Example.FromString(record.numpy())
            return dict(example.features.feature)
        reason = "it has none"
    except (tf.errors.OpError, DecodeError) as error:
        first_line = str(error).partition("\n")[0]
        reason = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", first_line)
    raise mpl.ConfigError(
        f"File {path}, record 0 cannot be read: {reason}.",
        "Give TFRecords of create_pretraining_data.py, and this one anew.")
