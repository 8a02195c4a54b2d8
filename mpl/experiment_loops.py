"""The loops that run an experiment's steps."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from mpl import distribute, errors
from mpl.loop import coordinated as coordinated_lib
from mpl.loop import evaluator as evaluator_lib
from mpl.loop import trainer as trainer_lib
from mpl.loop.inner_loop import converted

_SHOWN = 16  # images, at most


class ExperimentTrainer(trainer_lib.Trainer):
    """Runs an experiment's `train_step`.

    Attributes:
      jit_trial: decides which steps are compiled; None: the settings do.
      watches: each cuts blocks where `ahead(step)` steps end, and is a context around
        the steps up to `end`, `around(end)`.
    """

    jit_trial: Any = None
    watches: Sequence[Any] = ()

    def __init__(self, experiment: Any):
        eager = experiment.config.debug_eager
        super().__init__(options=trainer_lib.TrainerOptions(use_tf_function=not eager))
        self._experiment, self.loop.one_graph = experiment, True
        self.loop.waits = experiment.pipelines["train"].has_own_threads
        if isinstance(experiment.strategy, tf.distribute.ParameterServerStrategy):
            self.loop: Any = coordinated_lib.CoordinatedLoop(
                experiment.train_step, experiment.strategy, experiment.global_step)

    def make_train_dataset(self) -> Any:
        """Returns the training data from the position on."""
        pipeline = self._experiment.pipelines["train"]
        dataset = pipeline.dataset(int(self.position), **self._experiment.shard)
        return distribute.distribute_dataset(dataset, self._experiment.strategy)

    def train_loop_begin(self) -> None:
        for weights in tf.nest.flatten(self._experiment.weights):
            weights.adopt()

    @tf.autograph.experimental.do_not_convert
    def train_step(self, iterator: Any) -> None:
        converted(self._experiment.train_step)(iterator)
        # A step whose batch could not be read counts not.
        with tf.control_dependencies([self.position.read_value()]):
            self._experiment.global_step.assign_add(1)

    def train(self, num_steps: Any = -1) -> Any:
        if not self.watches or num_steps < 0:
            return self._train_block(num_steps)
        step = first = int(self._experiment.global_step)
        while left := first + int(num_steps) - step:
            length = min([left, *(watch.ahead(step) for watch in self.watches)])
            with contextlib.ExitStack() as stack:
                for watch in self.watches:
                    stack.enter_context(watch.around(step + length))
                self._train_block(length)
            step += self.steps_done
            if self.steps_done < length:
                break
        self.loop.done.assign(step - first)

    def _train_block(self, num_steps: Any) -> Any:
        if self.jit_trial is None or num_steps < 0:
            return self._train_part(num_steps)
        done = self.jit_trial.train(self._train_part, int(num_steps))
        self.loop.done.assign(done)

    def _train_part(self, num_steps: Any) -> Any:
        before, optimizers = self.variant, tf.nest.flatten(self._experiment.optimizer)
        self.variant += "+gradients" * any(each.kept for each in optimizers)
        try:
            return super().train(num_steps)
        finally:  # whatever ended the block, the model shows what was trained
            self.variant = before
            for weights in tf.nest.flatten(self._experiment.weights):
                weights.publish()

    @tf.autograph.experimental.do_not_convert
    def should_stop(self) -> tf.Tensor:
        config = self._experiment.config
        limit = 1 if config.on_nonfinite == "stop" else config.max_consecutive_skips
        optimizers = tf.nest.flatten(self._experiment.optimizer)
        flags = [each.consecutive_skips >= limit for each in optimizers]
        return functools.reduce(tf.logical_or, flags)

    def nonfinite_error(self) -> errors.NonFiniteError:
        optimizers = tf.nest.flatten(self._experiment.optimizer)
        reports = [optimizer.nonfinite_report() for optimizer in optimizers]
        return errors.NonFiniteError(
            f"At step {int(self._experiment.global_step)}: "
            f"{next(filter(None, reports), 'too many steps were skipped')}.",
            "Lower the learning rate, clip the gradient (--clip_norm=1), or train in "
            "--policy=mixed_bfloat16 or float32.",
        )

    @property
    def graph(self) -> Any:
        """The graph of the step as it was traced last; None: it was not."""
        return getattr(self.loop, "graph", None)

    def report(self) -> dict[str, Any]:
        return self._experiment.train_report()

    def reset_metrics(self) -> None:
        self._experiment.train_metrics.reset()


class ExperimentEvaluator(evaluator_lib.Evaluator):
    """Runs an experiment's `eval_step` over one split.

    Where its length is known, the data repeat and the iterator is kept for the next
    evaluation: to end one may take seconds, for TensorFlow waits for its autotuner.
    """

    def __init__(self, experiment: Any, split: str):
        pipeline, eager = experiment.pipelines[split], experiment.config.debug_eager
        self._length = pipeline.batches_per_epoch
        dataset = pipeline.dataset(**experiment.shard)
        super().__init__(
            distribute.distribute_dataset(
                dataset.repeat() if self._length else dataset, experiment.strategy),
            evaluator_lib.EvaluatorOptions(use_tf_function=not eager,
                                           recreate_iterator_for_each_eval=False))
        self._experiment, self._split, self._drawn = experiment, split, False
        self._sample: dict[str, tf.Tensor] = {}

    def evaluate(self, num_steps: Any = -1) -> dict[str, Any] | None:
        length, is_whole = self._length, False
        if length is not None:
            num_steps = length if num_steps < 0 else min(int(num_steps), length)
        try:
            output = super().evaluate(num_steps)
            is_whole = self.steps_done == length
            return output
        finally:
            if not is_whole:  # the next one begins at the first batch
                self.loop.iterators = None

    def eval_begin(self) -> None:
        self._experiment.eval_metrics.reset()

    @tf.autograph.experimental.do_not_convert
    def eval_step(self, iterator: Any) -> None:
        converted(self._experiment.eval_step)(iterator)

    def eval_end(self, state: Any = None) -> dict[str, tf.Tensor]:
        if tf.summary.should_record_summaries():
            self._show()
        return self._experiment.eval_metrics.result()

    def _show(self) -> None:
        """Writes the graph of the step, once, and images."""
        experiment, graph = self._experiment, getattr(self.loop, "graph", None)
        if graph is not None and not self._drawn:
            self._drawn = tf.summary.graph(graph)
        if experiment.images is None:
            return
        if not self._sample:
            first = next(iter(experiment.pipelines[self._split].dataset()))
            self._sample = {name: value[:_SHOWN] for name, value in first.items()}
        with experiment.bound_for_inference():
            images = experiment.images(self._sample)
        for name, values in images.items():
            tf.summary.image(name, values, max_outputs=_SHOWN)
