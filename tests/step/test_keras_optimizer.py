"""The inner optimizer by name, and its learning rate step by step."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.errors import ConfigError
from mpl.step.keras_optimizer import WarmupSchedule, make_optimizer

DEFAULTS = dict(
    learning_rate=0.5, lr_schedule="constant", warmup_steps=0, train_steps=100
)
NAMES = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lamb",
    "Lion",
    "Muon",
    "Nadam",
    "RMSprop",
    "SGD",
    "ScheduleFreeAdamW",
]


def make(name="sgd", **changes):
    return make_optimizer(name, **{**DEFAULTS, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_every_keras_optimizer_in_any_case(name):
    for spelling in (name, name.lower(), name.upper()):
        optimizer = make(spelling, weight_decay=0.01)
        assert type(optimizer) is getattr(keras.optimizers, name)
        assert optimizer.weight_decay == 0.01
        assert float(optimizer.learning_rate) == 0.5


def test_names_are_all_that_keras_has():
    with pytest.raises(ConfigError, match=r"`optimizer` \(sdg\)") as error:
        make("sdg")
    assert error.value.remedy == f"Use one of {', '.join(sorted(NAMES))}, in any case."


@pytest.mark.parametrize("name", ["optimizer", "LossScaleOptimizer", "multioptimizer"])
def test_wrappers_are_not_inner_optimizers(name):
    with pytest.raises(ConfigError, match="is not a Keras optimizer"):
        make(name)


def test_registered_optimizers_are_known():
    @keras.saving.register_keras_serializable(package="mpl_tests")
    class Mine(keras.optimizers.SGD):
        pass

    assert type(make("mpl_tests>Mine")) is Mine


def test_arguments_reach_the_optimizer():
    assert make("sgd", momentum=0.9, nesterov=True).momentum == 0.9
    # None leaves the optimizer's own default, 0 turns decay off.
    assert make("adamw").weight_decay == keras.optimizers.AdamW().weight_decay > 0
    assert make("adamw", weight_decay=0.0).weight_decay == 0.0
    with pytest.raises(ConfigError, match="refuses its arguments.*momentun") as error:
        make("sgd", momentun=0.9)
    assert "momentum" in error.value.remedy and "self" not in error.value.remedy


def test_a_constant_rate_can_be_assigned():
    optimizer = make()
    optimizer.learning_rate = 0.25
    assert float(optimizer.learning_rate) == 0.25


def expected_rate(kind, step, warmup):
    """For a peak of 0.5 and 100 steps, by hand."""
    rate = 0.5 * (min(1.0, step / warmup) if warmup else 1.0)
    progress = min(1.0, max(0.0, (step - warmup) / (100 - warmup)))
    if kind == "cosine":
        return rate * (1 + math.cos(math.pi * progress)) / 2
    if kind == "linear":
        return rate * (1 - progress)
    if kind == "step":
        return rate / (100 if step >= 75 else 10 if step >= 50 else 1)
    return rate


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "step"])
@pytest.mark.parametrize("warmup", [0, 20])
def test_schedules(kind, warmup):
    optimizer = make(lr_schedule=kind, warmup_steps=warmup)
    variable = keras.Variable(0.0)
    optimizer.build([variable])

    @tf.function
    def update():
        optimizer.apply([tf.constant(1.0)], [variable])
        return tf.convert_to_tensor(variable)

    rates = np.diff([0.0] + [-float(update()) for _ in range(110)])
    expected = [expected_rate(kind, step, warmup) for step in range(110)]
    np.testing.assert_allclose(rates, expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "step"])
def test_schedule_corners(kind):
    schedule = WarmupSchedule(kind, 0.5, 20, 100)
    assert [float(schedule(s)) for s in (0, 10, 20)] == [0.0, 0.25, 0.5]
    for step in (0, 49, 50, 51, 74, 75, 99, 100, 1000):
        expected = expected_rate(kind, step, 20)
        np.testing.assert_allclose(
            float(schedule(step)), expected, rtol=1e-5, atol=1e-7
        )
    assert schedule(tf.constant(3, tf.int64)).dtype == tf.float32
    # All of the training is warm-up: the peak is where it ends.
    assert float(WarmupSchedule("constant", 0.5, 100, 100)(100)) == 0.5
    schedule = WarmupSchedule(kind, 0.5, 100, 100)
    assert all(math.isfinite(float(schedule(step))) for step in (99, 100, 101))


def test_schedules_are_serialised_with_their_optimizer():
    optimizer = make("adam", lr_schedule="cosine", warmup_steps=20)
    config = keras.optimizers.serialize(optimizer)
    again = keras.optimizers.deserialize(config)
    assert again.get_config() == optimizer.get_config()
    schedule = WarmupSchedule("cosine", 0.5, 20, 100)
    again = keras.optimizers.schedules.deserialize(
        keras.optimizers.schedules.serialize(schedule)
    )
    assert float(again(60)) == float(schedule(60)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr_schedule": "cosin"}, r"`lr_schedule` \(cosin\)"),
        ({"learning_rate": -1.0}, r"`learning_rate` \(-1.0\)"),
        ({"learning_rate": float("nan")}, r"`learning_rate` \(nan\)"),
        ({"warmup_steps": 101}, r"`warmup_steps` \(101\) .* train_steps \(100\)"),
        ({"warmup_steps": -1}, r"`warmup_steps` \(-1\)"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        make(**change)
    assert error.value.remedy
