"""Recomputation that knows about bound parameters."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

# MirroredStrategy traces each replica on its own thread, so bindings are per thread.
_thread = threading.local()


@contextlib.contextmanager
def within(weights: Any, scope: Any, slices: Sequence[Any]) -> Iterator[None]:
    """Marks a binding as in force on this thread, so that `remat` can repeat it."""
    former = getattr(_thread, "bindings", ())
    _thread.bindings = (*former, (weights, scope, slices))
    try:
        yield
    finally:
        _thread.bindings = former


def remat(function: Callable) -> Callable:
    """Returns `function` with its activations recomputed in the backward pass.

    `keras.remat` would lose the gradient of bound parameters; here they are inputs of
    the recomputation. Random seeds are read again, so masks repeat, and state that the
    function writes is kept from the forward pass alone.

    Args:
      function: a function of tensors that returns tensors, or a Keras layer; a layer
        comes back wrapped as a layer, fit for functional models. Tensors reach it as
        arguments: one it closes over would have no gradient. Outside of `bound` it is
        called as it is.

    Raises:
      ConfigError: if the function calls `add_loss`, whose value would have no gradient.

    Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost,
      https://arxiv.org/abs/1604.06174
    """
    if isinstance(function, keras.layers.Layer):
        return Remat(function)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        bindings = getattr(_thread, "bindings", ())
        if not bindings:
            return function(*args, **kwargs)
        before = [_written(weights, scope) for weights, scope, _ in bindings]

        nest = (args, kwargs, [list(own) for _, _, own in bindings])
        flat = tf.nest.flatten(nest)
        # Not variables: a table that is read row by row stays what it is.
        places = [n for n, x in enumerate(flat)
                  if tf.is_tensor(x) and not isinstance(x, tf.Variable)]
        after: list[list] = []

        # One trace serves both passes: in the backward pass Keras would no longer know
        # whether it is training.
        @tf.function
        def rebound(*inputs: tf.Tensor) -> Any:
            given = list(flat)
            for place, value in zip(places, inputs):
                given[place] = value
            own_args, own_kwargs, own_slices = tf.nest.pack_sequence_as(nest, given)
            with contextlib.ExitStack() as stack:
                scopes = [
                    stack.enter_context(weights.rebound(own, state))
                    for (weights, _, _), own, state in zip(bindings, own_slices, before)
                ]
                outputs = function(*own_args, **own_kwargs)
            after[:] = [_written(w, s) for (w, _, _), s in zip(bindings, scopes)]
            return outputs, [[value for _, value in state] for state in after]

        states: list[list[tf.Tensor]] = []

        @tf.custom_gradient
        def forward(*inputs: tf.Tensor) -> Any:
            outputs, states[:] = rebound(*inputs)

            def backward(*upstream: tf.Tensor) -> list[tf.Tensor]:
                # Recomputing must wait for the gradient, also under XLA, which sees
                # no control dependencies: so make it an operand.
                first = tf.reshape(upstream[0], [-1])[:1]
                wait = tf.reduce_sum(
                    tf.where(tf.math.is_nan(first), first, tf.zeros_like(first))
                )
                with tf.GradientTape() as tape:
                    again = [x + tf.cast(wait, x.dtype) for x in inputs]
                    tape.watch(again)
                    outputs, _ = rebound(*again)
                return tape.gradient(
                    outputs, again, tf.nest.pack_sequence_as(outputs, upstream),
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )

            return outputs, backward

        outputs = forward(*[flat[place] for place in places])
        for (_, scope, _), state, values in zip(bindings, after, states):
            for (variable, _), value in zip(state, values):
                scope.add_update((variable, value))
        return outputs

    return recomputed


def _written(weights: Any, scope: Any) -> list[tuple[keras.Variable, tf.Tensor]]:
    """Returns the state that has a value of its own in `scope`."""
    variables = [entry.keras_variable for entry in weights.state]
    pairs = [(variable, scope.get_current_value(variable)) for variable in variables]
    return [pair for pair in pairs if pair[1] is not None]


@keras.saving.register_keras_serializable(package="mpl")
class Remat(keras.layers.Wrapper):
    """A layer whose activations are recomputed in the backward pass."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Calls the wrapped layer under `remat`."""
        known = inspect.signature(self.layer.call).parameters
        kwargs = {"training": training} if "training" in known else {}
        return remat(self.layer.__call__)(inputs, **kwargs)
