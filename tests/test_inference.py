"""What `Experiment.predictor` returns: few traces, the weights of each call."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl

BATCH = 32
X = np.random.default_rng(0).normal(size=[3 * BATCH + 5, 6]).astype(np.float32)


class Tiny(mpl.Experiment):
    def build_model(self):
        self.seen = []  # what `predict` was traced with
        return keras.Sequential([keras.Input([6]), keras.layers.Dense(3)])

    def build_data(self, split, context):
        return {"x": X, "y": X[:, :3]} if split == "train" else None

    def loss(self, batch, training):
        outputs = tf.cast(self.model(batch["x"], training=training), tf.float32)
        error = tf.reduce_sum((outputs - batch["y"]) ** 2, -1)
        return mpl.LossOutput(error, batch["weight"], {})

    def predict(self, batch):
        self.seen.append(batch["x"].shape[0])
        outputs = self.model(batch["x"], training=False)
        return {"outputs": outputs, "weight": batch["weight"]}


def tiny(strategy, **settings):
    experiment = Tiny()
    settings = {"global_batch_size": BATCH, "learning_rate": 0.1, **settings}
    experiment.setup(mpl.RunConfig(**settings), strategy)
    return experiment


@pytest.mark.parametrize("replicas", [1, 2])
def test_any_number_of_examples_in_a_handful_of_traces(replicas, strategy_of):
    experiment = tiny(strategy_of(replicas))
    predict = experiment.predictor()
    wanted = experiment.model(X, training=False).numpy()
    for _ in range(2):
        for count in [1, 2, 3, 4, 5, 11, 16, 17, BATCH - 1, BATCH, BATCH + 1, len(X)]:
            got = predict({"x": X[:count], "another": np.ones(count)})
            np.testing.assert_allclose(got["outputs"], wanted[:count], atol=1e-6)
            np.testing.assert_array_equal(got["weight"], np.ones(count))
            assert type(got["outputs"]) is np.ndarray
    # Of each replica: static shapes, the full batch the largest of them.
    sizes = {1: [1, 4, 16, 32], 2: [1, 4, 16]}[replicas]
    assert sorted(experiment.seen) == sorted(sizes * replicas)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_weights_are_those_of_each_call(ema_decay, strategy_of):
    experiment = tiny(strategy_of(1), ema_decay=ema_decay, policy="mixed_bfloat16")
    predict = experiment.predictor()
    results = []
    for _ in range(3):
        optimizer = experiment.optimizer
        values = optimizer.weights.by_key(optimizer.averages).values()
        bias, kernel = (
            tf.cast(value, tf.bfloat16)
            for value in sorted(values, key=lambda value: len(value.shape))
        )
        want = tf.matmul(tf.cast(X[:1], tf.bfloat16), kernel) + bias
        results.append(predict({"x": X[:1]})["outputs"])
        np.testing.assert_allclose(results[-1], want, rtol=2e-2, atol=2e-2)
        assert results[-1].dtype == np.float32
        experiment.trainer.train(3)
    assert np.ptp(results, 0).min() > 0.01
    assert experiment.seen == [1]


def test_examples_that_do_not_fit_are_errors(strategy_of):
    predict = tiny(strategy_of(1)).predictor()
    for examples, message in [
        ({}, "no examples"),
        ({"x": X[:0]}, "no examples"),
        ({"x": X[:3], "another": np.ones(2)}, "same number of examples"),
        ({"x": np.full([1, 6], np.nan)}, "`x` has a NaN"),
    ]:
        with pytest.raises(mpl.ConfigError, match=message):
            predict(examples)
    with pytest.raises(KeyError, match="x"):
        predict({"y": X[:1]})
    assert predict({"x": X[:1].tolist()})["outputs"].shape == (1, 3)
