"""Summaries for TensorBoard: values, and what a step says to `tf.summary`."""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging


class Summaries:
    """Writes summaries at `global_step`; a directory of None is nowhere.

    TensorFlow needs the package tensorboard; without it one warning says so.
    """

    def __init__(self, global_step: tf.Variable):
        self._global_step = global_step
        self._writers: dict[str | None, Any] = {None: None}

    @contextlib.contextmanager
    def to(self, directory: str | None, interval: int | None = 1) -> Iterator[bool]:
        """Makes `tf.summary` write there at multiples of an interval; None: never."""
        if directory not in self._writers:
            self._writers[directory] = None
            if importlib.util.find_spec("tensorboard") is None:
                logging.warning("No summaries: they need `pip install tensorboard`.")
            else:
                self._writers[directory] = tf.summary.create_file_writer(directory)
        writer = self._writers[directory]
        if writer is None:
            yield False
            return

        def is_multiple() -> tf.Tensor:
            return tf.equal(self._global_step % interval, 0)

        with writer.as_default(self._global_step):
            with tf.summary.record_if(is_multiple if interval else False):
                yield True

    def write(self, directory: str | None, values: Mapping[str, Any]) -> None:
        """Writes the numbers among values by name."""
        with self.to(directory) as is_open:
            for name, value in values.items():
                if is_open and np.ndim(value) == 0:
                    tf.summary.scalar(name, value)

    def flush(self) -> None:
        """Puts on disk what was written."""
        for writer in self._writers.values():
            if writer is not None:
                writer.flush()
