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

    Worker i of n reads every n-th batch of the data, from the i-th on; a fast one is
    further on than a slow one. The position counts the batches of all: from there on
    all read anew when the run is resumed, a worker that was started again from where
    this process began.

    `global_step` is exact: it counts what was scheduled and has ended. TensorFlow runs
    a step again, on any worker, when its worker was lost before it had answered. Such a
    step may have been applied in part or in whole before; what it counts itself
    (`applied_steps`, metrics) then exceeds `global_step`, by one for each worker lost
    at most.

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

    def _deal(self, dataset: tf.data.Dataset) -> Any:
        """Returns an iterator on each worker; what they read is sent to them once."""
        variant, structure = tf.data.experimental.to_variant(dataset), dataset.element_spec
        graph = tf.raw_ops.DatasetToGraphV2(
            input_dataset=variant, strip_device_assignment=True)

        def share() -> tf.data.Dataset:
            index = tf.distribute.coordinator.experimental_get_current_worker_index()
            own = tf.raw_ops.DatasetFromGraph(graph_def=graph)
            own = tf.data.experimental.from_variant(own, structure)
            return own.shard(self._num_workers, index)

        return iter(self._coordinator.create_per_worker_dataset(share))

    def _on_worker(self, iterator: Any) -> None:
        batches = _Counted(iterator)
        converted(self._step)(batches)
        self._batches_a_step = batches.count


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
