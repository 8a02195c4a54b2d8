"""The inner training loop: many steps for one call from the host."""

import abc
import dataclasses
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.errors import NonFiniteError
from mpl.loop.inner_loop import InnerLoop, counter


@dataclasses.dataclass(frozen=True)
class TrainerOptions:
    """How an inner loop runs; its results do not depend on it.

    Attributes:
        use_tf_function: Trace the step; False runs all eagerly, for debugging.
        use_tf_while_loop: Run a whole traced block as one `tf.while`; False calls one
            traced step at a time from Python.
    """

    use_tf_function: bool = True
    use_tf_while_loop: bool = True


class Trainer(tf.Module, metaclass=abc.ABCMeta):
    """Runs blocks of training steps; subclasses define the step (as in Orbit).

        train(num_steps):
            train_loop_begin()
            repeat num_steps times: train_step(iterator)     # traced once
            return train_loop_end()

    The data are a tf.data.Dataset, a distributed one, or a nest of them, each with its
    own position. Whoever defines `train_step` advances the run's `global_step` in it.

    Args:
        train_dataset: The data; None where `make_train_dataset` is overridden.
        options: How the loop runs.
        name: Of the module.

    Attributes:
        position: int64 variable, batches taken from the data since training began; a
            nest of variables for a nest of datasets. It belongs into checkpoints.
        loop: The `InnerLoop` that runs the steps.
        variant: Name of a kind of step, for a `train_step` that knows several; each is
            traced once.
    """

    variant = ""

    def __init__(
        self, train_dataset: Any = None, options: TrainerOptions | None = None,
        *, name: str | None = None,
    ):
        super().__init__(name=name)
        self.position = tf.nest.map_structure(lambda _: counter(), train_dataset)
        options, should_stop = options or TrainerOptions(), self.should_stop
        self.loop = InnerLoop(self.train_step, options, train_dataset, should_stop)

    @abc.abstractmethod
    def train_step(self, iterator: Any) -> None:
        """Runs one step; cross-replica context, in a tf.function unless eager.

        Args:
            iterator: Gives a batch for each `next(iterator)`; a nest for a nest of
                data. A step may take several batches or call `strategy.run` often.
        """

    def train_loop_begin(self) -> None:
        """Is called before each block."""

    def train_loop_end(self) -> dict[str, Any] | None:
        """Is called after each block; returns what `train` returns."""

    def should_stop(self) -> tf.Tensor | bool:
        """Returns a boolean tensor; true ends the block before the next step."""
        return False

    def nonfinite_error(self) -> NonFiniteError | None:
        """Returns what to raise when `should_stop` has ended a block, or None."""

    def report(self) -> dict[str, Any]:
        """Returns values to add to a block's where they are logged or summarised."""
        return {}

    def reset_metrics(self) -> None:
        """Is called after values were logged: the next ones are of later steps."""

    def make_train_dataset(self) -> Any:
        """Returns data that begin at `position`; a tf.data.Dataset can skip there."""

        def seek(dataset: Any, position: tf.Variable) -> Any:
            num_batches = int(position.numpy())
            if hasattr(dataset, "skip"):
                return dataset.skip(num_batches)
            if num_batches:
                logging.warning("%s begins anew, at batch 0.", type(dataset).__name__)
            return dataset

        return tf.nest.map_structure(seek, self.train_dataset, self.position)

    def train(self, num_steps: tf.Tensor | int = -1) -> dict[str, Any] | None:
        """Runs `num_steps` steps; -1: to the end of the data.

        Fewer steps run only if the data end or `should_stop` says so: `steps_done`
        tells how many, `data_ended` which it was.

        Raises:
            EndOfDataError: There was not one batch.
        """
        self.train_loop_begin()
        make, variant = self.make_train_dataset, self.variant
        self.loop.run(num_steps, make, self.position, variant)
        return self.train_loop_end()

    def reset_iterator(self, position: int | None = None) -> None:
        """Lets the next `train` begin at `position`, as it is now or as given."""
        self.loop.iterators = None
        if position is not None:
            for variable in tf.nest.flatten(self.position):
                variable.assign(position)

    @property
    def steps_done(self) -> int:
        """How many steps the last `train` finished."""
        return int(self.loop.done.numpy())

    @property
    def data_ended(self) -> bool:
        """Whether the last `train` came to the end of the data."""
        return self.loop.data_ended

    @property
    def train_dataset(self) -> Any:
        """The data; new ones begin at position 0."""
        return self.loop.dataset

    @train_dataset.setter
    def train_dataset(self, train_dataset: Any) -> None:
        self.loop.dataset = train_dataset
        self.reset_iterator(position=0)
