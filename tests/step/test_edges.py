"""What silently went wrong once: each is refused by name or comes out right."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl import errors
from mpl.step import loss_scale_optimizer, master_weights, remat, state

layers = keras.layers


def _bound_gradients(weights, call):
    weights.build()
    params = weights.cast()
    with tf.GradientTape() as tape:
        tape.watch(params)
        with weights.bound(params) as forward:
            loss = tf.reduce_sum(call())
    return weights.gradients(tape, loss, forward)


def _gathered(pack_below):
    """A tf.Module's table read with tf.gather, trained with momentum and decay."""
    class Table(tf.Module):
        def __init__(self):
            super().__init__()
            self.rows = tf.Variable(np.ones((8, 4), np.float32))

    model = Table()
    weights = master_weights.MasterWeights(model, "float32", pack_below=pack_below)
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1), "none", weights)
    for ids in ([0, 1], [1, 1], [2, 3]):
        params = weights.cast()
        with tf.GradientTape() as tape:
            tape.watch(params)
            with weights.bound(params) as forward:
                rows = tf.reduce_sum(tf.gather(model.rows, ids), 1)
                scaled = optimizer.scale_loss(
                    state.LossOutput(rows, tf.ones_like(rows)), forward)
        optimizer.apply(weights.gradients(tape, scaled, forward), forward)
    weights.publish()
    return model.rows.numpy()


def test_a_table_that_is_not_sparse_is_updated_as_a_whole():
    np.testing.assert_array_equal(_gathered(pack_below=0), _gathered(pack_below=10**6))


def test_gradients_reduced_in_float16_are_unscaled_in_float32():
    variable = tf.Variable(0.0)
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        keras.optimizers.SGD(1.0), 64, reduce_dtype=tf.float16)
    small = 2.0**-20 * (1 + 2.0**-8)  # subnormal in float16, but not 64 times as large
    optimizer.apply_gradients([(tf.constant(small * 64), variable)])
    assert variable.numpy() == -small
    optimizer.apply_gradients([(tf.constant(300.0 * 64), variable)])  # 300² > 65504
    assert int(optimizer.skipped_steps) == 0 and float(optimizer.grad_norm) == 300.0


def test_a_layer_that_assigns_its_weight_is_refused():
    model = keras.Sequential([
        keras.Input((4,)), layers.SpectralNormalization(layers.Dense(3))])
    weights = master_weights.MasterWeights(model, "float32")
    with pytest.raises(errors.ConfigError, match="kernel.*, which is trained"):
        _bound_gradients(weights, lambda: model(tf.ones((2, 4)), training=True))


def test_remat_gives_keyword_arguments_a_gradient():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])

    def product(a, b, factor=1.0):
        return a * b * factor

    def gradients(part):
        weights = master_weights.MasterWeights(model, "float32")

        def call():
            h = model(tf.ones((2, 4)))
            return part(product)(h, b=h, factor=2.0)

        return _bound_gradients(weights, call)

    for got, want in zip(gradients(remat.remat), gradients(lambda f: f)):
        np.testing.assert_array_equal(got, want)


def test_remat_leaves_a_sparse_table_sparse():
    model = keras.Sequential([
        keras.Input((3,), dtype="int32"), layers.Embedding(6, 4), layers.Dense(3)])
    table, dense = model.layers
    weights = master_weights.MasterWeights(model, "float32", sparse=["embeddings"])
    gradients = _bound_gradients(
        weights, lambda: remat.remat(dense.__call__)(table(tf.constant([[1, 2, 2]]))))
    rows = [g for g in gradients if isinstance(g, tf.IndexedSlices)]
    assert len(rows) == 1 and rows[0].values.shape == [3, 4]


def test_losses_added_while_two_models_are_bound_are_refused():
    models = [keras.Sequential([keras.Input((4,)), layers.Dense(
        3, activity_regularizer=keras.regularizers.L2(1.0))]) for _ in range(2)]
    first, second = [master_weights.MasterWeights(m, "float32") for m in models]
    first.build()
    second.build()
    with pytest.raises(errors.ConfigError, match="two models are bound"):
        with first.bound(first.cast()), second.bound(second.cast()):
            models[0](tf.ones((2, 4)))
    with first.bound(first.cast()) as forward:
        models[0](tf.ones((2, 4)))
    assert len(forward.penalties) == 1


def test_the_report_blames_the_optimizer_whose_gradient_was_bad():
    optimizers, updates = [], []
    for bad in (0.0, np.inf):
        variable = tf.Variable(0.0, name=f"v{len(optimizers)}")
        optimizer = loss_scale_optimizer.LossScaleOptimizer(
            keras.optimizers.SGD(1.0), "none")
        optimizer.build([variable])
        forward = state.Forward([], [], scale=tf.constant(1.0))
        optimizers.append(optimizer)
        updates.append((optimizer, [tf.constant(1.0 + bad)], forward))
    loss_scale_optimizer.gradients_lib.apply_together(updates)
    good, bad = optimizers
    assert good.nonfinite_report() is None
    assert "1 steps in a row were skipped: inf in 'v1'" in bad.nonfinite_report()
    bad.apply_gradients([(tf.constant(1.0), bad.buckets[0].variable)])
    assert bad.nonfinite_report() is None  # it has recovered
