"""Runs a step many times: what trainers and evaluators have in common."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError

_graph = tf.compat.v1.get_default_graph
# Of code that nothing has converted yet.
_AUTOGRAPH = tf.__internal__.autograph.control_status_ctx()
_never = tf.autograph.experimental.do_not_convert(lambda: False)


def converted(function: Callable) -> Callable:
    """Lets AutoGraph rewrite a user's function where mpl's own code calls it.

    mpl's code is traced as it stands: rewriting it took most of the time before the
    first step. In eager mode the function stays what it is.
    """
    if not tf.inside_function():
        return function
    return tf.__internal__.autograph.tf_convert(function, _AUTOGRAPH)


class EndOfDataError(ConfigError):
    """A loop was asked for steps and the data had not one batch left."""


class StepIterator:
    """The iterator a step sees: `next` gives it a batch and advances the position.

    Args:
        take: Gives the next batch of an iterator.
        position: int64 variable that counts the batches, or None.
        around: The graph around that of a traced step, where its batches are taken;
            None: they are taken where `next` stands.
        taken: Those taken there so far, in order; a step that makes variables is
            traced twice, with the same batches.
    """

    def __init__(self, take: Callable, position: Any, around: Any, taken: list):
        self._take, self._position = take, position
        self._around, self._taken = around, taken
        self._graph, self._count = _graph(), 0

    def __iter__(self) -> "StepIterator":
        return self

    def __next__(self) -> Any:
        if self._graph is not _graph():  # in a tf.while or tf.cond of the step
            self._around = None  # for good, or batches would change places
        if self._around is None:
            batch = self._take()
        else:
            if self._count == len(self._taken):
                with self._around.as_default():
                    self._taken.append(self._take())
            batch = self._taken[self._count]
            self._count += 1
        if self._position is not None:
            tensors = tf.nest.flatten(batch, expand_composites=True)
            with tf.control_dependencies(tensors):  # the end of the data counts not
                self._position.assign_add(1)
        return batch

    get_next = __next__


class InnerLoop:
    """Calls a step many times: in a `tf.while`, from Python, or eagerly.

        done = 0
        while (num_steps < 0 or done < num_steps) and not (halt or should_stop()):
            step(iterators)          # the end of the data ends the loop
            done += 1

    Where the data may end, a traced step is a function of its own, and its batches are
    taken before it starts: nothing of a step runs for which there is no batch. (In one
    graph, whatever does not depend on the batch would: `global_step.assign_add(1)` for
    one.) With `one_graph` there is one, from which TensorFlow takes what is constant:
    for data that never end, and steps that count only after their batch came.

    Args:
        step: Called with a `StepIterator` for each dataset, nested as they are.
        options: `TrainerOptions`, or others with the same attributes.
        dataset: Kept for the owner, as `iterators` are: in this plain object, since
            tf.train.Checkpoint would save those of a tf.Module.
        should_stop: Returns a boolean tensor before each step.
        reduce: Called with `state` and what each step returns, gives the next state;
            the loop is then Python's.

    Attributes:
        iterators: Where the next `run` goes on; None: it makes new ones.
        waits: Whether the loop may wait for a batch where it stands, see `_taker`.
        one_graph: Whether a traced step is part of the loop's own graph, see above.
        done: int64 variable, how many steps the last `run` finished.
        halt: boolean variable; true, set by any thread, ends `run` before a step.
        graph: Of the step as it was traced last; None: it was not.
        data_ended: Whether the last `run` ended because the data did.
        state: Of `reduce`.
    """

    def __init__(
        self, step: Callable[[Any], Any], options: Any, dataset: Any,
        should_stop: Callable[[], Any] = _never,
        reduce: Callable[[Any, Any], Any] | None = None,
    ):
        self._step, self._should_stop, self._reduce = step, should_stop, reduce
        self._block: Any = self._run
        self._one_step: Any = self._run_step
        self._traced = tf.function(self._run_step, autograph=False)
        if options.use_tf_function and options.use_tf_while_loop and not reduce:
            self._block = self._traced = tf.function(self._run, autograph=False)
        elif options.use_tf_function:
            self._one_step = self._traced
        self._traces, self._data, self._variant = 0, "", ""  # of the last run
        self._positions: Any = ()
        self._variants = set[str]()  # that have run
        self.dataset, self.done, self.data_ended = dataset, counter(), False
        with tf.device("CPU"):
            self.halt = tf.Variable(False, trainable=False)
        self.iterators: Any = None
        self.state: Any = None
        self.graph: Any = None
        self.one_graph = False
        self.waits = False

    def run(
        self, num_steps: Any, make_dataset: Callable[[], Any], positions: Any = None,
        variant: str = "",
    ) -> None:
        """Runs `num_steps` steps; -1: all that the data give.

        Args:
            num_steps: int32 or int64 scalar.
            make_dataset: Returns a dataset or a nest of them, where there is no
                iterator to go on with.
            positions: A like nest of int64 variables that count batches, or None.
            variant: Name of a kind of step; each is traced once.

        Raises:
            EndOfDataError: There was not one batch.
        """
        if self.iterators is None:
            self.iterators = tf.nest.map_structure(_iterator, make_dataset())
        if positions is None:
            positions = tf.nest.map_structure(lambda _: None, self.iterators)
        tf.nest.assert_same_structure(self.iterators, positions, check_types=False)
        self._positions, self.data_ended = positions, False
        self._variant = variant
        self.done.assign(0)
        before = self._counted()
        try:
            limit = tf.int64.max if num_steps < 0 else num_steps
            self._block(self.iterators, tf.cast(limit, tf.int64), variant)
        except (StopIteration, tf.errors.OutOfRangeError):
            if self.one_graph and self._counted() != before:
                raise  # nobody knows how far it got: it was to go on for ever
            self.data_ended = True
        self._warn_of_retrace(variant)
        if self.data_ended and self.done.numpy() == 0:
            cause = f"{int(num_steps)} steps were asked for and the data gave no batch."
            raise EndOfDataError(cause, "Give data; repeat them to train for longer.")

    def progress(self) -> tuple[str, int]:
        """Returns the variant that runs, and what each step changes; in any thread."""
        return self._variant, sum(self._counted(), int(self.done.numpy()))

    def _counted(self) -> list[int]:
        positions = tf.nest.flatten(self._positions) if self.one_graph else []
        return [int(position.numpy()) for position in positions]

    def _run(self, iterators: Any, limit: tf.Tensor, variant: str) -> None:
        def more(done: tf.Tensor) -> tf.Tensor:
            stop = tf.logical_or(self.halt, converted(self._should_stop)())
            return (done < limit) & tf.logical_not(stop)

        def run_one(done: tf.Tensor) -> tuple[tf.Tensor]:
            # Assigned before the step, to be right when the data end in it.
            before = [] if self.one_graph else [self.done.assign(done)]
            with tf.control_dependencies(before):
                self._keep(self._one_step(iterators, variant))
            return (done + 1,)

        # Traced, this is a tf.while.
        done, = tf.while_loop(more, run_one, (tf.constant(0, tf.int64),))
        self.done.assign(done)

    def _keep(self, output: Any) -> None:
        if self._reduce:
            self.state = self._reduce(self.state, output)

    def _run_step(self, iterators: Any, variant: str) -> Any:
        self.graph = _graph() if tf.inside_function() else None
        apart = tf.inside_function() and not self.one_graph
        around = _graph() if apart else None
        takes = [_taker(each, self.waits) for each in tf.nest.flatten(iterators)]
        each = zip(takes, tf.nest.flatten(self._positions))
        parts: list = [(take, position, around, []) for take, position in each]

        def step(iterators_taken_from: Any) -> Any:
            views = [StepIterator(*part) for part in parts]
            return converted(self._step)(tf.nest.pack_sequence_as(iterators, views))

        # With the iterators as arguments, the call waits for what is taken from them.
        return (tf.function(step, autograph=False) if apart else step)(iterators)

    def _warn_of_retrace(self, variant: str) -> None:
        count = self._traced.experimental_get_tracing_count()
        data = str(tf.nest.map_structure(tf.type_spec_from_value, self.iterators))
        if self._traces < count and variant in self._variants:
            logging.warning("The step is traced again: %s became %s.", self._data, data)
        self._traces, self._data = count, data
        self._variants.add(variant)


def counter() -> tf.Variable:
    """Returns an int64 variable of the host, at 0."""
    with tf.device("CPU"):
        return tf.Variable(0, dtype=tf.int64, trainable=False)


def _iterator(dataset: Any) -> Any:
    if not isinstance(dataset, (tf.data.Dataset, tf.distribute.DistributedDataset)):
        # A trace would call a Python iterator once, and keep its batch for ever.
        cause = f"The data are a {type(dataset).__name__}, not a tf.data.Dataset."
        remedy = "Use tf.data.Dataset, e.g. `from_tensor_slices` or `from_generator`."
        raise ConfigError(cause, remedy)
    return iter(dataset)


def _taker(iterator: Any, waits: bool) -> Callable[[], Any]:
    """Returns a function that takes a batch from an iterator.

    In a graph TensorFlow waits for a batch on a thread of its own, lest the data need
    the one that waits: two changes of thread a step. With `waits`, the data have
    threads of their own, and dense tensors.
    """
    here = isinstance(iterator, tf.data.Iterator) and tf.inside_function()
    if not (waits and here):
        return lambda: next(iterator)
    resource, = tf.nest.flatten(iterator, expand_composites=True)
    specs = tf.nest.flatten(iterator.element_spec)

    def take() -> Any:
        tensors = tf.raw_ops.IteratorGetNextSync(
            iterator=resource, output_types=[spec.dtype for spec in specs],
            output_shapes=[spec.shape for spec in specs])
        return tf.nest.pack_sequence_as(iterator.element_spec, tensors)

    return take
