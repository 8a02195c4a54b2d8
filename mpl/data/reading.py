"""Files are read once, to count what is good in them and to say what is bad."""

import re
import time
import uuid
from collections.abc import Callable, Sequence

import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError

Read = Callable[[tf.Tensor], tf.data.Dataset]
Counted = tuple[str, int, bool]
_NOISE = (
    r"\{\{.*?\}\} | \[Op:.*|assertion failed: \[|\.?\](?=$| \[Op)"
    r"|Error in user-defined function passed to .* with iterator: [\w:]*: ")
_FRAME = 8 + 4 + 4  # of a record: its length, the length's checksum, the data's


def count(files: Sequence[str], read: Read, max_bad: int = 0) -> list[Counted]:
    """Reads files to their ends, and counts what is good in them.

    Where TensorFlow cannot read a record it does not name the file: this does.

    Args:
        files: paths.
        read: makes a dataset of examples of a path.
        max_bad: as many bad records are left out, each with a warning.

    Returns:
        For each file its path, or that of a copy of it without damaged records; the
        number of good examples; whether errors of other ones are to be ignored.

    Raises:
        ConfigError: one bad record more, by its file and its number.
    """
    start, counted, bad = time.monotonic(), list[Counted](), _Bad(max_bad)

    def count_one(path: tf.Tensor) -> tf.Tensor:
        # By the thousand: a call for each example takes longer than to read it.
        numbers = read(path).enumerate().map(lambda number, _: number)
        zero = tf.constant(0, tf.int64)
        return numbers.batch(1024).reduce(
            zero, lambda total, part: total + tf.size(part, tf.int64))

    while len(counted) < len(files):
        paths = tf.data.Dataset.from_tensor_slices(files[len(counted):])
        try:
            for number in paths.map(count_one, tf.data.AUTOTUNE):
                counted.append((files[len(counted)], int(number), False))
        except tf.errors.OpError:
            counted.append(_count_good(files[len(counted)], read, bad))
    logging.info(
        "Counted %d examples in %d files in %.1f s, which `examples_per_file` would "
        "spare; %d bad records are left out.", sum(good for _, good, _ in counted),
        len(files), time.monotonic() - start, bad.found)
    return counted


class _Bad:
    """The bad records found, of which there may be `limit`."""

    def __init__(self, limit: int):
        self.limit, self.found = limit, 0

    def add(
        self, path: str, number: int, error: tf.errors.OpError, ends: bool = False
    ) -> None:
        line = error.message.partition("\n")[0]  # with names of nodes
        reason = re.sub(_NOISE, "", line)
        cause = f"File {path} cannot be read after {number} examples: {reason}."
        if ends or self.found >= self.limit:
            more = f", or skip it: --max_bad_records={self.found + 1}" * (not ends)
            raise ConfigError(cause, f"Repair it or leave it out{more}.") from error
        self.found += 1
        logging.warning("%s It is left out (%d of at most %d).", cause, self.found,
                        self.limit)


def _count_good(path: str, read: Read, bad: _Bad) -> Counted:
    """Counts one example after the other of a file that is damaged."""
    copy, removed = _without_damage(path, bad) if bad.limit else (path, list[int]())
    examples, good, failed = iter(read(tf.constant(copy))), 0, 0
    while True:
        try:
            next(examples)
            good += 1
        except StopIteration:
            return copy, good, failed > 0
        except tf.errors.OpError as error:
            number = good + failed
            for record in removed:
                number += record <= number
            # Nobody knows how much of the file is lost with it.
            ends = bad.limit > 0 and isinstance(error, tf.errors.DataLossError)
            bad.add(path, number, error, ends)
            failed += 1


def _without_damage(path: str, bad: _Bad) -> tuple[str, list[int]]:
    """Copies TFRecords in memory, but for those that are damaged.

    After one that is damaged TensorFlow reads nothing more of a file, though its length
    says where the next one begins.

    Returns:
        The path of the copy, and the numbers of the records that it lacks; the path of
        the file, where there is nothing to leave out or no saying how much.
    """
    copy, removed = path, list[int]()
    while True:
        start = number = 0
        try:
            for record in tf.data.TFRecordDataset(copy):
                start, number = start + _FRAME + len(record.numpy()), number + 1
            return copy, removed
        except tf.errors.DataLossError as error:
            with tf.io.gfile.GFile(copy, "rb") as file:
                content = file.read()
            if removed:
                tf.io.gfile.remove(copy)
            length = int.from_bytes(content[start:start + 8], "little")
            end = start + _FRAME + length
            if end > len(content) and "truncated" not in error.message:
                return path, []  # the length is damaged, or these are no TFRecords
            number += len(removed)
            bad.add(path, number, error)
            removed.append(number)
            copy = f"ram://{uuid.uuid4().hex}/{path.lstrip('/')}"
            with tf.io.gfile.GFile(copy, "wb") as file:
                file.write(content[:start] + content[end:])
