"""Distillation against NumPy, and that both models are updated or none."""

import loops
import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments import distill

HEAT, SHARE = 3.0, 0.75


class Small(distill.Distill):
    def build_model(self):
        return {"teacher": loops.small(5), "student": loops.small(3)}


def prepared(kind, strategy, **settings):
    return loops.prepared(
        kind, strategy, **{"given": 1, "temperature": HEAT, "soft_share": SHARE,
                           **settings})


def want(experiment):
    """Returns the updates of both models."""
    x, label = loops.batch_of(experiment)
    given = next(iter(experiment.pipelines["train"].dataset()))["given"].numpy()
    assert 0 < given.mean() and all(given) == (experiment.config.given == 1)
    teacher, student = (loops.weights_of(experiment.model[name])
                        for name in ("teacher", "student"))
    targets = np.exp(loops.log_softmax(loops.logits(teacher, x) / HEAT))

    def loss(weights):
        soft = -(targets * loops.log_softmax(loops.logits(weights, x) / HEAT)).sum(1)
        hard = loops.cross_entropy(weights, x, label)
        return (given * ((1 - SHARE) * hard + SHARE * HEAT**2 * soft)).mean()

    return {
        "teacher": loops.gradient(
            lambda w: loops.cross_entropy(w, x, label).mean(), teacher),
        "student": loops.gradient(loss, student)}


def updates(experiment):
    before = {name: loops.weights_of(model) for name, model in experiment.model.items()}
    experiment.trainer.train(1)
    return {name: [old - new for old, new in zip(before[name], loops.weights_of(model))]
            for name, model in experiment.model.items()}


@pytest.mark.parametrize("replicas, given", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_step_is_that_of_the_paper(replicas, given, strategy_of):
    experiment = prepared(Small, strategy_of(replicas), given=given)
    expected = want(experiment)
    got = updates(experiment)
    for name in ("teacher", "student"):
        for ours, theirs in zip(got[name], expected[name], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("policy", loops.ROUNDING)
def test_a_step_in_each_policy(policy, strategy_of):
    experiment = prepared(Small, strategy_of(1), policy=policy)
    expected = want(experiment)
    got = updates(experiment)
    for name in ("teacher", "student"):
        assert loops.error(got[name], expected[name]) < loops.ROUNDING[policy]


@pytest.mark.parametrize("bad", ["teacher", "student"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_both_models_are_updated_or_none(replicas, bad, strategy_of):
    class Exploding(Small):
        def loss(self, batch, training, name="student"):
            output = super().loss(batch, training, name)
            explodes = training and name == bad
            return loops.exploding(output, np.inf) if explodes else output

    experiment = prepared(Exploding, strategy_of(replicas), policy="mixed_float16")
    before = loops.bits(experiment)
    experiment.trainer.train(1)
    assert loops.is_skipped(experiment, before)


def test_evaluation_is_the_students_by_the_labels_alone(strategy_of):
    experiment = prepared(Small, strategy_of(1))
    images = experiment.build_data(
        "validation", mpl.DataContext(None, 64, 0, None))
    losses = loops.cross_entropy(
        loops.weights_of(experiment.model["student"]),
        images["image"].reshape(-1, 64) / 16, images["label"])
    found = experiment.evaluators["validation"].evaluate(-1)
    np.testing.assert_allclose(float(found["loss"]), losses.mean(), rtol=1e-5)


@pytest.mark.slow
def test_the_teacher_drops_nothing_where_it_teaches(strategy_of):
    class Seen(distill.Distill):
        def loss(self, batch, training, name="student"):
            if "targets" in batch:
                self.seen.assign(batch["targets"])
            return super().loss(batch, training, name)

    experiment = prepared(Seen, strategy_of(1), hidden=8)
    experiment.seen = tf.Variable(tf.zeros([16, 10]), trainable=False)
    batch = next(iter(experiment.pipelines["train"].dataset()))
    expected = experiment.model["teacher"](batch["image"], training=False)
    experiment.trainer.train(1)
    np.testing.assert_allclose(experiment.seen.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_learns(tmp_path):
    # Seeds 0 to 3: 0.903 to 0.933; untrained: 0.07.
    assert loops.trained(
        distill.Distill, tmp_path, train_epochs=30, eval_every_epochs=30
    )["accuracy"] > 0.88


@pytest.mark.slow
def test_it_learns_of_the_teacher_alone(tmp_path):
    # Seeds 0 to 2: 0.78 to 0.86; only targets can tell it a class.
    assert loops.trained(
        distill.Distill, tmp_path, train_epochs=8, eval_every_epochs=8, given=1,
        soft_share=1.0)["accuracy"] > 0.65
