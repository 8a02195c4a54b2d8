"""A non-finite gradient anywhere is skipped everywhere and changes nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.precision import loss_scale as loss_scale_lib
from mpl.step import loss_scale_optimizer
import small_models as models

INF = np.inf


def _cases():
    for replicas in (1, 2, 3, 4):
        for bad in range(replicas):
            for kind in (INF, -INF, np.nan):
                values = np.zeros(replicas, np.float32)
                values[bad] = kind
                yield replicas, tuple(values)
    yield 2, (INF, -INF)
    yield 4, (INF, 0.0, -INF, 0.0)


@pytest.fixture(scope="module")
def steps():
    """One traced step for each number of replicas."""
    return {}


def _step(steps, strategy_of, replicas):
    if replicas not in steps:
        steps[replicas] = models.Step(
            strategy_of(replicas), "mixed_float16", clip_norm=1.0, ema_decay=0.9)
    return steps[replicas]


@pytest.mark.parametrize("replicas, bad", list(_cases()))
def test_every_replica_skips_and_nothing_changes(steps, strategy_of, replicas, bad):
    step = _step(steps, strategy_of, replicas)
    batch = models.image_batch(size=12)
    step(batch)
    before, scale = step.everything(), float(step.optimizer.loss_scale.value)
    skipped = int(step.optimizer.skipped_steps)
    step(batch, bad)
    for old, new in zip(before, step.everything(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert float(step.optimizer.loss_scale.value) == scale / 2
    for variable in step.optimizer.loss_scale.variables:
        copies = step.strategy.experimental_local_results(variable)
        assert len({copy.numpy().tobytes() for copy in copies}) == 1
    assert int(step.optimizer.skipped_steps) == skipped + 1
    applied = int(step.optimizer.applied_steps)
    step(batch)
    assert int(step.optimizer.applied_steps) == applied + 1
    assert any((old != new).any() for old, new in zip(before, step.everything()))
    assert step.traces == 1


def test_replicas_stay_alike(strategy_of):
    step = models.Step(strategy_of(4), "mixed_bfloat16")
    for seed in range(3):
        step(models.image_batch(seed=seed))
    for bucket in step.weights.buckets:
        copies = step.strategy.experimental_local_results(bucket.variable)
        for copy in copies[1:]:
            np.testing.assert_array_equal(copies[0].numpy(), copy.numpy())


def _plain(strategy, make_optimizer):
    """A loop of somebody's own: ordinary variables and `apply_gradients`."""
    with strategy.scope():
        variable = keras.Variable(np.ones(4, np.float32), name="v")
        optimizer = make_optimizer()
        optimizer.build([variable])

    @tf.function
    def run(bad):
        def replica_step():
            context = tf.distribute.get_replica_context()
            with tf.GradientTape() as tape:
                loss = optimizer.scale_loss(tf.reduce_sum(variable.value))
            gradient = tape.gradient(loss, variable.value)
            here = tf.equal(context.replica_id_in_sync_group, bad)
            gradient = tf.where(here, gradient * INF, gradient)
            optimizer.apply_gradients([(gradient, variable)])
        strategy.run(replica_step)

    return variable, optimizer, run


@pytest.mark.parametrize("bad", [0, 1])
def test_apply_gradients_skips_on_every_replica(strategy_of, bad):
    strategy = strategy_of(2)
    variable, optimizer, run = _plain(
        strategy, lambda: loss_scale_optimizer.LossScaleOptimizer(
            keras.optimizers.Adam(0.1), loss_scale_lib.DynamicLossScale(initial=8.0),
            ema_decay=0.9))
    run(-1)
    trained = variable.numpy()
    assert (trained < 1).all()
    watched = [variable.value, *optimizer.averages,
               *(v.value for v in optimizer.inner.variables)]
    local = strategy.experimental_local_results
    before = [copy.numpy() for variable in watched for copy in local(variable)]
    run(bad)
    after = [copy.numpy() for variable in watched for copy in local(variable)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert float(optimizer.loss_scale.value) == 4.0
    run(-1)
    assert (variable.numpy() < trained).all()


def test_keras_writes_minus_inf_when_replica_1_overflows(strategy_of):
    """Documents keras-team/keras#18666; when this fails, Keras has been fixed."""
    strategy = strategy_of(2)
    variable, _, run = _plain(
        strategy, lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=8.0))
    run(1)
    assert np.isneginf(variable.numpy()).all()


@pytest.mark.parametrize("bad, word", [(np.nan, "nan"), (INF, "inf"), (-INF, "inf")])
def test_the_report_names_the_bad_variable(bad, word):
    first, second = tf.Variable([1.0], name="first"), tf.Variable([1.0], name="second")
    optimizer = loss_scale_optimizer.LossScaleOptimizer(keras.optimizers.SGD(), 4.0)
    for gradient in (1.0, bad, bad):
        optimizer.apply_gradients(
            [(tf.constant([1.0]), first), (tf.constant([gradient]), second)])
    assert optimizer.nonfinite_report() == (
        f"2 steps in a row were skipped: {word} in 'second' at loss scale 4")


def test_state_that_overflows_skips_the_step(strategy_of):
    """Batch statistics may be infinite where every gradient is finite."""
    step = models.Step(strategy_of(0), make_model=lambda: keras.Sequential([
        keras.Input((6, 6, 1)), keras.layers.BatchNormalization(),
        keras.layers.Flatten(), keras.layers.Dense(models.CLASSES)]))
    batch = models.image_batch()
    before = step.everything()
    batch["image"] *= np.float32(1e30)
    step(batch)
    for old, new in zip(before, step.everything(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert int(step.optimizer.skipped_steps) == 1
    assert "moving_variance" in step.optimizer.nonfinite_report()
