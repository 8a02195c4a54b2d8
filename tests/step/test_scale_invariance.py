"""A loss scale that is a power of two changes no bit of the training."""

import keras
import numpy as np
import pytest

from mpl.precision import loss_scale as loss_scale_lib
import small_models as models

pytestmark = pytest.mark.slow  # whole trainings, many of them

OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01, beta_2=0.99),  # 0.999: 1 in bfloat16
}


def _trained(strategy, policy, loss_scale, name="momentum", steps=4, **kwargs):
    """Returns all that a few steps leave: masters, slots, averages, statistics."""
    step = models.Step(strategy, policy, loss_scale=loss_scale, clip_norm=0.5,
                       ema_decay=0.9, inner=OPTIMIZERS[name], **kwargs)
    losses = [step(models.image_batch(seed=seed)) for seed in range(steps)]
    assert int(step.optimizer.applied_steps) == steps
    assert step.traces == 1
    return losses, step.everything(), step


def _assert_same_bits(one, other):
    assert one[0] == other[0]
    for left, right in zip(one[1], other[1], strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
def test_static_scales(strategy_of, policy, name):
    expected = _trained(strategy_of(0), policy, 1.0, name)
    assert max(np.abs(value).max() for value in expected[1]) > 0
    for scale in (2.0**-10, 2.0**15, 2.0**24):
        _assert_same_bits(_trained(strategy_of(0), policy, scale, name), expected)


def test_replicas_and_micro_batches(strategy_of):
    settings = {"policy": "mixed_bfloat16", "accumulate": 2}
    _assert_same_bits(
        _trained(strategy_of(2), loss_scale=2.0**15, **settings),
        _trained(strategy_of(2), loss_scale=1.0, **settings))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_scale_that_grows(strategy_of, policy):
    """Also shows that a changing scale never retraces."""
    growing = loss_scale_lib.DynamicLossScale(initial=4.0, period=1)
    grown = _trained(strategy_of(0), policy, growing)
    assert float(growing.value) == 4.0 * 2**4
    _assert_same_bits(grown, _trained(strategy_of(0), policy, 1.0))


def _dense_model():
    layers = keras.layers
    return keras.Sequential([
        keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(8),
        layers.Dense(models.CLASSES, dtype="float32")])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float16_where_nothing_is_subnormal(strategy_of, name):
    """Scales of 2**10 and more keep every gradient of this model a normal number."""
    settings = {"policy": "mixed_float16", "make_model": _dense_model, "name": name}
    expected = _trained(strategy_of(0), loss_scale=2.0**10, **settings)
    for scale in (2.0**11, 2.0**13):
        _assert_same_bits(
            _trained(strategy_of(0), loss_scale=scale, **settings), expected)


def test_float16_loses_small_gradients_without_a_scale(strategy_of):
    """What the scale is for: gradients below 2**-24 vanish, scaled ones do not."""
    def error(policy, scale):
        # The sum of weights is 1, so this nominal weight makes a loss of 2**-22.
        step = models.Step(strategy_of(0), policy, loss_scale=scale,
                           nominal_weight=2.0**22, make_model=_dense_model)
        batch = models.image_batch()
        batch["weight"][:] = 1 / 8
        start = step.masters()
        step(batch)
        return {key: value - start[key] for key, value in step.masters().items()}

    exact = error("float32", 1.0)
    kernel = max(exact, key=lambda key: exact[key].size)
    lost, kept = error("mixed_float16", 1.0), error("mixed_float16", 2.0**22)
    size = np.linalg.norm(exact[kernel])
    assert np.linalg.norm(kept[kernel] - exact[kernel]) < 0.01 * size
    assert np.linalg.norm(lost[kernel] - exact[kernel]) > 0.5 * size
