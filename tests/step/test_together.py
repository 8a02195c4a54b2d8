"""Several optimizers in a step, one scale; and state that a skip puts back."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl import errors
from mpl.precision import loss_scale as loss_scale_lib
from mpl.step import gradients as gradients_lib
from mpl.step import loss_scale_optimizer, master_weights, state
import small_models as models

INF = np.inf
SCALE = 1024.0


class Pair:
    """Two models, two optimizers, one scale that would grow at each finite step."""

    def __init__(self, strategy, loss_scale=None):
        self.strategy = strategy
        self.traces = 0
        with strategy.scope():
            self.scale = loss_scale or loss_scale_lib.DynamicLossScale(
                initial=SCALE, period=1)
            self.models = [
                keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
                for _ in range(2)]
            self.weights = [master_weights.MasterWeights(model, "mixed_float16")
                            for model in self.models]
            self.optimizers = [
                loss_scale_optimizer.LossScaleOptimizer(
                    keras.optimizers.SGD(0.5, momentum=0.9), self.scale, weights,
                    ema_decay=0.5) for weights in self.weights]
        self._run = tf.function(self._step)

    def gradients(self, which, weight, bad):
        """Returns one model's gradients, `bad` added to them, and its forward."""
        weights, optimizer = self.weights[which], self.optimizers[which]
        params = weights.cast()
        with tf.GradientTape() as tape:
            tape.watch(params)
            with weights.bound(params) as forward:
                output = tf.cast(self.models[which](tf.ones((2, 3))), tf.float32)
            scaled = optimizer.scale_loss(
                state.LossOutput(output[:, 0], tf.fill([2], weight)), forward)
        gradients = weights.gradients(tape, scaled, forward)
        return [g + tf.cast(bad, g.dtype) for g in gradients], forward

    def _step(self, together, order, weights, bad):
        self.traces += 1

        def replica_step():
            parts = [
                (self.optimizers[which], *self.gradients(
                    which, weights[number], bad[number]))
                for number, which in enumerate(order)]
            if together:
                gradients_lib.apply_together(parts)
            else:
                for optimizer, gradients, forward in parts:
                    optimizer.apply(gradients, forward)

        self.strategy.run(replica_step)

    def __call__(self, together, bad, order=(0, 1), weights=None):
        """Runs a step; returns which optimizers updated anything, and the new scale."""
        before = [self.everything(which) for which in (0, 1)]
        weights = np.ones(len(order)) if weights is None else weights
        self._run(together, order, tf.constant(weights, tf.float32),
                  tf.constant(np.array(bad), tf.float32))
        changed = [any((old != new).any() for old, new in zip(
            before[which], self.everything(which))) for which in (0, 1)]
        return changed, float(self.scale.value)

    def everything(self, which):
        optimizer = self.optimizers[which]
        variables = [bucket.variable for bucket in self.weights[which].buckets]
        variables += [v.value for v in optimizer.inner.variables] + optimizer.averages
        return [copy.numpy() for variable in variables
                for copy in self.strategy.experimental_local_results(variable)]


@pytest.fixture(params=[0, 2], ids=["default", "mirrored"])
def pair(request, strategy_of):
    return Pair(strategy_of(request.param))


@pytest.mark.parametrize("bad", [(INF, 0), (0, np.nan), (INF, -INF)])
def test_together_all_or_none(pair, bad):
    assert pair(True, (0, 0)) == ([True, True], SCALE * 2)
    assert pair(True, bad) == ([False, False], SCALE)
    assert pair(True, (0, 0)) == ([True, True], SCALE * 2)
    assert pair.traces == 1
    for optimizer in pair.optimizers:
        assert int(optimizer.skipped_steps) == 1
        assert int(optimizer.applied_steps) == 2


@pytest.mark.parametrize("bad", [(INF, 0), (0, np.nan), (INF, -INF)])
def test_apart_each_decides_and_the_scale_moves_once(pair, bad):
    assert pair(False, (0, 0)) == ([True, True], SCALE * 2)
    changed = [bool(np.isfinite(value)) for value in bad]
    assert pair(False, bad) == (changed, SCALE)
    assert pair(False, (0, 0)) == ([True, True], SCALE * 2)
    assert [int(o.skipped_steps) for o in pair.optimizers] == [not c for c in changed]


def test_several_updates_of_one_optimizer_are_one_step_of_the_scale(pair):
    """As a GAN trains its critic twice for each generator's step."""
    critic_twice = dict(order=(0, 0, 1))
    assert pair(False, (0, 0, 0), **critic_twice) == ([True, True], SCALE * 2)
    assert pair(False, (INF, 0, 0), **critic_twice) == ([True, True], SCALE)
    assert int(pair.optimizers[0].applied_steps) == 3
    assert int(pair.optimizers[1].applied_steps) == 2


def test_without_weight_nobody_moves_together(pair):
    assert pair(True, (0, 0), weights=(0.0, 1.0)) == ([False, False], SCALE)
    assert pair(True, (0, 0), weights=(0.0, 0.0)) == ([False, False], SCALE)


def test_without_weight_the_other_moves_apart(pair):
    assert pair(False, (0, 0), weights=(0.0, 1.0)) == ([False, True], SCALE * 2)
    assert pair(False, (0, INF), weights=(0.0, 1.0)) == ([False, False], SCALE)
    assert pair(False, (0, 0), weights=(0.0, 0.0)) == ([False, False], SCALE)


def test_apply_gradients_shares_a_scale_too():
    scale = loss_scale_lib.DynamicLossScale(initial=SCALE, period=1)
    first, second = (loss_scale_optimizer.LossScaleOptimizer(
        keras.optimizers.SGD(1.0), scale) for _ in range(2))
    one, other = tf.Variable(1.0), tf.Variable(1.0)
    first.apply_gradients([(tf.constant(INF), one)])
    assert float(scale.value) == SCALE  # waits for the other
    second.apply_gradients([(tf.constant(SCALE), other)])
    assert (float(one), float(other), float(scale.value)) == (1.0, 0.0, SCALE / 2)


def test_a_scale_takes_no_more_optimizers_once_it_runs():
    scale = loss_scale_lib.DynamicLossScale()
    first = loss_scale_optimizer.LossScaleOptimizer(keras.optimizers.SGD(1.0), scale)
    first.apply_gradients([(tf.constant(1.0), tf.Variable(1.0))])
    with pytest.raises(errors.ConfigError, match="cannot take another"):
        loss_scale_optimizer.LossScaleOptimizer(keras.optimizers.SGD(1.0), scale)


def test_gradients_are_applied_in_replica_context(strategy_of):
    pair = Pair(strategy_of(2))
    with pair.strategy.scope():
        with pytest.raises(errors.ConfigError, match="cross-replica"):
            gradients_lib.apply_together([])


class Assigning(tf.Module):
    """Keeps a counter, a mean and random numbers of its own, as plain modules do."""

    def __init__(self, **variable):
        super().__init__()
        self.kernel = tf.Variable(tf.ones((36, models.CLASSES)))
        self.calls = tf.Variable(0, trainable=False, dtype=tf.int64, **variable)
        self.inner = {"mean": [tf.Variable(0.0, trainable=False, **variable)]}
        self.random = None if variable else tf.random.Generator.from_seed(1)

    def __call__(self, x, training=False):
        x = tf.reshape(x, (-1, 36))
        self.calls.assign_add(1)
        mean = self.inner["mean"][0]
        mean.assign(0.5 * (mean + tf.reduce_mean(x)))
        if self.random is not None:
            x *= self.random.uniform((), 0.9, 1.1)
        return x @ self.kernel


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_module_assigns_is_put_back(strategy_of, accumulate):
    step = models.Step(strategy_of(0), make_model=Assigning, accumulate=accumulate)
    batch = models.image_batch(seed=1)
    step(batch)
    model = step.model
    assert len(step.weights.assigned) == 3
    assert int(model.calls) == accumulate
    mean = 0.0
    for part in np.split(batch["image"], accumulate):
        mean = 0.5 * (mean + part.mean())
    np.testing.assert_allclose(model.inner["mean"][0].numpy(), mean, rtol=1e-5)
    before = step.everything()
    step(batch, [INF])
    step({**batch, "weight": np.zeros(8, np.float32)})
    for old, new in zip(before, step.everything(), strict=True):
        np.testing.assert_array_equal(old, new)
    state_then = model.random.state.numpy()
    step(batch)
    assert int(model.calls) == 2 * accumulate
    assert (model.random.state.numpy() != state_then).any()


@pytest.mark.parametrize("aggregation", ["SUM", "ONLY_FIRST_REPLICA"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_replica_puts_back_its_own(strategy_of, accumulate, aggregation):
    """Variables that are aggregated when read, so that each replica has a value."""
    variable = dict(synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=getattr(tf.VariableAggregation, aggregation))
    step = models.Step(strategy_of(2), accumulate=accumulate,
                       make_model=lambda: Assigning(**variable))
    batch = models.image_batch(seed=1)
    step(batch)
    means = [copy.numpy() for copy in step.strategy.experimental_local_results(
        step.model.inner["mean"][0])]
    assert means[0] != means[1]
    before = step.everything()
    step(batch, [0.0, INF])
    for old, new in zip(before, step.everything(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert int(step.optimizer.skipped_steps) == 1


def test_aggregated_assigns_of_a_module_are_refused(strategy_of):
    """They are collectives inside the forward pass."""
    step = models.Step(strategy_of(2), make_model=lambda: Assigning(
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA))
    with pytest.raises(errors.ConfigError, match="assign"):
        step(models.image_batch())
