"""Keras metrics and the mean loss, kept on the device between reports."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpl import errors
from mpl.step import state as state_lib


_RESERVED = frozenset(
    "loss step epoch split steps_per_sec examples_per_sec loss_scale applied_steps "
    "skipped_steps grad_norm learning_rate goodput lost_steps restarts time note"
    .split())


class Metrics(tf.Module):
    """Named Keras metrics beside the weighted mean loss.

    Build it under the scope of the strategy; update it in replica context.

    Args:
      metrics: from name to an unused `keras.metrics.Metric`.
    """

    def __init__(self, metrics: Mapping[str, keras.metrics.Metric] | None = None):
        super().__init__(name="metrics")
        self.metrics = dict(metrics or {})
        for name in _RESERVED.intersection(self.metrics):
            raise errors.ConfigError(
                f"`metrics()` names a metric {name!r}, which mpl reports itself.",
                "Give the metric another name.",
            )
        # Σ loss × weight and Σ weight; on each replica its own.
        self._sums = tf.Variable(
            [0.0, 0.0], trainable=False, name="loss_sums",
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM)

    @tf.autograph.experimental.do_not_convert
    def update(
        self, output: state_lib.LossOutput, forward: state_lib.Forward | None = None
    ) -> None:
        """Adds a batch; a skipped step and examples of weight 0 count nothing.

        Args:
          output: what the loss returned.
          forward: the training step's, after `apply`; None in evaluation.
        """
        # In a training step these sums stand in the graph already.
        sums = tf.cast(tf.stack(state_lib.weighted_sums(output)), tf.float32)
        weights = output.weights
        if forward is not None:
            sums = _if_finite(forward.finite, sums)
            weights = _if_finite(forward.finite, weights)
        self._sums.assign_add(sums)
        for name, metric in self.metrics.items():
            values = output.outputs
            if isinstance(values, Mapping):
                if name not in values:
                    raise errors.ConfigError(
                        f"`outputs` of the loss has no entry for the metric {name!r}.",
                        f"Add one; it has {sorted(values)}.",
                    )
                values = values[name]
            if values is None:
                raise errors.ConfigError(
                    f"the metric {name!r} has nothing to read.",
                    "Return `LossOutput(..., outputs=(labels, predictions))`.",
                )
            values = values if isinstance(values, (tuple, list)) else (values,)
            if forward is not None:
                values = [_if_finite(forward.finite, value) for value in values]
            with _added(metric):
                metric.update_state(*values, sample_weight=weights)

    def result(self) -> dict[str, tf.Tensor]:
        """Returns the values since the last reset, "loss" first; NaN of no example."""
        total, count = tf.unstack(tf.convert_to_tensor(self._sums))
        results = {"loss": total / count}
        results |= {name: metric.result() for name, metric in self.metrics.items()}
        seen = count > 0  # Keras says 0.0 of nothing

        def or_nan(value: Any) -> tf.Tensor:
            value = tf.convert_to_tensor(value)
            return tf.where(seen, value, np.nan) if value.dtype.is_floating else value

        return tf.nest.map_structure(or_nan, results)

    def reset(self) -> None:
        """Begins anew."""
        self._sums.assign(tf.zeros([2]))
        for metric in self.metrics.values():
            metric.reset_state()


@contextlib.contextmanager
def _added(metric: keras.metrics.Metric) -> Iterator[None]:
    """What is written to the metric meanwhile is added to it, on parameter servers.

    There several workers write at a time, and Keras reads, adds and writes. A metric's
    variables are sums over replicas, here over batches.
    """
    strategy = tf.distribute.get_strategy()
    if not isinstance(strategy, tf.distribute.ParameterServerStrategy):
        yield
        return
    zeros = [(v, tf.zeros(v.shape, v.dtype)) for v in metric.variables]
    with keras.StatelessScope(zeros) as scope:
        yield
    for variable, _ in zeros:
        variable.value.assign_add(scope.get_current_value(variable))


def _if_finite(finite: tf.Tensor, value: Any) -> tf.Tensor:
    """Returns `value`, or zeros where the step was skipped (0 × NaN is NaN)."""
    value = tf.convert_to_tensor(value)
    return tf.where(finite, value, tf.zeros_like(value))
