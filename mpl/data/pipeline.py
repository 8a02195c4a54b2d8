"""The order of the examples, and the batches made of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.data.source import ArraySource, Batch, Source
from mpl.errors import ConfigError

_CHUNK_BYTES, _CHUNK_BATCHES = 2**20, 64


@dataclasses.dataclass(frozen=True)
class DataContext:
    """What `build_data` may need to know.

    Attributes:
        data_dir: the folder with the data, or None: the experiment's own default.
        global_batch_size: examples in a step, over all replicas.
        seed: the run's seed.
        compute_dtype: what the model computes in; None: the model's own dtypes.
    """

    data_dir: str | None
    global_batch_size: int
    seed: int
    compute_dtype: tf.DType | None


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
    How many replicas share a batch does not enter.

    Args:
        source: where the examples come from.
        global_batch_size: examples in a batch, over all replicas.
        seed: 0 ... 2³¹ - 1, of the order and of the source's `transform`.
        shuffle: another order each epoch (False: the source's own). A `DatasetSource`
            has its own order always, and says so in the log.
        repeat: epoch after epoch, for training; False: one epoch, for evaluation.

    Raises:
        ConfigError: a batch size below 1 or a seed out of range.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool,
        repeat: bool,
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
        self._source = source
        self._batch_size = global_batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._repeat = repeat
        self.num_examples: int | None = source.num_examples
        self.batches_per_epoch: int | None = None
        if self.num_examples is not None:
            self.batches_per_epoch = -(-self.num_examples // global_batch_size)
        if shuffle and not isinstance(source, ArraySource):
            logging.warning(
                "`shuffle` is left to the tf.data.Dataset: its examples come in its "
                "own order in each epoch. Shuffle them there, with a fixed seed, or "
                "give arrays."
            )

    def dataset(self, position: int = 0) -> tf.data.Dataset:
        """The batches from `position` on.

        Args:
            position: global batches consumed since the start of training.

        Returns:
            A dataset of dicts: the example's tensors, `[global_batch_size, ...]`, and
            `weight`, float32 `[global_batch_size]`: the example's own weight or 1, and
            0 for a record that only fills up the batch.
        """
        if isinstance(self._source, ArraySource):
            batches = self._indexed(self._source, position)
        else:
            batches = self._in_order(self._source.dataset, position)
            batches = batches.prefetch(tf.data.AUTOTUNE)
        options = tf.data.Options()
        options.deterministic = True
        # What is prefetched here is prefetched below, and nothing a second time.
        options.experimental_optimization.inject_prefetch = False
        # Workers split each batch between them, not the files.
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.DATA
        )
        return batches.with_options(options)

    def _indexed(self, source: ArraySource, position: int) -> tf.data.Dataset:
        """Small batches are read by the chunk: an epoch has `chunks` of `chunk`."""
        assert self.batches_per_epoch is not None
        num_examples = tf.constant(source.num_examples, tf.int64)
        batches_per_epoch, size = self.batches_per_epoch, self._batch_size
        chunk = min(_CHUNK_BYTES // (size * source.example_bytes + 1), _CHUNK_BATCHES)
        chunks = -(-batches_per_epoch // max(1, chunk))
        chunk = -(-batches_per_epoch // chunks)

        def epoch_key(epoch: tf.Tensor) -> tf.Tensor:
            return _fold_in(tf.constant([0, self._seed]), epoch)

        def load(number: tf.Tensor) -> Any:
            epoch, first = number // chunks, number % chunks * chunk
            last = tf.minimum(first + chunk, batches_per_epoch)
            index = tf.range(first * size, last * size)
            record = index % num_examples
            if self._shuffle:
                record = tf.random.experimental.index_shuffle(
                    record, epoch_key(epoch), num_examples - 1
                )
            examples, real = source.gather(record), index < num_examples
            return (examples, real) if source.transform else _weighted(examples, real)

        def transform(position: tf.Tensor, batch: tuple[Batch, tf.Tensor]) -> Batch:
            assert source.transform is not None
            key = epoch_key(position // batches_per_epoch)
            seed = _fold_in(key, position % batches_per_epoch)
            examples = source.transform(batch[0], seed)
            examples = {n: _ensure_batch(t, size) for n, t in examples.items()}
            return _weighted(examples, batch[1])

        epoch, batch = divmod(position, batches_per_epoch)
        start = epoch * chunks + batch // chunk
        stop = tf.int64.max if self._repeat else chunks
        batches = _map(tf.data.Dataset.range(start, stop), load)
        batches = batches.rebatch(size, drop_remainder=True).skip(batch % chunk)
        if source.transform is not None:
            batches = _map(batches.enumerate(position), transform)
        # Handing a small batch from thread to thread costs more than slicing a chunk.
        small = chunk > 1 and source.transform is None
        return batches if small else batches.prefetch(tf.data.AUTOTUNE)

    def _in_order(self, examples: tf.data.Dataset, position: int) -> tf.data.Dataset:
        def fill_up(examples: Batch) -> Batch:
            count = tf.shape(next(iter(examples.values())))[0]
            index = tf.range(self._batch_size)
            filled = {n: tf.gather(t, index % count) for n, t in examples.items()}
            return _weighted(filled, index < count)

        batches = _map(examples.batch(self._batch_size), fill_up)
        if self._repeat:
            if self.batches_per_epoch is not None:
                position %= self.batches_per_epoch
            batches = batches.repeat()
        return batches.skip(position)


def _map(dataset: tf.data.Dataset, function: Callable) -> tf.data.Dataset:
    return dataset.map(
        function, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )


def _weighted(examples: Batch, real: tf.Tensor) -> Batch:
    """The batch with the weights of its examples; what is not real weighs 0."""
    weight = tf.cast(real, tf.float32)
    if "weight" in examples:
        weight *= tf.cast(examples["weight"], tf.float32)
    return {**examples, "weight": weight}


def _fold_in(seed: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Another int32 [2] seed for each number."""
    return tf.random.experimental.stateless_fold_in(seed, number)


def _ensure_batch(tensor: tf.Tensor, size: int) -> tf.Tensor:
    """The tensor, with a static first dimension whatever a transform did to it."""
    return tf.ensure_shape(tensor, tf.TensorShape([size]).concatenate(tensor.shape[1:]))
