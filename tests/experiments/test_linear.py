"""The line is found, as a loop in NumPy finds it."""

import numpy as np
import pytest

import mpl
from experiments.linear import Config, Linear
from whole_runs import POLICIES, predictions, resumed, run, two_steps


def descended(steps):
    """Returns w and b after gradient descent in float64."""
    x, w, b = np.arange(1.0, 5), float(np.float32(0.3)), float(np.float32(-0.3))
    for _ in range(steps):
        error = w * x + b - 2 * x
        w, b = w - 0.05 * np.mean(2 * error * x), b - 0.05 * np.mean(2 * error)
    return w, b


def trained(experiment):
    return tuple(float(v.numpy()) for v in (experiment.model.w, experiment.model.b))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_steps(policy, replicas, strategy_of):
    experiment = two_steps(Linear, strategy_of(replicas), policy=policy)
    rtol = {"float32": 1e-6, "mixed_bfloat16": 0.03, "mixed_float16": 0.004}[policy]
    np.testing.assert_allclose(trained(experiment), descended(2), rtol=rtol)


def test_in_float16_steps_are_skipped_until_the_scale_fits(strategy_of):
    """27 × 2¹⁵, of the first slope, is infinite, and 27 × 2¹¹ is not."""
    experiment = Linear()
    experiment.setup(Config(policy="mixed_float16"), strategy_of(1))
    experiment.trainer.train(4)
    assert trained(experiment) == (np.float32(0.3), np.float32(-0.3))
    assert experiment.train_report()["skipped_steps"] == 4
    experiment.trainer.train(2)
    np.testing.assert_allclose(trained(experiment), descended(2), rtol=0.004)


def test_the_first_step_by_hand(strategy_of):
    """Errors −2, −3.7, −5.4, −7.1: the slopes are −27 and −9.1."""
    experiment = Linear()
    experiment.setup(Config(), strategy_of(1))
    experiment.trainer.train(1)
    np.testing.assert_allclose(
        trained(experiment), (0.3 + 0.05 * 27, -0.3 + 0.05 * 9.1), rtol=1e-6)
    report = {n: float(v) for n, v in experiment.train_report().items()}
    assert report["loss"] == pytest.approx(24.315, rel=1e-6)
    assert report["error"] == pytest.approx(4.55, rel=1e-6)
    assert report["w"] == pytest.approx(0.3) and report["b"] == pytest.approx(-0.3)


@pytest.mark.parametrize("policy, distance", [
    ("float32", 5e-5), ("mixed_bfloat16", 0.1), ("mixed_float16", 0.02)])
def test_w_becomes_2_and_b_0(policy, distance, tmp_path):
    results = run(Linear, tmp_path, policy=policy)
    np.testing.assert_allclose(descended(1000), (2, 0), atol=1e-5)
    for split in ("validation", "test"):
        assert abs(results[split]["w"] - 2) < distance
        assert abs(results[split]["b"]) < distance
        assert results[split]["error"] < 10 * distance


@pytest.mark.slow
def test_resume_export_predict(tmp_path):
    _, got = resumed(Linear, tmp_path, policy="float32")
    w, b = descended(4)
    np.testing.assert_allclose(got, w * np.arange(7.0, 11) + b, rtol=1e-5)


def test_numbers_of_a_file_are_predicted(tmp_path):
    run(Linear, tmp_path, mode="train")
    (tmp_path / "numbers.txt").write_text("-1\n0.5\n100\n")
    run(Linear, tmp_path, mode="predict", input=str(tmp_path / "numbers.txt"))
    np.testing.assert_allclose(predictions(tmp_path), [-2, 1, 200], atol=1e-2)
    predict = mpl.load_predictor(tmp_path, Linear)
    np.testing.assert_allclose(predict({"x": np.float32([3])}), [6], atol=1e-4)
