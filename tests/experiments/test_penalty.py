"""The gradient penalty against NumPy, in each policy."""

import loops
import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments import digits, penalty

FACTOR = 100.0


class Small(penalty.Penalty):
    def build_model(self):
        return loops.small(4)


def want(experiment):
    """Returns the gradient of the penalised loss, and that without the penalty."""
    x, label = loops.batch_of(experiment)

    def loss(weights, factor=FACTOR):
        squares = ((loops.slopes(weights, x, label) / 16) ** 2).sum(1)
        return (loops.cross_entropy(weights, x, label) + factor * squares).mean()

    weights = loops.weights_of(experiment.model)
    return loops.gradient(loss, weights), loops.gradient(
        lambda w: loss(w, 0.0), weights)


def test_the_slopes_of_the_reference_are_those_of_its_loss():
    random = np.random.default_rng(0)
    weights = [random.normal(size=shape) for shape in ((64, 3), (3,), (3, 10), (10,))]
    x, label = random.uniform(size=(2, 64)), np.array([3, 7])
    found, = loops.gradient(
        lambda part: loops.cross_entropy(weights, *part, label).sum(), [x])
    np.testing.assert_allclose(loops.slopes(weights, x, label), found, atol=1e-8)


@pytest.mark.parametrize("replicas, micro_batches", loops.CASES)
def test_a_step_is_that_of_the_penalised_loss(replicas, micro_batches, strategy_of):
    experiment = loops.prepared(Small, strategy_of(replicas), penalty=FACTOR,
                                accumulate_steps=micro_batches)
    expected, _ = want(experiment)
    got = loops.update(experiment, experiment.model)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=3e-6)


@pytest.mark.parametrize("policy", loops.ROUNDING)
def test_the_penalty_acts_in_each_policy(policy, strategy_of):
    experiment = loops.prepared(
        Small, strategy_of(1), penalty=FACTOR, policy=policy)
    expected, without = want(experiment)
    got = loops.update(experiment, experiment.model)
    assert loops.error(got, expected) < loops.ROUNDING[policy]
    assert loops.error(without, expected) > 0.1


@pytest.mark.parametrize("policy", loops.ROUNDING)
def test_the_metric_is_the_squared_length_of_the_gradient(policy, strategy_of):
    experiment = loops.prepared(Small, strategy_of(1), policy=policy)
    x, label = loops.batch_of(experiment)
    found = loops.slopes(loops.weights_of(experiment.model), x, label) / 16
    experiment.trainer.train(1)
    np.testing.assert_allclose(
        float(experiment.train_report()["squared_slope"]),
        (found**2).sum(1).mean(), rtol=2 * loops.ROUNDING[policy])


def test_evaluation_has_the_loss_of_the_labels_alone(strategy_of):
    experiment = loops.prepared(Small, strategy_of(1), penalty=FACTOR)
    images = experiment.build_data(
        "validation", mpl.DataContext(None, 64, 0, None))
    losses = loops.cross_entropy(
        loops.weights_of(experiment.model), images["image"].reshape(-1, 64) / 16,
        images["label"])
    found = experiment.evaluators["validation"].evaluate(-1)
    np.testing.assert_allclose(float(found["loss"]), losses.mean(), rtol=1e-5)
    assert set(found) == {"loss", "accuracy", "squared_slope"}


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_inner_gradient_that_is_not_finite_skips_the_step(replicas, strategy_of):
    @tf.custom_gradient
    def explode(image):
        return tf.identity(image), lambda upstream: upstream * np.inf

    class Exploding(digits.Digits):
        def loss(self, batch, training):  # only the inner pass goes back to images
            return super().loss({**batch, "image": explode(batch["image"])}, training)

    class Inner(Small, Exploding):
        pass

    experiment = loops.prepared(Inner, strategy_of(replicas), policy="mixed_float16")
    before = loops.bits(experiment)
    experiment.trainer.train(1)
    assert loops.is_skipped(experiment, before)


@pytest.mark.slow
def test_it_learns_and_is_flatter(tmp_path):
    with_penalty, without = (
        loops.trained(penalty.Penalty, tmp_path / str(factor), penalty=factor)
        for factor in (10.0, 0.0))
    assert min(with_penalty["accuracy"], without["accuracy"]) > 0.95
    assert with_penalty["squared_slope"] < 0.7 * without["squared_slope"]
