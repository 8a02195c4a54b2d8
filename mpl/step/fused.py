"""Update rules that TensorFlow has as one operation, where that is faster."""

from collections.abc import Callable

import keras
import tensorflow as tf

# On a CPU the operation wakes other threads; below this their wake-up costs more.
_MIN_ELEMENTS = 2**15


def pays(variable: tf.Variable) -> bool:
    """Returns whether one operation is right and faster than the rule's own."""
    if variable.dtype.size < 4:  # in bfloat16 a beta of 0.999 is 1
        return False
    small = variable.shape.num_elements() < _MIN_ELEMENTS
    return "GPU" in variable.device or not small


def rule(inner: keras.optimizers.Optimizer) -> Callable | None:
    """Returns `update(variable, gradient, rate, slots)` of an optimizer, or None.

    It does to a variable what `inner.update_step` does: SGD in the same bits, Adam as
    exactly.
    """
    if type(inner) in (keras.optimizers.Adam, keras.optimizers.AdamW):
        return None if inner.amsgrad else _adam(inner)
    return _sgd(inner) if type(inner) is keras.optimizers.SGD else None


def _adam(inner: keras.optimizers.Adam) -> Callable:
    step = inner.iterations + 1

    def update(variable, gradient, rate, slots):
        dtype = variable.dtype
        exponent = tf.cast(step, dtype)
        beta_1, beta_2 = (tf.constant(x, dtype) for x in (inner.beta_1, inner.beta_2))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle, m=slots["momentum"].handle,
            v=slots["velocity"].handle, grad=gradient, lr=rate,
            beta1=beta_1, beta2=beta_2, epsilon=tf.constant(inner.epsilon, dtype),
            beta1_power=tf.pow(beta_1, exponent), beta2_power=tf.pow(beta_2, exponent),
        )

    return update


def _sgd(inner: keras.optimizers.SGD) -> Callable:
    def update(variable, gradient, rate, slots):
        if inner.momentum:
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=variable.handle, accum=slots["momentum"].handle, lr=rate,
                grad=gradient, momentum=tf.constant(inner.momentum, variable.dtype),
                use_nesterov=inner.nesterov,
            )
        else:
            tf.raw_ops.ResourceApplyGradientDescent(
                var=variable.handle, alpha=rate, delta=gradient)

    return update
