"""The inner training loop where workers run the steps, each at its own pace."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from mpl.errors import ConfigError
from mpl.loop.inner_loop import converted, counter


class CoordinatedLoop:
    """Has the workers of a `ParameterServerStrategy` run a step, as `InnerLoop` does.

        for each of num_steps: schedule step(own iterator)    # on a worker that is free
        wait until all are done
        global_step += num_steps

    Workers do not wait for each other: a step reads the variables as they are and
    writes what it found, whatever others wrote meanwhile. So runs do not repeat bit for
    bit, and a resumed one goes on from the same state, but not in the same order.

    Worker i of n takes every n-th batch of the data, from the i-th on, and reads those
    between; a fast one is further on than a slow one. Arrays are sent to each, so they
    may hold 2 GB at most. The position counts the batches of all. From there on all
    read when the run is resumed; a worker that was started again reads from where this
    process began.

    `global_step` is exact: it counts what was scheduled and has ended. TensorFlow runs
    a step again, on any worker, whose worker was lost before it had answered. It may
    have been applied before, in part or in whole; then what it counts itself
    (`applied_steps`, metrics) is more than `global_step`, never less, by the number of
    such steps. While no worker is left, the chief waits for one.

    Args:
        step: takes an iterator of batches.
        strategy: in which the step's variables live.
        global_step: int64 variable.
    """

    def __init__(
        self, step: Callable[[Any], Any],
        strategy: tf.distribute.ParameterServerStrategy, global_step: tf.Variable,
    ):
        self._step, self._global_step = step, global_step
        devices = tf.config.list_logical_devices("CPU")
        places = [tf.DeviceSpec.from_string(device.name) for device in devices]
        self._num_workers = len({at.task for at in places if at.job == "worker"})
        self._coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
        self._remote = tf.function(self._on_worker, autograph=False)
        self._batches_a_step = 0
        self.dataset: Any = None
        self.iterators: Any = None
        self.done, self.data_ended = counter(), False
        self.halt = tf.Variable(False, trainable=False)  # not heeded within a block

    def run(
        self, num_steps: Any, make_dataset: Callable[[], Any], positions: Any = None,
        variant: str = "",
    ) -> None:
        """Runs `num_steps` steps, see `InnerLoop.run`; the data must not end.

        Raises:
            ConfigError: the number of steps is -1.
        """
        num_steps = int(num_steps)
        if num_steps < 0:
            cause = f"`num_steps` ({num_steps}) must be known with parameter servers."
            raise ConfigError(cause, "Train for a number of steps.")
        if self.iterators is None:
            self.iterators = self._deal(make_dataset())
        for _ in range(num_steps):
            self._coordinator.schedule(self._remote, args=(self.iterators,))
        self._coordinator.join()
        self.done.assign(num_steps)
        self._global_step.assign_add(num_steps)
        if positions is not None:
            positions.assign_add(num_steps * self._batches_a_step)

    def progress(self) -> tuple[str, int]:
        """Returns what changes from block to block, see `InnerLoop.progress`."""
        return "", 0

    def _deal(self, dataset: tf.data.Dataset) -> Any:
        """Returns an iterator on each worker; what they read is sent to them once."""
        graph, structure = graph_of(dataset), dataset.element_spec

        def share() -> tf.data.Dataset:
            index = tf.distribute.coordinator.experimental_get_current_worker_index()
            variant = tf.raw_ops.DatasetFromGraph(graph_def=graph)
            own = tf.data.experimental.from_variant(variant, structure)
            return own.shard(self._num_workers, index)

        return iter(self._coordinator.create_per_worker_dataset(share))

    def _on_worker(self, iterator: Any) -> None:
        batches = _Counted(iterator)
        converted(self._step)(batches)
        self._batches_a_step = batches.count


def graph_of(dataset: tf.data.Dataset) -> tf.Tensor:
    """Returns a dataset as a string that another process can read.

    Raises:
        ConfigError: the dataset calls Python, whose functions stay in their process.
    """
    text = tf.raw_ops.DatasetToGraphV2(
        input_dataset=tf.data.experimental.to_variant(dataset),
        strip_device_assignment=True)
    graph = tf.compat.v1.GraphDef.FromString(text.numpy())
    nodes = [node for each in graph.library.function for node in each.node_def]
    if any("PyFunc" in node.op for node in [*graph.node, *nodes]):
        raise ConfigError(
            "The training data call Python (`from_generator`, `py_function`), and "
            "workers of parameter servers run only graphs.",
            "Use TensorFlow's operations or arrays, or another strategy.",
        )
    return text


class _Counted:
    """An iterator that counts what a step takes while it is traced."""

    def __init__(self, iterator: Any):
        self._iterator, self.count = iterator, 0

    def __iter__(self) -> "_Counted":
        return self

    def __next__(self) -> Any:
        self.count += 1
        return next(self._iterator)

    get_next = __next__
