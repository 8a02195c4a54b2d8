"""LARS moves weights as its paper says, under any strategy."""

import keras
import numpy as np
import pytest

import mpl
from experiments.optimizers.lars import Lars

EXAMPLES, INPUTS, OUTPUTS, STEPS = 8, 3, 4, 4
SETTINGS = dict(momentum=0.9, l2=0.02, coefficient=0.1)
RATE = 0.5
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(EXAMPLES, INPUTS)).astype(np.float32)
C = RANDOM.normal(size=(EXAMPLES, OUTPUTS)).astype(np.float32)
KERNEL = RANDOM.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
BIAS = RANDOM.normal(size=OUTPUTS).astype(np.float32)


class Linear(mpl.Experiment):
    """Σ c · (x W + b), whose gradient is the same wherever the weights are."""

    start = KERNEL, BIAS

    def build_data(self, split, context):
        return {"x": X, "c": C} if split == "train" else None

    def build_model(self):
        model = keras.Sequential([keras.Input((INPUTS,)), keras.layers.Dense(OUTPUTS)])
        model.set_weights(self.start)
        return model

    def build_optimizer(self, config):
        return Lars(RATE, **SETTINGS)

    def loss(self, batch, training):
        outputs = mpl.cast_floating(self.model(batch["x"]), "float32")
        return mpl.LossOutput(
            keras.ops.sum(outputs * batch["c"], -1), batch["weight"])


def reference(kernel, bias, steps):
    """The rule in float64, with the velocities."""
    gradient = X.T.astype(np.float64) @ C / EXAMPLES
    weights = [kernel.astype(np.float64), bias.astype(np.float64)]
    velocities = [np.zeros_like(weight) for weight in weights]
    for _ in range(steps):
        size, slope = np.linalg.norm(weights[0]), np.linalg.norm(gradient)
        trust = 1.0
        if size > 0:
            trust = SETTINGS["coefficient"] * size / (slope + SETTINGS["l2"] * size)
        moves = [trust * (gradient + SETTINGS["l2"] * weights[0]), C.mean(0)]
        for number, move in enumerate(moves):
            velocities[number] = SETTINGS["momentum"] * velocities[number] + RATE * move
            weights[number] = weights[number] - velocities[number]
    return weights, velocities


def trained(kind, strategy, steps=STEPS, **settings):
    experiment = kind()
    experiment.setup(mpl.RunConfig(
        global_batch_size=EXAMPLES, train_steps=100, **settings), strategy)
    experiment.trainer.train(steps)
    return experiment


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy, tolerance", [
    ("float32", 1e-5), ("mixed_bfloat16", 2e-2), ("mixed_float16", 2e-3)])
def test_it_follows_the_paper(policy, tolerance, replicas, strategy_of):
    experiment = trained(Linear, strategy_of(replicas), policy=policy)
    (kernel, bias), velocities = reference(KERNEL, BIAS, STEPS)
    np.testing.assert_allclose(experiment.model.weights[0], kernel, atol=tolerance)
    np.testing.assert_allclose(experiment.model.weights[1], bias, atol=tolerance)
    slots = {key: value.numpy() for key, value in
             experiment.optimizer.export_slots().items() if "velocity" in key}
    assert len(slots) == 2
    for value in slots.values():
        want = velocities[0 if value.ndim == 2 else 1]
        np.testing.assert_allclose(value, want, atol=tolerance)
    assert np.abs(kernel - KERNEL).max() > 0.05  # it moved


def test_a_kernel_of_zeros_moves_by_its_gradient(strategy_of):
    class Zeros(Linear):
        start = 0 * KERNEL, 0 * BIAS

    experiment = trained(Zeros, strategy_of(1), 1, policy="float32")
    np.testing.assert_allclose(
        experiment.model.weights[0], -RATE * (X.T @ C) / EXAMPLES, rtol=1e-5)
    experiment.trainer.train(2)
    np.testing.assert_allclose(
        experiment.model.weights[0], reference(0 * KERNEL, 0 * BIAS, 3)[0][0],
        rtol=1e-4)


def test_a_kernel_without_gradient_stays(strategy_of):
    class Still(Linear):
        def loss(self, batch, training):
            output = super().loss(batch, training)
            return output._replace(per_example=0 * output.per_example)

        def build_optimizer(self, config):
            return Lars(RATE)

    experiment = trained(Still, strategy_of(1), policy="float32")
    np.testing.assert_array_equal(experiment.model.weights[0], KERNEL)


def test_each_kernel_has_a_variable_of_its_own(strategy_of):
    """Packed into one buffer they would have one norm."""
    experiment = trained(Linear, strategy_of(1), policy="float32")
    assert [bucket.kind.packed for bucket in experiment.weights.buckets] == [False] * 2


def test_flags_know_its_name(strategy_of):
    experiment = Linear()
    experiment.build_optimizer = lambda config: mpl.Experiment.build_optimizer(
        experiment, config)
    experiment.setup(mpl.RunConfig(
        global_batch_size=EXAMPLES, train_steps=10, optimizer="lars",
        lr_schedule="cosine", warmup_steps=2, policy="float32"), strategy_of(1))
    assert isinstance(experiment.optimizer.inner, Lars)
    experiment.trainer.train(2)
    assert float(experiment.optimizer.learning_rate) == pytest.approx(1e-3)


def test_its_settings_make_it_anew():
    first = Lars(0.3, momentum=0.8, l2=0.1, coefficient=0.2)
    again = Lars.from_config(first.get_config())
    assert (again.momentum, again.l2, again.coefficient) == (0.8, 0.1, 0.2)
    assert float(again.learning_rate) == pytest.approx(0.3)
