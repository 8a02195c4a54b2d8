"""Runs a step many times: what trainers and evaluators have in common."""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError


class EndOfDataError(ConfigError):
    """A loop was asked for steps and the data had not one batch left."""


class StepIterator:
    """The iterator a step sees: `next` gives it a batch and advances the position.

    Args:
        iterator: A `tf.data.Iterator` or a distributed one.
        position: int64 variable that counts the batches, or None.
        take: `take(n)` gives the step's n-th batch, taken before the step starts.
            None: every batch is taken where `next` stands.
    """

    def __init__(
        self,
        iterator: Any,
        position: tf.Variable | None = None,
        take: Callable[[int], Any] | None = None,
    ):
        self._iterator, self._position, self._take = iterator, position, take
        self._graph, self._taken = _graph(), 0

    def __iter__(self) -> "StepIterator":
        return self

    def __next__(self) -> Any:
        if self._graph is not _graph():  # in a tf.while or tf.cond of the step
            self._take = None  # for good, or batches would change places
        if self._take is None:
            batch = next(self._iterator)
        else:
            batch = self._take(self._taken)
            self._taken += 1
        if self._position is not None:
            tensors = tf.nest.flatten(batch, expand_composites=True)
            with tf.control_dependencies(tensors):  # the end of the data counts not
                self._position.assign_add(1)
        return batch

    get_next = __next__


class InnerLoop:
    """Calls a step many times: in a `tf.while`, from Python, or eagerly.

        done = 0
        while (num_steps < 0 or done < num_steps) and not should_stop():
            step(iterators)          # the end of the data ends the loop
            done += 1

    A traced step is a function of its own, and its batches are taken before it starts:
    nothing of a step runs for which there is no batch. (In one graph, whatever does
    not depend on the batch would run: `global_step.assign_add(1)` for one.)

    Args:
        step: Called with a `StepIterator` for each iterator, nested as they are.
        options: `TrainerOptions`, or others with the same attributes.
        should_stop: Returns a boolean tensor before each step, or None.

    Attributes:
        data_ended: Whether the last `run` ended because the data did.
    """

    def __init__(
        self,
        step: Callable[[Any], Any],
        options: Any,
        should_stop: Callable[[], Any] | None = None,
    ):
        if options.use_tf_while_loop and not options.use_tf_function:
            raise ConfigError(
                "`use_tf_while_loop` (True) needs `use_tf_function`, which is False.",
                "Set both to False to run eagerly.",
            )
        self._step, self._should_stop = step, should_stop
        traced = options.use_tf_function
        self._one_step = tf.function(self._run_step) if traced else self._run_step
        self._block = tf.function(self._run) if options.use_tf_while_loop else self._run
        self._done_before = counter()
        self._steps: Any = 0
        self._traced: dict[Any, tuple[int, str]] = {}
        self.data_ended = False

    @property
    def steps_done(self) -> int:
        """How many steps the last `run` finished."""
        return int(self._steps)

    def run(
        self,
        iterators: Any,
        num_steps: tf.Tensor | int,
        positions: Any = None,
        collect: Callable[[Any], None] | None = None,
    ) -> None:
        """Runs `num_steps` steps; -1: all that the data give.

        Args:
            iterators: A nest of `tf.data` or distributed iterators.
            num_steps: int32 or int64 scalar.
            positions: A like nest of int64 variables that count batches, or None.
            collect: Called with what each step returns; the loop is then Python's.

        Raises:
            EndOfDataError: There was not one batch.
        """
        self._positions = [None] * len(tf.nest.flatten(iterators))
        if positions is not None:
            self._positions = tf.nest.flatten(positions)
        block = self._run if collect else self._block
        self.data_ended = False
        try:
            self._steps = block(iterators, tf.cast(num_steps, tf.int64), collect)
        except (StopIteration, tf.errors.OutOfRangeError):
            self.data_ended, self._steps = True, int(self._done_before.numpy())
        self._warn_of_retrace(iterators)
        if self.data_ended and self._steps == 0:
            raise EndOfDataError(
                f"{int(num_steps)} steps were asked for and the data gave no batch.",
                "Give data that are not empty, and repeat them to train for longer.",
            )

    def _run(self, iterators: Any, num_steps: tf.Tensor, collect: Any) -> tf.Tensor:
        one_step = self._run_step if tf.inside_function() else self._one_step
        done = tf.constant(0, tf.int64)
        while self._goes_on(done, num_steps):  # traced, this is a tf.while
            with tf.name_scope(""):
                output = one_step(iterators, done)
            if collect:
                collect(output)
            done += 1
        return done

    def _goes_on(self, done: tf.Tensor, num_steps: tf.Tensor) -> tf.Tensor:
        goes_on = (num_steps < 0) | (done < num_steps)
        stop = self._should_stop() if self._should_stop else None
        return goes_on if stop is None else goes_on & ~tf.convert_to_tensor(stop)

    def _run_step(self, iterators: Any, done: tf.Tensor) -> Any:
        flat, outer, traced = tf.nest.flatten(iterators), _graph(), tf.inside_function()
        ahead: list[list] = [[] for _ in flat]

        def take(index: int, number: int) -> Any:
            # A step that makes variables is traced twice; its batches are the same.
            if number == len(ahead[index]):
                with outer.as_default():
                    ahead[index].append(next(flat[index]))
            return ahead[index][number]

        def step(iterators: Any) -> Any:
            views = [
                StepIterator(
                    iterator,
                    self._positions[index],
                    functools.partial(take, index) if traced else None,
                )
                for index, iterator in enumerate(tf.nest.flatten(iterators))
            ]
            return self._step(tf.nest.pack_sequence_as(iterators, views))

        with tf.control_dependencies([self._done_before.assign(done)]):
            # Called with the iterators, it waits for what was taken from them.
            return (tf.function(step) if traced else step)(iterators)

    def _warn_of_retrace(self, iterators: Any) -> None:
        for function in (self._block, self._one_step):
            if not hasattr(function, "experimental_get_tracing_count"):
                continue
            count = function.experimental_get_tracing_count()
            specs = str([_spec(iterator) for iterator in tf.nest.flatten(iterators)])
            before, old_specs = self._traced.get(function, (0, specs))
            if 0 < before < count:
                cause = f"the batches changed from {old_specs} to {specs}"
                if specs == old_specs:
                    cause = "its iterator is of another kind, device or strategy"
                logging.warning("The step was traced again (%d): %s.", count, cause)
            self._traced[function] = count, specs


def iterators_of(data: Any) -> Any:
    """Returns an iterator for each dataset of a nest."""
    for dataset in tf.nest.flatten(data):
        if not isinstance(dataset, (tf.data.Dataset, tf.distribute.DistributedDataset)):
            # A trace would call a Python iterator once, and keep its batch for ever.
            raise ConfigError(
                f"The data are a {type(dataset).__name__}, not a tf.data.Dataset.",
                "Use tf.data.Dataset, e.g. `from_tensor_slices` or `from_generator`.",
            )
    return tf.nest.map_structure(iter, data)


def counter() -> tf.Variable:
    """Returns an int64 variable of the host, which counts in every context alike."""
    with tf.device("CPU"):
        return tf.Variable(
            0,
            dtype=tf.int64,
            trainable=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )


def _graph() -> tf.Graph:
    return tf.compat.v1.get_default_graph()


def _spec(iterator: Any) -> Any:
    return getattr(iterator, "element_spec", type(iterator))
