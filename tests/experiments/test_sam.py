"""Sharpness-aware minimisation against NumPy, and what skips a step of it."""

import loops
import numpy as np
import pytest
import tensorflow as tf

from experiments import digits, sam

RHO = 0.5


class Small(sam.Sam):
    def build_model(self):
        return loops.small(4)


class Exploding(Small):
    """The first gradient of a step is multiplied; replicas take theirs in turn."""

    factor, replicas, calls = 1.0, 1, 0

    def loss(self, batch, training):
        output = super().loss(batch, training)
        if training:
            self.calls += 1
            if self.calls <= self.replicas:
                output = loops.exploding(output, self.factor)
        return output


def want(experiment):
    """Returns the update by algorithm 1 of the paper, and the first gradient."""
    x, label = loops.batch_of(experiment)
    weights = loops.weights_of(experiment.model)

    def gradient_at(weights):
        return loops.gradient(
            lambda w: loops.cross_entropy(w, x, label).mean(), weights)

    uphill = gradient_at(weights)
    step = RHO / loops.norm(uphill)
    return gradient_at([w + step * g for w, g in zip(weights, uphill)]), uphill


@pytest.mark.parametrize("replicas, micro_batches", loops.CASES)
def test_a_step_is_that_of_the_paper(replicas, micro_batches, strategy_of):
    experiment = loops.prepared(
        Small, strategy_of(replicas), rho=RHO, accumulate_steps=micro_batches)
    expected, _ = want(experiment)
    got = loops.update(experiment, experiment.model)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=3e-6)


@pytest.mark.parametrize("policy", loops.ROUNDING)
def test_the_second_gradient_is_taken_uphill_in_each_policy(policy, strategy_of):
    experiment = loops.prepared(Small, strategy_of(1), rho=RHO, policy=policy)
    expected, uphill = want(experiment)
    got = loops.update(experiment, experiment.model)
    assert loops.error(got, expected) < loops.ROUNDING[policy]
    assert loops.error(uphill, expected) > 0.1  # without the perturbation


def test_a_perturbation_below_a_unit_of_the_cast_weights_acts(strategy_of):
    """In bfloat16 weights from 1 to 2 have units of 2⁻⁷; 2⁻¹¹ moves one in 16."""
    class Wide(Small):
        def build_model(self):
            model, random = loops.small(64), np.random.default_rng(0)
            model.set_weights([random.uniform(1, 2, value.shape)
                               for value in model.get_weights()])
            return model

    def wide(tensor):
        return tf.cast(tensor, tf.float32).numpy()

    weights = loops.prepared(Wide, strategy_of(1), policy="mixed_bfloat16").weights
    there = weights.cast([bucket.variable + 2.0**-11 for bucket in weights.buckets])
    cast = [(old, new) for old, new in zip(weights.cast(), there)
            if old.dtype == tf.bfloat16]
    assert cast
    for old, new in cast:
        used = wide(old) > 0.5  # and not padding
        moved = (wide(new) - wide(old))[used]
        assert set(np.abs(moved)) == {0.0, 2.0**-7}
        np.testing.assert_allclose(moved.mean(), 2.0**-11, rtol=0.3)
        late = old + tf.constant(2.0**-11, tf.bfloat16)
        np.testing.assert_array_equal(wide(late)[used], wide(old)[used])


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("factor", [np.inf, np.nan, 1e30])
def test_a_first_gradient_that_is_not_finite_skips_the_step(
    factor, replicas, strategy_of
):
    """With 1e30 its square alone is not: all is finite at the weights it leads to."""
    experiment = loops.prepared(Exploding, strategy_of(replicas), loss_scale="dynamic")
    experiment.factor, experiment.replicas = factor, replicas
    before = loops.bits(experiment)
    experiment.trainer.train(1)
    assert experiment.calls == 2 * replicas
    assert loops.is_skipped(experiment, before)


def test_of_the_first_gradient_the_direction_counts_alone(strategy_of):
    experiment = loops.prepared(Exploding, strategy_of(1), rho=RHO)
    experiment.factor = 1000.0
    expected, _ = want(experiment)
    got = loops.update(experiment, experiment.model)
    assert experiment.train_report()["applied_steps"] == 1
    assert loops.error(got, expected) < 1e-4


def test_a_batch_of_padding_alone_moves_nothing(strategy_of):
    class Padding(Small):
        def build_data(self, split, context):
            examples = super().build_data(split, context)
            return {**examples, "weight": np.zeros(len(examples["label"]), np.float32)}

    experiment = loops.prepared(Padding, strategy_of(1), loss_scale="dynamic")
    before = loops.bits(experiment)
    experiment.trainer.train(1)
    for old, new in zip(before, loops.bits(experiment), strict=True):
        np.testing.assert_array_equal(new, old)
    report = experiment.train_report()
    assert (report["skipped_steps"], report["loss_scale"]) == (0, 2.0**15)


@pytest.mark.slow
def test_both_gradients_drop_the_same_units(strategy_of):
    """With ρ = 0 the loop is mpl's own, dropout included."""
    updates = []
    for kind, settings in ((digits.Digits, {}), (sam.Sam, {"rho": 0.0})):
        experiment = loops.prepared(
            kind, strategy_of(1), hidden=8, learning_rate=0.1, **settings)
        updates.append(loops.update(experiment, experiment.model, steps=2))
    for ours, theirs in zip(*updates, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_it_learns(tmp_path):
    assert loops.trained(sam.Sam, tmp_path)["accuracy"] > 0.95
