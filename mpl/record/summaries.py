"""Scalars for TensorBoard, where it is installed."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from absl import logging


class Summaries:
    """Writes the values of each report as scalars, a folder for each split.

    TensorFlow needs the package tensorboard to write them; without it one warning says
    so and nothing is written. A reporter of the loop.

    Args:
        directory: Where TensorBoard looks: `tensorboard --logdir=<directory>`.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = os.fspath(directory)
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._can_write = importlib.util.find_spec("tensorboard") is not None

    def start(self, step: int, total_steps: int | None) -> None:
        """Says what is missing, if anything is."""
        if not self._can_write:
            logging.warning("No summaries: they need `pip install tensorboard`.")

    def train(
        self, step: int, values: Mapping[str, Any], steps_per_sec: float | None
    ) -> None:
        """Writes the values of training and its speed."""
        speed = {} if steps_per_sec is None else {"steps_per_sec": steps_per_sec}
        self._write(step, "train", {**values, **speed})

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes the result of one evaluation."""
        self._write(step, split, values)

    def finish(self, step: int) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        if not self._can_write:
            return
        if split not in self._writers:
            folder = os.path.join(self.directory, split)
            self._writers[split] = tf.summary.create_file_writer(folder)
        with self._writers[split].as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
            self._writers[split].flush()
