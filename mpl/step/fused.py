"""Update rules that TensorFlow has as one operation, where that is faster."""

from collections.abc import Callable

import keras
import tensorflow as tf

# On a CPU the operation wakes other threads; below this their wake-up costs more.
_MIN_ELEMENTS = 2**15


def pays(variable: tf.Variable) -> bool:
    """Returns whether one operation is faster than the rule's own, for a variable."""
    small = variable.shape.num_elements() < _MIN_ELEMENTS
    return "GPU" in variable.device or not small


def rule(inner: keras.optimizers.Optimizer) -> Callable | None:
    """Returns `update(variable, gradient, rate, slots)` of an optimizer, or None.

    It does to a variable what `inner.update_step` does, in the same bits. Values that
    all variables share are computed here, once a step.
    """
    if type(inner) in (keras.optimizers.Adam, keras.optimizers.AdamW):
        return None if inner.amsgrad else _adam(inner)
    return _sgd(inner) if type(inner) is keras.optimizers.SGD else None


def _adam(inner: keras.optimizers.Adam) -> Callable:
    step = inner.iterations + 1

    def update(variable, gradient, rate, slots):
        def constant(value):
            return tf.cast(value, variable.dtype)

        exponent = constant(step)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=slots["momentum"].handle,
            v=slots["velocity"].handle, grad=gradient, lr=rate,
            beta1=constant(inner.beta_1), beta2=constant(inner.beta_2),
            epsilon=constant(inner.epsilon),
            beta1_power=tf.pow(constant(inner.beta_1), exponent),
            beta2_power=tf.pow(constant(inner.beta_2), exponent),
        )

    return update


def _sgd(inner: keras.optimizers.SGD) -> Callable:
    def update(variable, gradient, rate, slots):
        if inner.momentum:
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=variable.handle, accum=slots["momentum"].handle, lr=rate,
                grad=gradient, momentum=tf.cast(inner.momentum, variable.dtype),
                use_nesterov=inner.nesterov,
            )
        else:
            tf.raw_ops.ResourceApplyGradientDescent(
                var=variable.handle, alpha=rate, delta=gradient)

    return update
