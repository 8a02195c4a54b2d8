"""One operation for an update does what Keras's own rule does."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.precision.policy import get_policy
from mpl.step import fused
from mpl.step.loss_scale_optimizer import LossScaleOptimizer
from mpl.step.master_weights import MasterWeights
from mpl.step.state import LossOutput

START = np.linspace(-1, 1, 40_000, dtype="float32")
GRADIENTS = np.random.default_rng(0).standard_normal((20, 40_000)).astype("float32")


def _trained(inner, fuses):
    """Returns the weights after 20 updates."""
    variable = keras.Variable(START)
    inner.build([variable])
    names = ("momentum", "velocity")
    slots = {name: v.value for v in inner.variables for name in names if name in v.path}

    @tf.function
    def step(gradient):
        rate = tf.cast(inner.learning_rate, tf.float32)
        if fuses:
            fused.rule(inner)(variable.value, gradient, rate, slots)
        else:
            inner.update_step(gradient, variable.value, rate)
        inner.iterations.assign_add(1)

    for gradient in GRADIENTS:
        step(tf.constant(gradient))
    return variable.numpy()


@pytest.mark.parametrize("settings", [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_sgd_has_the_bits_of_keras(settings):
    plain, fast = (_trained(keras.optimizers.SGD(0.1, **settings), fuses)
                   for fuses in (False, True))
    np.testing.assert_array_equal(plain, fast)


@pytest.mark.parametrize("kind", [keras.optimizers.Adam, keras.optimizers.AdamW])
@pytest.mark.parametrize("beta_1, beta_2", [(0.9, 0.999), (0.8, 0.95)])
def test_adam_is_as_exact_as_keras(kind, beta_1, beta_2):
    # The operation forms 1 - beta in float32, Keras in float64, so that the two follow
    # slightly different betas: each is compared with float64 at its own.
    errors = []
    for fuses in (False, True):
        betas = beta_1, beta_2
        if fuses:
            betas = tuple(float(np.float32(beta)) for beta in betas)
        inner = kind(1e-2, beta_1=beta_1, beta_2=beta_2)
        exact = _adam_in_float64(1e-2, *betas, inner.epsilon)
        errors.append(np.abs(_trained(inner, fuses) - exact).max())
    assert 0 < errors[1] <= 2 * errors[0] < 1e-5


def _adam_in_float64(rate, beta_1, beta_2, epsilon):
    weights, first, second = START.astype("float64"), 0.0, 0.0
    for step, gradient in enumerate(GRADIENTS.astype("float64"), start=1):
        first = beta_1 * first + (1 - beta_1) * gradient
        second = beta_2 * second + (1 - beta_2) * gradient**2
        alpha = rate * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
        weights = weights - alpha * first / (np.sqrt(second) + epsilon)
    return weights


@pytest.mark.parametrize("inner", [
    keras.optimizers.Adam(amsgrad=True), keras.optimizers.RMSprop(),
    keras.optimizers.Nadam(), keras.optimizers.Lion(),
], ids=lambda inner: inner.name)
def test_other_rules_stay_keras_s_own(inner):
    assert fused.rule(inner) is None


def test_small_variables_keep_the_rule_s_own_operations():
    assert not fused.pays(tf.Variable(tf.zeros([1000])))
    assert fused.pays(tf.Variable(tf.zeros([300, 200])))


@pytest.mark.parametrize("policy", ["bfloat16", "params=float16,compute=float16"])
@pytest.mark.parametrize("inner", [
    # Keras's 0.999 is refused: it is 1 in bfloat16.
    lambda: keras.optimizers.Adam(0.1, beta_2=0.9), lambda: keras.optimizers.SGD(0.1),
], ids=["adam", "sgd"])
def test_masters_of_16_bits_are_updated_too(policy, inner):
    with get_policy(policy).scope():
        model = keras.Sequential(
            [keras.Input((200,)), keras.layers.Dense(200, use_bias=False)])
    weights = MasterWeights(model, policy)
    optimizer = LossScaleOptimizer(inner(), "none", weights)
    before = np.array(model.layers[0].kernel, "float32")
    assert not fused.pays(weights.buckets[0].variable)

    @tf.function
    def step():
        params = weights.cast()
        with tf.GradientTape() as tape:
            tape.watch(params)
            with weights.bound(params) as forward:
                outputs = tf.cast(model(tf.ones((1, 200))), tf.float32)
                output = LossOutput(tf.reduce_sum(outputs, -1), tf.ones([1]))
                scaled = optimizer.scale_loss(output, forward)
        optimizer.apply(weights.gradients(tape, scaled, forward), forward)

    step()
    weights.publish()
    moved = before - np.array(model.layers[0].kernel, "float32")
    np.testing.assert_allclose(moved, 0.1, atol=4e-3)  # the gradient is 1 everywhere
