"""What TensorBoard shows of a training beside its figures."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mpl.experiment import Experiment
from mpl.launch.option import written
from mpl.loop.summaries import AFTER_STEP
from mpl.step.bucket import Bucket


class Details:
    """Writes flags, parameters and the graph of a step once, and histograms.

    At multiples of `--histogram_every_steps` a step runs alone that is traced apart: it
    leaves its gradients in variables, and computes what the others do. A watch of
    `ExperimentTrainer`; it writes where `tf.summary` has a writer.

    Args:
        experiment: set up.
    """

    def __init__(self, experiment: Experiment):
        self._experiment, self._described = experiment, False
        self._every = experiment.config.histogram_every_steps
        optimizers = experiment.optimizer
        named = optimizers if isinstance(optimizers, Mapping) else {"": optimizers}
        self._optimizers: dict[str, Any] = dict(named)
        self._kept: dict[str, list[tf.Variable]] = {name: [] for name in named}
        # The steps of parameter servers are all traced as one.
        servers = tf.distribute.ParameterServerStrategy
        if self._every and not isinstance(experiment.strategy, servers):
            with experiment.strategy.scope():
                self._kept = {name: [_like(bucket) for bucket in optimizer.buckets]
                              for name, optimizer in named.items()}

    def ahead(self, step: int) -> int:
        """Returns how many steps there are to where a block must end."""
        return (-step - 1) % self._every or 1 if self._every else sys.maxsize

    @contextlib.contextmanager
    def around(self, end: int) -> Iterator[None]:
        """Is around a block that ends after step `end`."""
        due = bool(self._every) and end % self._every == 0
        self._keep(due)
        try:
            yield
        finally:
            self._keep(False)
        with tf.summary.record_if(True):
            if tf.summary.should_record_summaries():
                if not self._described:
                    self._describe()
                if due and int(self._experiment.global_step) == end:
                    self._write_histograms()

    def _keep(self, keeps: bool) -> None:
        self._experiment.trainer.keeps_gradients = keeps
        for name, optimizer in self._optimizers.items():
            optimizer.kept = self._kept[name] if keeps else []

    def _describe(self) -> None:
        self._described = True
        config = dataclasses.asdict(self._experiment.config)
        rows = [["flag", "value"], ["---"] * 2]
        rows += [[name, written(value)] for name, value in config.items()]
        tf.summary.text("flags", _table(rows), description=AFTER_STEP)
        rows, total = [
            ["variable", "shape", "master", "compute", "bucket", "parameters"],
            ["---"] * 6], 0
        for name, bucket, number, _ in self._buckets():
            for entry in bucket.entries:
                shape, kind = entry.value.shape, bucket.kind
                count = int(np.prod(shape))
                rows.append([
                    f"{name}{entry.key}", str(tuple(shape)), kind.master.name,
                    kind.compute.name, f"{name}{number}", f"{count:,}"])
                total += count
        rows.append(["total", "", "", "", "", f"{total:,}"])
        tf.summary.text("parameters", _table(rows), description=AFTER_STEP)
        if self._experiment.trainer.graph is not None:
            tf.summary.graph(self._experiment.trainer.graph)

    def _buckets(self) -> Iterator[tuple[str, Bucket, int, Any]]:
        """Yields the model's name and "/", a bucket, its number, and what is kept."""
        for name, optimizer in self._optimizers.items():
            kept = self._kept[name] or [None] * len(optimizer.buckets)
            for number, bucket in enumerate(optimizer.buckets):
                yield f"{name}/" * bool(name), bucket, number, kept[number]

    def _write_histograms(self) -> None:
        for name, bucket, _, kept in self._buckets():
            values = {"weights": bucket.variable}
            if kept is not None and not bucket.kind.sparse:
                values["gradients"] = kept
            for kind, variable in values.items():
                parts = bucket.split(variable.numpy())
                for entry, part in zip(bucket.entries, parts):
                    tag, finite = f"{kind}/{name}{entry.key}", part[np.isfinite(part)]
                    tf.summary.histogram(tag, finite, description=AFTER_STEP)


def _like(bucket: Bucket) -> tf.Variable:
    """Returns a variable for the gradient of a bucket; a sparse table's is not kept."""
    shape = [] if bucket.kind.sparse else bucket.variable.shape
    return tf.Variable(tf.zeros(shape, bucket.variable.dtype), trainable=False)


def _table(rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
