"""What TensorBoard shows of a training beside its figures."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mpl.experiment import Experiment
from mpl.launch.config import TRAINING_MODES, fields_of
from mpl.launch.option import written
from mpl.launch.profile import Profile
from mpl.loop.summaries import AFTER_STEP
from mpl.step.bucket import Bucket

_COLUMNS = ("variable", "shape", "master", "compute", "bucket", "parameters")


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
        optimizers, strategy = experiment.optimizer, experiment.strategy
        self._optimizers: dict[str, Any] = {"": optimizers}
        if isinstance(optimizers, Mapping):
            self._optimizers = {f"{name}/": each for name, each in optimizers.items()}
        # The steps of parameter servers are all traced as one.
        servers = isinstance(strategy, tf.distribute.ParameterServerStrategy)
        with strategy.scope():
            self._kept = {name: [_like(bucket) for bucket in optimizer.buckets]
                          for name, optimizer in self._optimizers.items()
                          if self._every and not servers}

    def ahead(self, step: int) -> int:
        """Returns how many steps there are to where a block must end."""
        return (-step - 1) % self._every or 1 if self._every else sys.maxsize

    @contextlib.contextmanager
    def around(self, end: int) -> Iterator[None]:
        """Is around a block that ends after step `end`."""
        due = bool(self._every) and end % self._every == 0
        for name, kept in self._kept.items() if due else ():
            self._optimizers[name].kept = kept
        try:
            yield
        finally:
            for optimizer in self._optimizers.values():
                optimizer.kept = []
        with tf.summary.record_if(True):
            if tf.summary.should_record_summaries():
                if not self._described:
                    self._describe()
                if due and int(self._experiment.global_step) == end:
                    self._write_histograms()

    def _describe(self) -> None:
        config, graph = self._experiment.config, self._experiment.trainer.graph
        flags = [(field.name, written(getattr(config, field.name)))
                 for field in fields_of(type(config))]
        parameters: list[tuple] = [
            (name + entry.key, shape := entry.value.shape, bucket.kind.master.name,
             bucket.kind.compute.name, f"{name}{number}", shape.num_elements())
            for name, optimizer in self._optimizers.items()
            for number, bucket in enumerate(optimizer.buckets)
            for entry in bucket.entries]
        parameters.append(("total", "", "", "", "", sum(row[-1] for row in parameters)))
        for tag, head, rows in (("flags", ("flag", "value"), flags),
                                ("parameters", _COLUMNS, parameters)):
            lines = [head, ["---"] * len(head), *rows]
            table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
            tf.summary.text(tag, table, description=AFTER_STEP)
        if graph is not None:
            tf.summary.graph(graph)
        self._described = True

    def _write_histograms(self) -> None:
        for name, optimizer in self._optimizers.items():
            masters = [bucket.variable for bucket in optimizer.buckets]
            kinds = {"weights": masters, "gradients": self._kept.get(name, [])}
            for kind, variables in kinds.items():
                for bucket, variable in zip(optimizer.buckets, variables):
                    values = [] if variable is None else bucket.split(variable.numpy())
                    for entry, part in zip(bucket.entries, values):
                        tf.summary.histogram(
                            f"{kind}/{name}{entry.key}", part[np.isfinite(part)],
                            description=AFTER_STEP)


def _like(bucket: Bucket) -> tf.Variable | None:
    """Returns a variable for the gradient of a bucket; None for a sparse table's."""
    dtype = tf.float64 if bucket.kind.master == tf.float64 else tf.float32
    zeros = tf.zeros([] if bucket.kind.sparse else bucket.variable.shape, dtype)
    return None if bucket.kind.sparse else tf.Variable(zeros, trainable=False)


@contextlib.contextmanager
def watching(experiment: Experiment, path: str) -> Iterator[None]:
    """Meanwhile training writes the details and the profile that its settings ask for.

    Args:
        experiment: set up.
        path: folder of the run.
    """
    config = experiment.config
    profile = Profile(config.profile_steps, os.path.join(path, "profile"),
                      experiment.peers.is_chief)
    watches: list[Any] = [profile] if config.profile_steps else []
    if config.mode in TRAINING_MODES and config.summary_every_steps != 0:
        watches.append(Details(experiment))  # in all processes: they cut blocks alike
    experiment.trainer.watches = watches
    try:
        yield
    finally:
        profile.stop()
