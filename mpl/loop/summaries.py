"""Summaries for TensorBoard: values, and what a step says to `tf.summary`."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging


class Summaries:
    """Writes summaries at `global_step`; where there is no directory, none.

    TensorFlow needs the package tensorboard; without it one warning says so.

    Args:
        global_step: int64 variable.
        directory: For those of training, the split "train"; or None.
        eval_directory: With a folder for each other split; None: as the other.
    """

    def __init__(self, global_step: tf.Variable, directory: Any, eval_directory: Any):
        self._directory, self._eval_directory = directory, eval_directory or directory
        if self._eval_directory and importlib.util.find_spec("tensorboard") is None:
            logging.warning("No summaries: they need `pip install tensorboard`.")
            self._directory = self._eval_directory = None
        self._global_step = global_step
        self._writer_at = functools.cache(tf.summary.create_file_writer)

    @contextlib.contextmanager
    def to(self, split: str, interval: int = 1) -> Iterator[bool]:
        """Makes `tf.summary` write at multiples of an interval; says whether it can."""
        path = self._eval_directory and os.path.join(self._eval_directory, split)
        path = self._directory if split == "train" else path
        if not path:
            yield False
            return
        with self._writer_at(path).as_default(self._global_step):
            with tf.summary.record_if(lambda: self._global_step % interval == 0):
                yield True
        self._writer_at(path).flush()

    def write(self, split: str, values: Mapping[str, Any]) -> None:
        """Writes the numbers among values by name."""
        with self.to(split) as can_write:
            for name, value in values.items():
                if can_write and np.ndim(value) == 0:
                    tf.summary.scalar(name, value)
