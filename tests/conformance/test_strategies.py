"""The conformance set: the same weights, skips and metrics under every strategy."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import strategies
from strategies import CASES, STEPS

pytestmark = pytest.mark.slow
WORKERS_SECS = 400  # the longest that the workers' whole set may take


def one_device():
    return tf.distribute.OneDeviceStrategy("CPU:0")


@functools.cache
def of_one_device(*case):
    return strategies.train(*case, one_device())


@functools.cache
def reference(kind):
    """In float64, on one device."""
    return strategies.train(kind, "float64", 1, one_device())


def vector(result, kind="weight"):
    return np.concatenate([
        value.ravel().astype(np.float64) for key, value in sorted(result.items())
        if key.startswith(kind)])


def error(result, kind):
    return {part: np.linalg.norm(vector(result, part) - vector(reference(kind), part))
            / np.linalg.norm(vector(reference(kind), part))
            for part in ("weight", "average")}


def assert_same(result, case):
    """Checks an outcome against one device, as far as the design says equal."""
    kind, policy, _ = case
    expected = of_one_device(kind, policy, 1)
    assert result.keys() == expected.keys()
    for key in result:
        if key.startswith(("applied", "skipped", "step", "scale")):
            np.testing.assert_array_equal(result[key], expected[key], err_msg=key)
    if kind == "Poisoned":
        assert result["skipped_steps "] >= 3
        assert result["applied_steps "] == STEPS - result["skipped_steps "]
    tolerance = {"float32": 2e-6}.get(policy, 0.01)
    for key in ("train loss", "validation loss"):
        np.testing.assert_allclose(
            result[key], expected[key], rtol=tolerance, err_msg=key)
    if policy == "float32":
        for key in expected:
            np.testing.assert_allclose(
                result[key], expected[key], rtol=1e-5, atol=1e-6, err_msg=key)
    elif kind != "Poisoned":
        got, one = error(result, kind), error(expected, kind)
        for part in got:
            assert 1e-6 < one[part] < 0.02 and got[part] <= 2 * one[part], part


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_devices_of_one_process_equal_one(case, replicas, strategy_of):
    assert_same(strategies.train(*case, strategy_of(replicas)), case)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """The folder with all that two workers have trained."""
    folder = tmp_path_factory.mktemp("workers")
    strategies.save(folder / "one_device", one_device())
    strategies.save(folder / "mirrored", tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()))
    command = [sys.executable, "-m", "mpl.launch.local", "--workers=2", "--",
               sys.executable, strategies.__file__, str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=WORKERS_SECS, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-5000:]
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_workers_equal_one_device(case, workers):
    result = dict(np.load(workers / f"{'-'.join(map(str, case))}.npz"))
    assert_same(result, case)


@pytest.mark.parametrize("saved", ["mirrored", "one_device"])
def test_workers_restore_what_others_saved(saved, workers):
    result = dict(np.load(workers / f"restored {saved}.npz"))
    expected = strategies.restored(workers / saved, one_device())
    assert int(result["step"]) == STEPS + 3
    for key in expected:
        np.testing.assert_allclose(
            result[key], expected[key], rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("replicas", [1, 2])
def test_others_restore_what_workers_saved(replicas, workers, strategy_of):
    result = strategies.restored(workers / "multi_worker", strategy_of(replicas))
    expected = strategies.restored(workers / "one_device", one_device())
    for key in expected:
        np.testing.assert_allclose(
            result[key], expected[key], rtol=1e-5, atol=1e-6, err_msg=key)
