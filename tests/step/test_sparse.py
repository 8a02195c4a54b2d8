"""Embedding tables that are read and updated row by row."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl import errors
from mpl.step import loss_scale_optimizer, master_weights, sparse
import small_models as models

layers = keras.layers
optimizers = keras.optimizers
ROWS, WIDTH, LENGTH = 40, 4, 5


def _text_model(rows=ROWS, **embedding):
    return keras.Sequential([
        keras.Input((LENGTH,), dtype="int32"),
        layers.Embedding(rows, WIDTH, name="table", **embedding),
        layers.Flatten(), layers.Dense(models.CLASSES, dtype="float32")])


def _text_batch(size=8, rows=ROWS, seed=0):
    """Ids among `rows`, so that some repeat."""
    rng = np.random.default_rng(seed)
    return {"image": rng.integers(0, rows, (size, LENGTH)).astype(np.int32),
            "label": rng.integers(0, models.CLASSES, size).astype(np.int32),
            "weight": np.ones(size, np.float32)}


def _step(strategy, inner=lambda: optimizers.SGD(0.5), sparse=("table",), **kwargs):
    kwargs.setdefault("make_model", _text_model)
    return models.Step(strategy, inner=inner, sparse=sparse, **kwargs)


def _table(step):
    return step.model.get_layer("table").embeddings.numpy()


def test_duplicates_are_summed():
    slices = tf.IndexedSlices(
        tf.constant([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]), tf.constant([3, 1, 3]),
        tf.constant([5, 2]))
    summed = sparse.sum_duplicates(slices)
    np.testing.assert_array_equal(summed.indices, [3, 1])
    np.testing.assert_array_equal(summed.values, [[101.0, 202.0], [10.0, 20.0]])


@pytest.mark.parametrize("inner", [
    lambda: optimizers.SGD(0.5), lambda: optimizers.Adagrad(0.5)],
    ids=["sgd", "adagrad"])
def test_with_every_row_touched_sparse_equals_dense(strategy_of, inner):
    batch = _text_batch(size=64)
    assert set(batch["image"].flat) == set(range(ROWS))
    rows, dense = (_step(strategy_of(0), inner, sparse=named, clip_norm=0.1)
                   for named in (("table",), None))
    assert [b.kind.sparse for b in rows.weights.buckets] == [False, True]
    for _ in range(3):
        rows(batch), dense(batch)
    for key, expected in dense.masters().items():
        np.testing.assert_allclose(rows.masters()[key], expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("inner", [
    lambda: optimizers.SGD(0.5), lambda: optimizers.Adagrad(0.5),
    lambda: optimizers.Adam(0.1), lambda: optimizers.AdamW(0.1)],
    ids=["sgd", "adagrad", "adam", "adamw"])
def test_untouched_rows_keep_their_bits(strategy_of, inner):
    step = _step(strategy_of(0), inner, no_decay=["table"])
    variables = [step.model.get_layer("table").embeddings.value,
                 *step.optimizer._slots.of(1).values()]
    step(_text_batch())
    before = [variable.numpy() for variable in variables]
    batch = _text_batch(rows=10, seed=1)
    step(batch)
    touched = np.unique(batch["image"])
    untouched = np.setdiff1d(np.arange(ROWS), touched)
    for old, variable in zip(before, variables):
        np.testing.assert_array_equal(old[untouched], variable.numpy()[untouched])
        assert (old[touched] != variable.numpy()[touched]).any(axis=1).all()


def test_lazy_adam_equals_a_numpy_oracle():
    rate, beta_1, beta_2, epsilon = 0.1, 0.9, 0.999, 1e-7
    rng = np.random.default_rng(0)
    start = rng.normal(size=(6, 3)).astype(np.float32)
    table = tf.Variable(start)
    optimizer = loss_scale_optimizer.LossScaleOptimizer(optimizers.Adam(rate), 4.0)
    expected = start.astype(np.float64)
    first, second = np.zeros((6, 3)), np.zeros((6, 3))
    for step in range(1, 6):
        ids = rng.integers(0, 6, 4)
        values = rng.normal(size=(4, 3)).astype(np.float32)
        optimizer.apply_gradients([(tf.IndexedSlices(values * 4, ids, (6, 3)), table)])
        gradient = np.zeros((6, 3))
        np.add.at(gradient, ids, values)
        for row in set(ids):
            first[row] += (gradient[row] - first[row]) * (1 - beta_1)
            second[row] += (gradient[row] ** 2 - second[row]) * (1 - beta_2)
            correction = np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
            expected[row] -= rate * correction * first[row] / (
                np.sqrt(second[row]) + epsilon)
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_bad_row_skips_the_step():
    table = tf.Variable(tf.ones((4, 2)))
    optimizer = loss_scale_optimizer.LossScaleOptimizer(
        optimizers.Adagrad(0.1), "dynamic")
    scale = float(optimizer.loss_scale.value)
    optimizer.apply_gradients([(tf.IndexedSlices([[1.0, np.nan]], [2], (4, 2)), table)])
    np.testing.assert_array_equal(table.numpy(), np.ones((4, 2)))
    assert float(optimizer.loss_scale.value) == scale / 2


@pytest.mark.parametrize("inner", [
    lambda: optimizers.SGD(0.1, momentum=0.9), lambda: optimizers.RMSprop(),
    lambda: optimizers.AdamW(weight_decay=0.1)], ids=["momentum", "rmsprop", "adamw"])
def test_apply_gradients_makes_rows_dense_where_there_is_no_rule(inner):
    table, expected = tf.Variable(tf.ones((4, 2))), tf.Variable(tf.ones((4, 2)))
    optimizer = loss_scale_optimizer.LossScaleOptimizer(inner())
    reference = inner()
    for row in (2, 1):
        rows = tf.IndexedSlices(tf.constant([[1.0, 2.0]]), tf.constant([row]),
                                tf.constant([4, 2]))
        optimizer.apply_gradients([(rows, table)])
        reference.apply([tf.convert_to_tensor(rows)], [expected])
    np.testing.assert_array_equal(table.numpy(), expected.numpy())


@pytest.mark.parametrize("replicas, accumulate", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_replicas_and_micro_batches_equal_one_step(strategy_of, replicas, accumulate,
                                                   name):
    one = _step(strategy_of(0), lambda: getattr(optimizers, name)(0.1), clip_norm=0.1)
    many = _step(strategy_of(replicas), lambda: getattr(optimizers, name)(0.1),
                 clip_norm=0.1, accumulate=accumulate)
    for seed in range(3):
        batch = _text_batch(seed=seed)
        batch["weight"][6:] = 0.0
        one(batch), many(batch)
    for key, expected in one.masters().items():
        np.testing.assert_allclose(
            many.masters()[key], expected, rtol=1e-5, atol=2e-6, err_msg=key)
    copies = many.strategy.experimental_local_results(
        many.model.get_layer("table").embeddings.value)
    for copy in copies:
        np.testing.assert_array_equal(copies[0].numpy(), copy.numpy())


@pytest.mark.parametrize("replicas, accumulate", [(1, 1), (1, 2), (2, 1)])
def test_a_large_table_costs_by_rows_touched(strategy_of, replicas, accumulate):
    """No tensor in the step has as many elements as the table."""
    rows = 10**6
    step = _step(strategy_of(replicas), lambda: optimizers.Adam(), sparse=(),
                 make_model=lambda: _text_model(rows), clip_norm=1.0,
                 accumulate=accumulate)
    assert [bucket.kind.sparse for bucket in step.weights.buckets] == [False, True]
    concrete = step.concrete(_text_batch())
    graph = concrete.graph.as_graph_def(add_shapes=True)
    nodes = list(graph.node)
    for function in graph.library.function:
        nodes += function.node_def
    assert "ResourceGather" in {node.op for node in nodes}
    assert "ResourceScatterSub" in {node.op for node in nodes}
    for node in nodes:
        for shape in node.attr["_output_shapes"].list.shape:
            assert rows not in [dim.size for dim in shape.dim], node.name


def test_size_decides_which_table_is_sparse(strategy_of):
    size = ROWS * WIDTH * 4
    for limit, expected in ((size, True), (size + 1, False)):
        step = _step(strategy_of(0), sparse=(), pack_below=limit)
        assert any(bucket.kind.sparse for bucket in step.weights.buckets) is expected


@pytest.mark.parametrize("inner, embedding, why", [
    (lambda: optimizers.RMSprop(), {}, "RMSprop has no rule"),
    (lambda: optimizers.SGD(0.1, momentum=0.9), {}, "momentum would have to move"),
    (lambda: optimizers.Adam(amsgrad=True), {}, "amsgrad would have to move"),
    (lambda: optimizers.AdamW(), {}, "weight decay would have to move"),
    (lambda: optimizers.SGD(), {"embeddings_regularizer": "l2"}, "a regularizer would"),
    (lambda: optimizers.SGD(), {"embeddings_constraint": "non_neg"}, "a constraint"),
])
def test_rules_that_move_every_row_are_refused(strategy_of, inner, embedding, why):
    with pytest.raises(errors.ConfigError, match=f"(?s)table/embeddings.*{why}"):
        _step(strategy_of(0), inner, make_model=lambda: _text_model(**embedding))


def test_averages_of_a_sparse_table_are_refused(strategy_of):
    with pytest.raises(errors.ConfigError, match="ema_decay would have to move every"):
        _step(strategy_of(0), ema_decay=0.9)


def test_only_embeddings_are_updated_row_by_row(strategy_of):
    with pytest.raises(errors.ConfigError, match="no keras.layers.Embedding's"):
        _step(strategy_of(0), sparse=["kernel"])


class Tied(keras.Model):
    """Reads its table as a whole too, for the logits."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(ROWS, WIDTH, name="table")

    def call(self, ids, training=False):
        return tf.matmul(tf.reduce_mean(self.table(ids), 1),
                         tf.convert_to_tensor(self.table.embeddings), transpose_b=True)


def _tied():
    model = Tied()
    model(np.zeros((1, LENGTH), np.int32))
    return model


def test_tied_weights_need_a_dense_table(strategy_of):
    with pytest.raises(errors.ConfigError, match="(?s)tied weights.*sparse=None"):
        _step(strategy_of(0), make_model=_tied)(_text_batch())
    step = _step(strategy_of(0), make_model=_tied, sparse=None)
    first = step(_text_batch())
    assert step(_text_batch()) < first


def test_a_lent_table_is_given_back(strategy_of):
    step = _step(strategy_of(0))
    layer = step.model.get_layer("table")
    with step.weights.bound(step.weights.cast()):
        assert "call" in vars(layer)
    assert "call" not in vars(layer)
    with pytest.raises(RuntimeError, match="mine"):
        with step.weights.bound(step.weights.cast()):
            raise RuntimeError("mine")
    assert "call" not in vars(layer)


def test_masters_are_built_before_they_are_used():
    weights = master_weights.MasterWeights(_text_model(), "float32")
    with pytest.raises(errors.ConfigError, match="no buckets yet"):
        weights.cast()
