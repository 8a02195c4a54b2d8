"""AUC and sensitivity at a specificity, against hand-made and counted values."""

import numpy as np
import pytest
import tensorflow as tf

from experiments.models import ranking


def value(metric, label, probability, weight=None):
    label, probability = (np.asarray(x, np.float32) for x in (label, probability))
    if label.ndim == 1:
        label, probability = label[:, np.newaxis], probability[:, np.newaxis]
    metric.update_state(label, tf.constant(probability), weight)
    return float(metric.result())


def sensitivity(specificity, labels=1):
    return ranking.SensitivityAtSpecificity(labels, specificity)


LABEL, PROBABILITY = [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]


def test_auc_by_hand():
    assert value(ranking.AUC(1), LABEL, PROBABILITY) == 0.75  # 3 of 4 pairs
    assert value(ranking.AUC(1), LABEL, [0.1, 0.4, 0.4, 0.8]) == 0.875  # a tie: half
    assert value(ranking.AUC(1), LABEL, [0.9, 0.9, 0.2, 0.1]) == 0.0
    # An example of weight 3 is three.
    assert value(ranking.AUC(1), LABEL, PROBABILITY, [3, 1, 1, 1]) == 7 / 8
    assert value(ranking.AUC(1), LABEL, PROBABILITY, [1, 0, 1, 1]) == 1.0


def test_sensitivity_by_hand():
    assert value(sensitivity(0.5), LABEL, PROBABILITY) == 1.0  # from 0.35 on
    assert value(sensitivity(0.6), LABEL, PROBABILITY) == 0.5  # above 0.4
    label = [0] * 10 + [1] * 4
    probability = [*np.arange(10) / 20, 0.2, 0.42, 0.5, 0.6]
    assert value(sensitivity(0.9), label, probability) == 0.75  # one of ten is above
    assert value(sensitivity(0.95), label, probability) == 0.5


def test_confident_scores_do_not_fall_together():
    label = [0, 1, 0, 1]
    assert value(ranking.AUC(1), label, [1e-6, 2e-6, 0.9999, 0.99999]) == 0.75
    assert value(ranking.AUC(1), label, [0.0, 1e-6, 1e-7, 1.0]) == 1.0


def test_labels_are_averaged_and_batches_added():
    label = np.array([[0, 1, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]])
    probability = np.array(
        [[0.1, 0.9, 0.5], [0.4, 0.2, 0.5], [0.35, 0.8, 0.5], [0.8, 0.3, 0.1]])
    metric = ranking.AUC(3)
    value(metric, label[:1], probability[:1])
    # The third label has no positive, and does not count.
    assert value(metric, label[1:], probability[1:]) == (0.75 + 1.0) / 2
    metric.reset_state()
    assert float(metric.result()) == 0.0


@pytest.mark.parametrize("metric", [ranking.AUC(2), sensitivity(0.5, 2)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_rank(metric, bad):
    label = np.array([[0, 0], [1, 1]])
    probability = np.array([[0.1, 0.2], [bad, 0.8]])
    assert np.isnan(value(metric, label, probability))
    assert np.isnan(value(metric, label, [[0.1, 0.2], [0.9, 0.8]]))  # not forgotten
    metric.reset_state()
    assert value(metric, label, [[0.1, 0.2], [0.9, 0.8]]) == 1.0
    metric.reset_state()
    # An example of weight 0 counts nothing, whatever it scores.
    label, probability = np.eye(2)[[0, 1, 0]], [[0.9, 0.2], [0.1, 0.8], [bad, bad]]
    assert value(metric, label, probability, [1, 1, 0]) == 1.0


@pytest.mark.parametrize("specificity", [0.5, 0.9, 0.99])
def test_many_scores_against_counting(specificity):
    random = np.random.default_rng(0)
    label = random.integers(0, 2, [1500, 2])
    odds = random.normal(size=[1500, 2]) * 3 + label * [2, 4]
    probability = (1 / (1 + np.exp(-odds))).astype(np.float32)
    weight = random.integers(0, 3, 1500).astype(np.float32)
    areas, shares = [], []
    for column in range(2):
        score = probability[:, column]
        negative, positive = (
            np.repeat(score[part], weight[part].astype(int))
            for part in (label[:, column] == 0, label[:, column] == 1))
        pairs = np.sign(positive[:, np.newaxis] - negative)
        areas.append((pairs.mean() + 1) / 2)
        allowed = [t for t in np.concatenate([negative, positive, [2.0]])
                   if (negative < t).mean() >= specificity]
        shares.append((positive >= min(allowed)).mean())
    assert value(ranking.AUC(2), label, probability, weight) == pytest.approx(
        np.mean(areas), abs=1e-3)
    assert value(sensitivity(specificity, 2), label, probability, weight) == (
        pytest.approx(np.mean(shares), abs=0.02))


@pytest.mark.parametrize("specificity", [0.5, 0.9, 0.99])
def test_scores_with_ties_as_scikit_learn_has_them(specificity):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    label = random.integers(0, 2, [800, 3])
    odds = (random.normal(size=[800, 3]) * 2 + label * [1, 2, 4]).round(1)
    # Tenths are bins of their own, so that nothing else falls together.
    probability = 1 / (1 + np.exp(-odds.clip(-9, 9)))
    weight = random.integers(0, 4, 800).astype(np.float32)
    areas = metrics.roc_auc_score(
        label, probability, average=None, sample_weight=weight)
    assert (areas < 1).all() and len(np.unique(odds)) < 150
    assert value(ranking.AUC(3), label, probability, weight) == pytest.approx(
        areas.mean(), abs=1e-6)
    shares = []
    for column in range(3):
        false, true, _ = metrics.roc_curve(
            label[:, column], probability[:, column], sample_weight=weight,
            drop_intermediate=False)
        shares.append(true[1 - false >= specificity].max())
    assert value(sensitivity(specificity, 3), label, probability, weight) == (
        pytest.approx(np.mean(shares), abs=1e-6))
