"""The order of the examples, and the batches made of them."""

import dataclasses
import functools
import os
import zlib

import tensorflow as tf
from absl import logging

from mpl.data.file_source import FileSource, naming_damage
from mpl.data.ranges import Ranges, checked, fault_in
from mpl.data.source import ArraySource, Batch, DatasetSource, Source
from mpl.errors import ConfigError

# Small batches are made many at a time: what it costs to start a few operations and
# to wake a thread is more than the operations themselves take.
_CHUNK_BYTES, _CHUNK_BATCHES = 2**20, 64
_CHECKED_BYTES = 2**24  # at once
_fold_in = tf.random.experimental.stateless_fold_in  # another seed for each number
_as_written = tf.autograph.experimental.do_not_convert  # sooner traced by 0.2 s a run


@dataclasses.dataclass(frozen=True)
class DataContext:
    """What `build_data` may need to know.

    Attributes:
        data_dir: the folder with the data, or None: the experiment's own default.
        global_batch_size: examples in a step, over all replicas.
        seed: the run's seed.
        compute_dtype: what the model computes in; None: the model's own dtypes.
        max_bad_records: how many damaged records a `FileSource` may leave out.
    """

    data_dir: str | None
    global_batch_size: int
    seed: int
    compute_dtype: tf.DType | None
    max_bad_records: int = 0


class Pipeline:
    """Global batches of a source, from any position.

    The order is a pure function of (seed, epoch, position), where position counts
    global batches since the start of training:

        epoch, batch = divmod(position, batches_per_epoch)
        index = batch * global_batch_size + [0, 1, ... global_batch_size - 1]
        weight = index < num_examples
        example = shuffle(index % num_examples, key=(seed, epoch))

    so that every example comes once an epoch, the last batch of an epoch is filled up
    with repeated records of weight 0, and arrays need no reading to get to a position.
    How many replicas and workers share a batch does not enter. Files have a documented
    order of their own: see `FileSource`.

    Args:
        source: where the examples come from.
        global_batch_size: examples in a batch, over all replicas.
        seed: 0 ... 2³¹ - 1, of the order and of the source's `transform`.
        shuffle: another order each epoch (False: the source's own). A `DatasetSource`
            has its own order always, and says so in the log.
        repeat: epoch after epoch, for training; False: one epoch, for evaluation.
        split: whose examples they are, for messages.
        ranges: the lowest and the highest value allowed, by the name of a feature.
            Arrays are checked at once; a dataset's and files' examples when they are
            read, and their floating features must be finite.

    Attributes:
        check: returns the examples of a batch that breaks no rule of `mpl.data.ranges`.

    Raises:
        ConfigError: a batch size below 1, a seed out of range, or a value of `ranges`.
    """

    def __init__(
        self, source: Source, *, global_batch_size: int, seed: int = 0, shuffle: bool,
        repeat: bool, split: str = "train", ranges: Ranges = {},
    ):
        if global_batch_size < 1:
            raise ConfigError(
                f"`global_batch_size` ({global_batch_size}) must be 1 or more.",
                "Give the number of examples in a step, over all replicas.",
            )
        if not 0 <= seed < 2**31:
            raise ConfigError(
                f"`seed` ({seed}) must lie in 0 ... {2**31 - 1}.", "Use a seed like 0."
            )
        self.source = source
        self._batch_size = global_batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._repeat = repeat
        self.check = functools.partial(checked, ranges=ranges, split=split)
        if isinstance(source, ArraySource) and ranges:
            self._check_arrays(source)
        self.num_examples = count = source.num_examples
        size = global_batch_size
        self.batches_per_epoch = None if count is None else -(-count // size)
        if shuffle and isinstance(source, DatasetSource):
            logging.warning(
                "`shuffle` is left to the tf.data.Dataset: its examples come in its "
                "own order in each epoch. Shuffle them there, with a fixed seed, or "
                "give arrays."
            )

    def _check_arrays(self, source: ArraySource) -> None:
        number = _CHECKED_BYTES // (source.example_bytes + 1) + 1
        try:
            for first in range(0, source.num_examples, number):
                index = tf.range(first, min(first + number, source.num_examples))
                self.check(source.gather(index), first=tf.cast(first, tf.int64))
        except tf.errors.InvalidArgumentError as error:
            raise fault_in(error) or error

    @property
    def has_own_threads(self) -> bool:
        """Whether nobody else's code runs in it, so that a loop may wait for it.

        A loop that waits for a batch where it stands holds one of the threads that
        TensorFlow runs functions on; a user's function might need that thread.
        """
        source = self.source
        return isinstance(source, ArraySource) and source.transform is None

    def dataset(
        self, position: int = 0, *, shard: int = 0, num_shards: int = 1
    ) -> tf.data.Dataset:
        """The batches from `position` on, or a worker's part of each.

        Of arrays a worker reads its own examples only, unless they have a `transform`;
        of files its own files, where they are dealt to a multiple of `num_shards`
        streams; else it reads all and keeps its part.

        Args:
            position: global batches consumed since the start of training.
            shard: which part, 0 ... `num_shards` - 1: the rows from
                `shard * global_batch_size / num_shards` on.
            num_shards: in how many parts a batch is cut.

        Returns:
            A dataset of dicts: the example's tensors, `[rows, ...]`, where `rows` is
            `global_batch_size / num_shards`, and `weight`, float32 `[rows]`: the
            example's own weight or 1, and 0 for a record that only fills up the batch.

        Raises:
            ConfigError: parts that are not equal, or data of unknown length that are
                to be read once by several workers.
        """
        source, size = self.source, self._batch_size
        rows = size // num_shards
        if size % num_shards:
            raise ConfigError(
                f"`global_batch_size` ({size}) must be divisible by {num_shards} "
                "workers.",
                f"Use a multiple, such as {(rows + 1) * num_shards}.",
            )
        if num_shards > 1 and not self._repeat and self.num_examples is None:
            raise ConfigError(
                "Several workers cannot agree on the end of a tf.data.Dataset whose "
                "length is not known.",
                "Give `num_examples` of the DatasetSource.",
            )
        reads_part = isinstance(source, ArraySource) and source.transform is None
        if isinstance(source, FileSource):
            reads_part = source.num_streams(size) % num_shards == 0
        read = (shard, num_shards) if reads_part else (0, 1)
        if isinstance(source, ArraySource):
            batches = self._indexed(source, position, *read)
        elif isinstance(source, FileSource):
            batches = self._streamed(source, position, *read)
        else:
            assert isinstance(source, DatasetSource)
            batches = self._in_order(source.dataset, position)
        if num_shards > 1 and not reads_part:
            own = slice(shard * rows, (shard + 1) * rows)
            batches = batches.map(lambda batch: {n: t[own] for n, t in batch.items()})
            batches = batches.prefetch(tf.data.AUTOTUNE)
        options = tf.data.Options()
        options.deterministic = True
        # Here it is known what to prefetch.
        options.experimental_optimization.inject_prefetch = False
        if batches.options().autotune.enabled is None:
            # Its thread may hold up the end of an iterator by as long as it lived.
            options.autotune.enabled = False
        if self.has_own_threads:
            options.threading.private_threadpool_size = os.cpu_count() or 1
        # Workers split each batch between them, not the files.
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.DATA
        )
        return batches.with_options(options)

    def _indexed(
        self, source: ArraySource, position: int, shard: int, num_shards: int
    ) -> tf.data.Dataset:
        """The batches, read in `chunks` of at most `chunk` in each epoch."""
        assert self.batches_per_epoch is not None
        num_examples = tf.constant(source.num_examples, tf.int64)
        batches_per_epoch, size = self.batches_per_epoch, self._batch_size
        rows = size // num_shards
        chunk = min(_CHUNK_BYTES // (rows * source.example_bytes + 1), _CHUNK_BATCHES)
        chunks = -(-batches_per_epoch // max(1, chunk))
        chunk = -(-batches_per_epoch // chunks)

        @_as_written
        def load(number: tf.Tensor) -> Batch | tuple[Batch, tf.Tensor]:
            epoch, first = number // chunks, number % chunks * chunk
            last = tf.minimum(first + chunk, batches_per_epoch)
            index = tf.range(first * size, last * size)
            if num_shards > 1:
                index = tf.reshape(index, [-1, num_shards, rows])[:, shard]
                index = tf.reshape(index, [-1])
            record = index % num_examples
            if self._shuffle:
                shuffle, key = tf.random.experimental.index_shuffle, self._key(epoch)
                record = shuffle(record, key, num_examples - 1)
            batch = source.gather(record), index < num_examples
            return batch if source.transform else weighted(*batch)

        def transform(position: tf.Tensor, batch: tuple[Batch, tf.Tensor]) -> Batch:
            assert source.transform is not None
            epoch, number = position // batches_per_epoch, position % batches_per_epoch
            examples = source.transform(batch[0], _fold_in(self._key(epoch), number))
            examples = {n: _ensure_batch(t, size) for n, t in examples.items()}
            return weighted(examples, batch[1])

        epoch, number = divmod(position, batches_per_epoch)
        stop = tf.int64.max if self._repeat else chunks
        batches = tf.data.Dataset.range(epoch * chunks + number // chunk, stop)
        batches = batches.map(load, num_parallel_calls=tf.data.AUTOTUNE)
        batches = batches.rebatch(rows, drop_remainder=True).skip(number % chunk)
        if source.transform is not None:
            batches = batches.enumerate(position)
            batches = batches.map(transform, num_parallel_calls=tf.data.AUTOTUNE)
        elif chunk > 1:  # the next chunk is on its way, and cut without a copy
            return batches
        return batches.prefetch(tf.data.AUTOTUNE)

    @_as_written
    def _key(self, epoch: tf.Tensor) -> tf.Tensor:
        return _fold_in(tf.constant([0, self._seed]), epoch)

    def _streamed(
        self, source: FileSource, position: int, shard: int, num_shards: int
    ) -> tf.data.Dataset:
        """The batches, of `rows` examples of each stream."""
        assert self.batches_per_epoch is not None
        streams, length = source.num_streams(self._batch_size), self.batches_per_epoch
        own, rows = streams // num_shards, self._batch_size // streams
        first, batch = divmod(position, length)
        epochs = tf.data.Dataset.range(first, tf.int64.max if self._repeat else 1)

        def stream(number: tf.Tensor) -> tf.data.Dataset:
            def epoch_of(epoch: tf.Tensor) -> tf.data.Dataset:
                skip = tf.cast(epoch == first, tf.int64) * batch * rows
                return source.stream(
                    number, streams, length * rows, skip, self._key(epoch),
                    self._shuffle)

            return epochs.flat_map(epoch_of)

        records = tf.data.Dataset.range(shard * own, (shard + 1) * own).interleave(
            stream, own, rows, num_parallel_calls=tf.data.AUTOTUNE)
        batches = records.batch(own * rows, drop_remainder=True)
        batches = batches.map(
            lambda _, record: weighted(self.check(record[0]), record[1]),
            num_parallel_calls=tf.data.AUTOTUNE)
        return batches.prefetch(tf.data.AUTOTUNE)

    def _in_order(self, examples: tf.data.Dataset, position: int) -> tf.data.Dataset:
        @_as_written
        def fill_up(number: tf.Tensor, examples: Batch) -> Batch:
            examples = self.check(examples, first=number * self._batch_size)
            count = tf.shape(next(iter(examples.values())))[0]
            index = tf.range(self._batch_size)
            filled = {n: tf.gather(t, index % count) for n, t in examples.items()}
            return weighted(filled, index < count)

        batches = examples.batch(self._batch_size).enumerate()
        batches = batches.map(fill_up, num_parallel_calls=tf.data.AUTOTUNE)
        if self._repeat:
            if self.batches_per_epoch is not None:
                position %= self.batches_per_epoch
            batches = batches.repeat()
        return batches.skip(position).prefetch(tf.data.AUTOTUNE)


def fingerprint(pipeline: Pipeline) -> dict[str, str]:
    """Returns what workers must agree on before they train on the same data.

    It costs the first global batch: every worker makes all of it. Data that come in
    another order at each reading, as of a shuffle without a seed, differ here.
    """
    dataset, source, crc = pipeline.dataset(), pipeline.source, 0
    with naming_damage([pipeline]):
        batch = next(iter(dataset))
    for _, tensor in sorted(batch.items()):
        crc = zlib.crc32(tf.io.serialize_tensor(tensor).numpy(), crc)
    facts = {
        "num_examples": str(pipeline.num_examples),
        "elements": str(dataset.element_spec),
        "first_batch_crc32": f"{crc:08x}",
    }
    if isinstance(source, FileSource):
        names = [os.path.basename(path) for path in source.files]  # folders may differ
        files = f"{names} {source.examples_per_file}"
        facts["files_crc32"] = f"{zlib.crc32(files.encode()):08x}"
    return facts


@_as_written
def weighted(examples: Batch, real: tf.Tensor) -> Batch:
    """The batch with the weights of its examples; what is not real weighs 0."""
    weight = tf.cast(real, tf.float32)
    if "weight" in examples:
        weight *= tf.cast(examples["weight"], tf.float32)
    return {**examples, "weight": weight}


def _ensure_batch(tensor: tf.Tensor, size: int) -> tf.Tensor:
    """The tensor, with a static first dimension whatever a transform did to it."""
    return tf.ensure_shape(tensor, tf.TensorShape([size]).concatenate(tensor.shape[1:]))
