"""Examples in files, which several streams read at once."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.data import reading
from mpl.data.ranges import fault_in
from mpl.data.source import EMPTY, Batch, Source, Transform, check_elements
from mpl.errors import ConfigError

_MAX_STREAMS = 64
_NO_SEED = (0, 0)
_WRONG_NUMBER = r"File .* must hold \d+ examples by `examples_per_file` and holds \w+"
_fold_in = tf.random.experimental.stateless_fold_in


class FileSource(Source):
    """Examples in files, of which a worker reads those of its streams.

    With the files of an epoch one after another, in an order of each epoch's own where
    the pipeline shuffles, stream `s` of `S` reads examples

        s * num_examples // S ... (s + 1) * num_examples // S - 1

    whatever the sizes of the files, and each batch takes `global_batch_size / S` of
    each stream in turn. `S` is the largest divisor of the batch size that is neither
    above the number of files nor above 64. To get to a position a stream reads and
    drops at most what lies before it in a file; with `shuffle_buffer`, in the epoch.

    Args:
        files: paths, or a pattern of them such as `gs://bucket/train-*`.
        read: makes a `tf.data.Dataset` of a file's path (a string tensor): elements are
            dicts of dense tensors, one example each, the same at each reading.
        examples_per_file: how many examples the files hold, in the order of `files`
            (a pattern's are sorted) or by path; another number is an error when it is
            read. None: every file is read once to count them, and so checked.
        max_bad_records: so many damaged records are left out, each with a warning; one
            more is an error. Above 0 every file is read once, in memory where one is
            damaged, and `examples_per_file` has no effect.
        shuffle_buffer: from how many examples a stream draws the next one where the
            pipeline shuffles; 0: files come in another order, their examples do not.
        transform: changes an example, to decode and augment it: `transform(example,
            seed)`, a pure function of its tensors and an int64 `[2]` seed for
            `tf.image`'s and `tf.random`'s stateless functions, another for each example
            and epoch.

    Attributes:
        files: the paths of the files that hold examples.
        examples_per_file: how many each of them holds.

    Raises:
        ConfigError: no or missing files, no examples, counts that do not go with the
            files, elements that are not dicts of dense tensors; a file that cannot be
            read, where it is counted.
    """

    def __init__(
        self,
        files: str | os.PathLike | Sequence[str | os.PathLike], read: reading.Read, *,
        examples_per_file: Sequence[int] | Mapping[str, int] | None = None,
        shuffle_buffer: int = 0, max_bad_records: int = 0,
        transform: Transform | None = None,
    ):
        self._read, self._shuffle_buffer = read, shuffle_buffer
        self.max_bad_records, self._has_bad = max_bad_records, list[str]()
        self._transform = transform
        self.files = _find(files)
        first = read(tf.constant(self.files[0]))
        if not isinstance(first, tf.data.Dataset):
            raise ConfigError(
                f"`read` must return a tf.data.Dataset, not {type(first).__name__}.",
                "Return tf.data.TFRecordDataset(path).map(parse), or alike.",
            )
        check_elements(first)
        self._blank = {
            name: tf.zeros([size or 0 for size in spec.shape or ()], spec.dtype)
            for name, spec in first.element_spec.items()
        }
        if examples_per_file is None or max_bad_records:
            counted = reading.count(self.files, read, max_bad_records)
            self.files = [path for path, *_ in counted]
            counts = [good for _, good, _ in counted]
            self._has_bad = [path for path, _, has_bad in counted if has_bad]
        elif isinstance(examples_per_file, Mapping):
            counts = [examples_per_file.get(path, -1) for path in self.files]
        else:
            counts = list(examples_per_file)
        if len(counts) != len(self.files) or min(counts) < 0:
            raise ConfigError(
                f"`examples_per_file` must be 0 or more for each of {len(self.files)} "
                f"files, not {examples_per_file}.",
                "Leave it out, and the examples are counted.",
            )
        self.num_examples = sum(counts)
        if not self.num_examples:
            raise ConfigError(*EMPTY)
        self.files = [path for path, n in zip(self.files, counts, strict=True) if n]
        self.examples_per_file = [n for n in counts if n]
        with tf.device("CPU:0"):  # where tf.data reads it
            self._paths = tf.constant(self.files)
            self._counts = tf.constant(self.examples_per_file, tf.int64)

    def find_fault(self, check: Callable[[Batch], Batch]) -> None:
        """Reads all files again, unless bad records of theirs are left out.

        Args:
            check: called with the examples, in batches.

        Raises:
            ConfigError: a file cannot be read, with the number of the example.
        """
        def read(path: tf.Tensor) -> tf.data.Dataset:
            examples = self._read(path)
            if self._transform is not None:
                examples = examples.map(lambda e: self._transform(e, _NO_SEED))
            return examples.batch(1).map(check)

        reading.count([p for p in self.files if p not in self._has_bad], read)

    def num_streams(self, global_batch_size: int) -> int:
        """How many streams read at once, whatever the number of workers."""
        most = min(len(self.files), _MAX_STREAMS)
        return max(n for n in range(1, most + 1) if global_batch_size % n == 0)

    def stream(
        self, number: tf.Tensor, streams: int, length: int, skip: tf.Tensor,
        key: tf.Tensor, shuffle: bool,
    ) -> tf.data.Dataset:
        """What one stream reads in one epoch.

        Args:
            number: which stream, int64.
            streams: how many there are.
            length: records in the epoch: examples, and then some that only fill up.
            skip: how many are left out at the start, int64.
            key: the epoch's seed, int64 `[2]`.
            shuffle: whether files come in another order than their own.

        Returns:
            A dataset of (a bool of no meaning, (example, whether it is real)).
        """
        begin = number * self.num_examples // streams
        end = (number + 1) * self.num_examples // streams
        order = tf.range(len(self.files), dtype=tf.int64)
        if shuffle:
            last = tf.constant(len(self.files) - 1, tf.int64)
            order = tf.random.experimental.index_shuffle(order, key, last)
        paths, counts = tf.gather(self._paths, order), tf.gather(self._counts, order)
        ends = tf.cumsum(counts)
        shuffles = shuffle and self._shuffle_buffer
        start = begin if shuffles else begin + skip

        def read(file: tf.Tensor) -> tf.data.Dataset:
            before = ends[file] - counts[file]
            examples = self._checked(paths[file], counts[file])
            # Not cut where it ends with the stream: its own end is to be checked.
            examples = examples.take(tf.where(ends[file] > end, end - before, -1))
            return examples.skip(tf.maximum(start - before, 0))

        def file_of(example: tf.Tensor) -> tf.Tensor:
            return tf.searchsorted(ends, [example], "right", tf.int64)[0]

        examples = tf.data.Dataset.range(file_of(start), file_of(end - 1) + 1)
        examples = examples.flat_map(read)
        if shuffles:
            # The order must not depend on the seed that the program has set.
            tf.compat.v1.set_random_seed(1)  # of this function's graph alone
            seed = tf.random.stateless_uniform(
                [], _fold_in(key, begin), None, None, tf.int64)
            examples = examples.shuffle(
                self._shuffle_buffer, seed, reshuffle_each_iteration=False)
            examples = examples.skip(skip)
        filling = self._good(paths[file_of(begin)]).take(1).cache().repeat()
        no = tf.data.Dataset.from_tensors(False).repeat()
        filling = tf.data.Dataset.zip((no, tf.data.Dataset.zip((filling, no))))
        examples = examples.concatenate(filling.take(length - (end - begin)))
        if (transform := self._transform) is None:
            return examples

        def change(place: tf.Tensor, element: Any) -> Any:
            has_no_meaning, (example, is_real) = element
            seed = _fold_in(_fold_in(key, number), place)
            return has_no_meaning, (transform(example, seed), is_real)

        return examples.enumerate(skip).map(change, num_parallel_calls=tf.data.AUTOTUNE)

    def _checked(self, path: tf.Tensor, count: tf.Tensor) -> tf.data.Dataset:
        """A file's examples in the form of `stream`; as many as was said, or an error.

        No function is called for each of them, as that takes longer than to parse a
        small one: what fails counts only where an example is too many or missing.
        """

        def failing(number: str) -> tf.data.Dataset:
            def fail(number: tf.Tensor) -> tf.Tensor:
                said = tf.strings.join([
                    "File ", path, " must hold ", tf.strings.as_string(count),
                    " examples by `examples_per_file` and holds ", number, "."])
                check = tf.raw_ops.Assert(condition=False, data=[said])
                with tf.control_dependencies([check]):
                    return tf.constant(False)

            return tf.data.Dataset.from_tensors(number).map(fail)

        zipped = tf.data.Dataset.zip
        blank, no = map(tf.data.Dataset.from_tensors, (self._blank, False))
        yes = tf.data.Dataset.from_tensors(True).repeat(count)
        examples = zipped((self._good(path), yes.concatenate(failing("more"))))
        examples = examples.concatenate(zipped((blank, no)))  # read, and left out
        examples = examples.concatenate(zipped((blank, failing("fewer"))))
        examples = zipped((yes.concatenate(no), examples))
        return examples.take_while(lambda goes_on, _: goes_on)

    def _good(self, path: tf.Tensor) -> tf.data.Dataset:
        """A file's examples without the bad ones that were found in it."""
        examples = self._read(path)
        if not self._has_bad:
            return examples
        has_bad = tf.reduce_any(path == tf.constant(self._has_bad))
        number = tf.where(has_bad, tf.constant(-1, tf.int64), 0)
        without = examples.ignore_errors().take(number)
        return examples.take(-1 - number).concatenate(without)


@contextlib.contextmanager
def naming_damage(pipelines: Iterable[Any]) -> Iterator[None]:
    """Makes the error of a damaged or faulty example one that says where it is.

    TensorFlow's says in which place of a file, but not in which file. So all files of
    the pipelines are read again, and only then.

    Raises:
        ConfigError: a file cannot be read, with the number of the example; or a value
            breaks a rule of `mpl.data.ranges`.
    """
    try:
        yield
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError) as error:
        if found := re.search(_WRONG_NUMBER, error.message):
            raise ConfigError(f"{found[0]}.", "Correct it or leave it out.") from error
        fault = fault_in(error)
        if fault or isinstance(error, tf.errors.DataLossError) or (
                "IteratorGetNext" in error.message):
            for pipeline in pipelines:
                if isinstance(pipeline.source, FileSource):
                    logging.error("An example is bad; all files are read to find it.")
                    pipeline.source.find_fault(pipeline.check)
        raise fault or error


def _find(files: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """The files' paths."""
    if isinstance(files, str | os.PathLike):
        paths, missing = sorted(tf.io.gfile.glob(os.fspath(files))), None
    else:
        paths = [os.fspath(file) for file in files]
        missing = next((p for p in paths if not tf.io.gfile.exists(p)), None)
    if not paths or missing:
        raise ConfigError(
            f"`files` names no file: {missing or files}.",
            "Look at the data folder and at the pattern.",
        )
    return paths
