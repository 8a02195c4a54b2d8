"""The inner evaluation loop: many batches for one call from the host."""

import abc
import dataclasses
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.loop.inner_loop import InnerLoop


@dataclasses.dataclass(frozen=True)
class EvaluatorOptions:
    """How an evaluation runs; its results do not depend on it.

    Attributes:
        use_tf_function: Trace the step; False runs all eagerly, for debugging.
        use_tf_while_loop: Run all traced steps as one `tf.while`, unless `eval_reduce`
            is overridden, which Python calls.
        recreate_iterator_for_each_eval: Begin each evaluation at the first batch; False
            goes on where the last one stopped, and begins anew once the data ended.
    """

    use_tf_function: bool = True
    use_tf_while_loop: bool = True
    recreate_iterator_for_each_eval: bool = True


class Evaluator(tf.Module, metaclass=abc.ABCMeta):
    """Runs evaluation steps; subclasses define the step (as in Orbit).

        evaluate(num_steps):
            state = eval_begin()
            repeat num_steps times:
                state = eval_reduce(state, eval_step(iterator))
            return eval_end(state)                 # eval_end() if the state is None

    Where `eval_reduce` is not overridden, metrics live in variables and the loop is one
    `tf.while`; else it is a Python loop, and `eval_reduce` may do anything.

    Args:
        eval_dataset: A tf.data.Dataset, a distributed one, or a nest of them; None
            where `make_eval_dataset` is overridden.
        options: How the loop runs.
        name: Of the module.

    Attributes:
        loop: The `InnerLoop` that runs the steps.
    """

    def __init__(
        self, eval_dataset: Any = None, options: EvaluatorOptions | None = None,
        *, name: str | None = None,
    ):
        super().__init__(name=name)
        options = options or EvaluatorOptions()
        self._begins_anew = options.recreate_iterator_for_each_eval
        reduces = type(self).eval_reduce is not Evaluator.eval_reduce
        reduce = self.eval_reduce if reduces else None
        self.loop = InnerLoop(self.eval_step, options, eval_dataset, reduce=reduce)

    @abc.abstractmethod
    def eval_step(self, iterator: Any) -> Any:
        """Evaluates one step; cross-replica context, in a tf.function unless eager.

        Args:
            iterator: Gives a batch for each `next(iterator)`; a nest for a nest of
                data.

        Returns:
            What `eval_reduce` takes.
        """

    def eval_begin(self) -> Any:
        """Is called first, to reset metrics; may return a first state."""

    def eval_reduce(self, state: Any = None, step_outputs: Any = None) -> Any:
        """Returns the state after a step, given that before it and its outputs."""
        return state

    def eval_end(self, *args: Any) -> dict[str, Any] | None:
        """Returns the results, given the last state if that is not None."""

    def make_eval_dataset(self) -> Any:
        """Returns the data of an evaluation."""
        return self.loop.dataset

    def evaluate(self, num_steps: tf.Tensor | int = -1) -> dict[str, Any] | None:
        """Evaluates `num_steps` steps; -1: all of the data. None if it was halted.

        Raises:
            EndOfDataError: There was not one batch.
        """
        loop, loop.state = self.loop, self.eval_begin()
        if self._begins_anew or loop.data_ended:
            loop.iterators = None
        loop.run(num_steps, self.make_eval_dataset)
        if loop.data_ended and num_steps >= 0:
            logging.warning("The data gave %d of %d steps.", self.steps_done, num_steps)
        if loop.halt.numpy():
            return None
        return self.eval_end() if loop.state is None else self.eval_end(loop.state)

    @property
    def steps_done(self) -> int:
        """How many steps the last `evaluate` made."""
        return int(self.loop.done.numpy())

    @property
    def eval_dataset(self) -> Any:
        """The data; new ones begin at their first batch."""
        return self.loop.dataset

    @eval_dataset.setter
    def eval_dataset(self, eval_dataset: Any) -> None:
        self.loop.dataset, self.loop.iterators = eval_dataset, None
