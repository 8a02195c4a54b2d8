"""n replicas equal one and K micro-batches equal one batch, partial batches too."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.precision import policy as policy_lib
from mpl.step import gradients as gradients_lib
from mpl.step import loss_scale_optimizer, master_weights, state
import small_models as models

pytestmark = pytest.mark.slow  # whole trainings, many of them

layers = keras.layers
SIZE = 12  # examples, for up to 4 replicas of up to 3 micro-batches
CLIP_NORM = 0.4  # less than any gradient's
LOSS_RTOL = {"float64": 1e-14, "float32": 2e-6, "mixed_bfloat16": 0.02,
             "mixed_float16": 0.002}
PLAIN = functools.partial(
    models.image_model, dropout=0, batch_norm=False, activity_l2=0)


def _batches():
    """Four global batches: full, weighted by example, and two padded at the end."""
    batches = [models.image_batch(SIZE, seed=seed) for seed in range(4)]
    batches[1]["weight"] = np.linspace(0.1, 3.0, SIZE).astype(np.float32)
    for batch, examples in ((batches[2], 7), (batches[3], 5)):
        for key in ("image", "label"):
            batch[key][examples:] = batch[key][0]
        batch["weight"][examples:] = 0.0
    return batches


def _train(step, batches=None):
    """Returns the losses and, as one vector, the weights."""
    losses = [step(batch) for batch in (batches or _batches())]
    return np.array(losses), _vector(step)


def _vector(step):
    return np.concatenate([value.ravel() for value in step.masters().values()])


@functools.cache
def _reference():
    """Trains in float64 on one device without mpl; returns losses, start and end."""
    start = models.Step(tf.distribute.get_strategy(), make_model=PLAIN)
    with policy_lib.get_policy("float64").scope():
        model = PLAIN(head="float64")
    model.set_weights(start.model.get_weights())
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    losses = []
    for batch in _batches():
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(
                batch["label"], model(batch["image"], training=True), from_logits=True)
            weight = batch["weight"].astype(np.float64)
            loss = tf.reduce_sum(loss * weight) / weight.sum()
            total = loss + tf.add_n(model.losses)
        gradients = tape.gradient(total, [v.value for v in model.trainable_variables])
        gradients, norm = tf.clip_by_global_norm(gradients, CLIP_NORM)
        assert norm > CLIP_NORM
        optimizer.apply(gradients)
        losses.append(float(loss))
    end = np.concatenate([v.numpy().ravel() for v in model.trainable_variables])
    assert end.dtype == np.float64
    return losses, start.model.get_weights(), end


def _error(strategy, policy, accumulate=1, loss_rtol=None, **kwargs):
    """Trains; returns the distance to the reference, in units of the weights' norm."""
    head = "float64" if policy == "float64" else "float32"
    step = models.Step(strategy, policy, clip_norm=CLIP_NORM, accumulate=accumulate,
                       make_model=functools.partial(PLAIN, head=head), **kwargs)
    expected_losses, start, end = _reference()
    step.model.set_weights(start)
    step.weights.adopt()
    moved = np.linalg.norm(_vector(step) - end) / np.linalg.norm(end)
    losses, weights = _train(step)
    np.testing.assert_allclose(
        losses, expected_losses, rtol=loss_rtol or LOSS_RTOL[policy])
    for bucket in step.weights.buckets:
        copies = strategy.experimental_local_results(bucket.variable)
        for copy in copies[1:]:
            np.testing.assert_array_equal(copies[0].numpy(), copy.numpy())
    error = np.linalg.norm(weights - end) / np.linalg.norm(end)
    assert error < moved / 10
    return error


@functools.cache
def _error_of_one_device(policy):
    return _error(tf.distribute.OneDeviceStrategy("CPU:0"), policy)


SHAPES = [(n, k) for n in (1, 2, 3, 4) for k in (1, 2, 3)
          if n * k > 1 and SIZE % (n * k) == 0]


@pytest.mark.parametrize("replicas, accumulate", SHAPES)
def test_float32_is_equal_within_rounding(strategy_of, replicas, accumulate):
    ulp = 2.0**-23
    assert _error_of_one_device("float32") < ulp
    assert _error(strategy_of(replicas), "float32", accumulate) < ulp


@pytest.mark.parametrize("replicas, accumulate", [(1, 1), (2, 2)])
def test_float64_is_equal_within_rounding(strategy_of, replicas, accumulate):
    assert _error(strategy_of(replicas), "float64", accumulate) < 2.0**-52


def test_replicas_may_be_summed_in_sixteen_bits(strategy_of):
    error = _error(
        strategy_of(2), "float32", loss_rtol=1e-3, reduce_dtype=tf.bfloat16)
    assert 1e-6 < error < 1e-3


@pytest.mark.parametrize("replicas, accumulate", SHAPES[1::2])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_sixteen_bits_err_no_more_than_twice_one_device(strategy_of, policy, replicas,
                                                        accumulate):
    one = _error_of_one_device(policy)
    assert 1e-5 < one < 0.01
    assert _error(strategy_of(replicas), policy, accumulate) <= 2 * one


@pytest.mark.parametrize("replicas, accumulate", [(2, 1), (1, 2), (2, 2)])
def test_penalties_that_are_means_count_once(strategy_of, replicas, accumulate):
    def train(strategy, activity_l2, accumulate=1):
        make_model = functools.partial(PLAIN, activity_l2=activity_l2)
        step = models.Step(strategy, make_model=make_model, accumulate=accumulate)
        batches = [models.image_batch(SIZE, seed=seed) for seed in range(2)]
        return _train(step, batches)[1]

    expected = train(strategy_of(0), 0.1)
    np.testing.assert_allclose(
        train(strategy_of(replicas), 0.1, accumulate), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(train(strategy_of(0), 0) - expected).max() > 1e-4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_empty_last_replica_changes_nothing(strategy_of, accumulate):
    """Not a bit: weights, slots, batch statistics and seeds."""
    two, three = (models.Step(strategy_of(n), "mixed_float16", accumulate=accumulate,
                              clip_norm=0.5, ema_decay=0.9) for n in (2, 3))
    for seed in range(3):
        batch = models.image_batch(8, seed=seed)
        padded = {
            key: np.concatenate([value, value[:4]]) for key, value in batch.items()}
        padded["weight"][8:] = 0.0
        assert two(batch) == three(padded)
    for left, right in zip(two.everything()[::2], three.everything()[::3], strict=True):
        np.testing.assert_array_equal(left, right)


def test_an_empty_last_micro_batch_changes_no_statistics(strategy_of):
    make_model = functools.partial(models.image_model, dropout=0)
    one = models.Step(strategy_of(0), make_model=make_model)
    two = models.Step(strategy_of(0), make_model=make_model, accumulate=2)
    batch = models.image_batch(4)
    padded = {key: np.concatenate([value, value]) for key, value in batch.items()}
    padded["image"][4:] *= 2.0
    padded["weight"][4:] = 0.0
    one(batch), two(padded)
    for left, right in zip(one.weights.state, two.weights.state, strict=True):
        np.testing.assert_array_equal(left.value.numpy(), right.value.numpy())
    np.testing.assert_allclose(_vector(one), _vector(two), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [0.0, np.nan])
@pytest.mark.parametrize("replicas, accumulate", [(1, 1), (2, 1), (2, 2)])
def test_a_batch_without_weight_changes_nothing(strategy_of, replicas, accumulate, bad):
    step = models.Step(strategy_of(replicas), "mixed_float16", accumulate=accumulate,
                       clip_norm=0.5, ema_decay=0.9)
    batch = models.image_batch(SIZE)
    step(batch)
    optimizer = step.optimizer

    def counters():
        return [tf.convert_to_tensor(value).numpy() for value in (
            optimizer.applied_steps, optimizer.skipped_steps, optimizer.grad_norm,
            optimizer.consecutive_skips, *optimizer.loss_scale.variables)]

    before = [*step.everything(), *counters()]
    batch["weight"][:] = 0.0
    assert step(batch, np.full(replicas, bad)) == 0.0
    for old, new in zip(before, [*step.everything(), *counters()], strict=True):
        np.testing.assert_array_equal(old, new)


def test_seeds_go_on_from_one_micro_batch_to_the_next(strategy_of):
    """Micro-batches draw the masks that so many steps one by one would draw."""
    with strategy_of(0).scope():
        model = keras.Sequential([
            keras.Input((64,)), layers.Dense(64), layers.Dropout(0.5, seed=3)])
        weights = master_weights.MasterWeights(model, "float32")
        optimizer = loss_scale_optimizer.LossScaleOptimizer(
            keras.optimizers.SGD(), "none", weights)
    x = tf.ones((6, 64))

    def forward_of(params):
        def forward(x, carried):
            with tf.GradientTape() as tape:
                tape.watch(params)
                with weights.bound(params, carried) as forward:
                    y = model(x, training=True)
                    output = state.LossOutput(
                        tf.reduce_sum(y, 1), tf.ones_like(y[:, 0]), y)
                    scaled = optimizer.scale_loss(output, forward)
            return weights.gradients(tape, scaled, forward), forward, output
        return forward

    @tf.function
    def together():
        _, forward, output = gradients_lib.accumulate(
            forward_of(weights.cast()), x, 3, weights=weights)
        return output.outputs, forward.state

    @tf.function
    def one_by_one():
        forward, outputs, carried = forward_of(weights.cast()), [], None
        for part in tf.split(x, 3):
            _, after, output = forward(part, carried)
            carried = after.state
            outputs.append(output.outputs)
        return tf.concat(outputs, 0), carried

    got, seeds = together()
    expected, expected_seeds = one_by_one()
    np.testing.assert_array_equal(got == 0, expected == 0)
    np.testing.assert_array_equal(seeds[0], expected_seeds[0])
    masks = np.split(got.numpy() == 0, 3)
    assert (masks[0] != masks[1]).any() and (masks[1] != masks[2]).any()


def _normalised():
    return keras.Sequential([
        keras.Input((6, 6, 1)), layers.Flatten(),
        layers.BatchNormalization(momentum=0.5), layers.Dense(models.CLASSES)])


def test_statistics_are_the_weighted_mean_over_replicas(strategy_of):
    step = models.Step(strategy_of(2), make_model=_normalised)
    batch = models.image_batch(8)
    batch["weight"][:] = [1, 1, 1, 0, 0, 0, 0, 1]  # 3 on the first, 1 on the second
    first, second = np.split(batch["image"].reshape(8, -1), 2)
    step(batch)
    norm = step.model.layers[1]
    mean = (3 * first.mean(0) + second.mean(0)) / 4
    variance = (3 * first.var(0) + second.var(0)) / 4
    np.testing.assert_allclose(
        norm.moving_mean.numpy(), 0.5 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        norm.moving_variance.numpy(), 0.5 + 0.5 * variance, rtol=1e-5)


class _Counts(layers.Layer):
    """Counts positive inputs in an integer, and keeps their mean."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), dtype="int32", initializer="zeros",
                                     trainable=False, name="count")
        self.mean = self.add_weight(shape=(), initializer="zeros", trainable=False,
                                    name="mean")

    def call(self, x):
        self.count.assign_add(tf.reduce_sum(tf.cast(x > 0, tf.int32)))
        self.mean.assign(tf.reduce_mean(x))
        return x


def test_copies_of_state_stay_identical(strategy_of):
    """An integer is the first replica's on all."""
    step = models.Step(strategy_of(3), make_model=lambda: keras.Sequential([
        keras.Input((6, 6, 1)), _Counts(), layers.Flatten(),
        layers.Dense(models.CLASSES)]))
    batch = models.image_batch(SIZE)
    step(batch)
    layer = step.model.layers[0]
    assert layer.count.numpy() == (batch["image"][:4] > 0).sum()
    np.testing.assert_allclose(layer.mean.numpy(), batch["image"].mean(), rtol=1e-5)
    for variable in (layer.count, layer.mean):
        copies = step.strategy.experimental_local_results(variable.value)
        assert len({copy.numpy().item() for copy in copies}) == 1


@pytest.mark.parametrize("accumulate", [5, 24])
def test_a_batch_that_cannot_be_cut_is_refused(strategy_of, accumulate):
    step = models.Step(strategy_of(0), make_model=PLAIN, accumulate=accumulate)
    with pytest.raises(ValueError, match="cannot be cut into"):
        step(models.image_batch(SIZE))
