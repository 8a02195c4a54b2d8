"""The conformance set: the same weights, skips and metrics under every strategy."""

import faulthandler
import fcntl
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
CLUSTER_SECS = 400  # the longest that a cluster's whole set may take
HANG_SECS = 300  # and a test
# The steps with poison, among the last 20.
SKIPPED = {"Plain": {"": [1, 3, 5, 6, 8, 10, 15]},
           "Gan": {"discriminator": [1, 6, 10, 15], "generator": [3, 5, 8, 10]}}
CLUSTERS = {"workers": ["--workers=2"], "servers": ["--workers=1", "--ps=1"]}


def name_of(case):
    return "-".join(map(str, case))


def one_device():
    return tf.distribute.OneDeviceStrategy("CPU:0")


@pytest.fixture(autouse=True)
def no_hang():
    """Ends the process if a replica waits for another for ever."""
    faulthandler.dump_traceback_later(HANG_SECS, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """A function that has a folder filled once, for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name, fill):
        folder = base / name
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "done").exists():
                folder.mkdir(exist_ok=True)
                fill(folder)
                (folder / "done").touch()
        return folder

    return once


@pytest.fixture(scope="session")
def saved(once):
    """A folder with checkpoints of one process."""

    def fill(folder):
        strategies.save(folder / "one_device", one_device())
        strategies.save(folder / "mirrored", tf.distribute.MirroredStrategy(
            ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()))

    return once("saved", fill)


@pytest.fixture(scope="session")
def of_one_device(once, saved):
    """A function from a case, or from whose checkpoint goes on, to the outcome."""

    @functools.cache
    def outcome_of(*case):
        train, *arguments = strategies.train, *case
        if len(case) == 1:
            train, arguments = strategies.restored, [saved / case[0]]

        def fill(folder):
            np.savez(folder / "outcome.npz", **train(*arguments, one_device()))

        return dict(np.load(once(f"of {name_of(case)}", fill) / "outcome.npz"))

    return outcome_of


@pytest.fixture(scope="session")
def cluster(once, saved):
    """A function from a kind of cluster to a folder with all that it has trained."""

    def folder_of(kind):
        def fill(folder):
            command = [
                sys.executable, "-m", "mpl.launch.local", *CLUSTERS[kind], "--",
                sys.executable, strategies.__file__, str(saved), str(folder)]
            done = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                timeout=CLUSTER_SECS, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT)
            assert done.returncode == 0, done.stdout[-5000:]

        return once(kind, fill)

    return folder_of


def vector(result, kind):
    return np.concatenate([
        value.ravel().astype(np.float64) for key, value in sorted(result.items())
        if key.startswith(kind)])


def errors(result, reference):
    """Returns the relative distance of weights and averages from a reference."""
    pairs = {part: (vector(result, part), vector(reference, part))
             for part in ("weight", "average", "poisoned weight", "poisoned average")}
    return {part: np.linalg.norm(got - want) / np.linalg.norm(want)
            for part, (got, want) in pairs.items()}


def assert_close(result, expected):
    assert result.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(
            result[key], expected[key], rtol=1e-5, atol=1e-6, err_msg=key)


def assert_same(result, case, of_one_device, static_scale=None):
    """Checks an outcome against one device, as far as the design says equal.

    Args:
        static_scale: of mixed_float16; None: it is dynamic.
    """
    kind, policy, _ = case
    expected = of_one_device(kind, policy, 1)
    if policy == "mixed_float16":
        first = static_scale or 2**15
        scales = {"scale": first, "poisoned scale": static_scale or first / 2**7}
        assert scales == {key: result[key] for key in scales}
        expected = expected | scales
    for part, skipped in SKIPPED[kind].items():
        counts = [result[f"{when}{count} {part}"] for when in ("", "poisoned ")
                  for count in ("applied_steps", "skipped_steps")]
        assert counts == [STEPS, 0, 2 * STEPS - len(skipped), len(skipped)]
    assert (result["step"], result["poisoned step"]) == (STEPS, 2 * STEPS)
    for key, value in result.items():
        if policy == "float32":
            # Of 20 steps; the 20 with poison after them amplify rounding.
            tolerance = {"rtol": 1e-5, "atol": 5e-6 if "poison" in key else 1e-6}
        elif key.endswith("examples"):
            tolerance = {"rtol": 1e-6}
        elif key.endswith("loss"):
            tolerance = {"rtol": 0.01}
        else:
            continue
        np.testing.assert_allclose(value, expected[key], **tolerance, err_msg=key)
    if policy != "float32":
        reference = of_one_device(kind, "float64", 1)
        got, one = errors(result, reference), errors(expected, reference)
        for part in got:
            assert 1e-6 < one[part] < 0.02 and got[part] <= 2 * one[part], part


def test_every_replica_is_poisoned_alone():
    batches = strategies.poisoned().dataset(STEPS).take(STEPS)
    poison = np.stack([batch["poison"] for batch in batches.as_numpy_iterator()])
    bad = {"": poison != 0, "discriminator": poison > 0, "generator": poison < 0}
    steps = {part: list(np.flatnonzero(where.any(1))) for part, where in bad.items()}
    assert {part: steps[part] for part in SKIPPED["Gan"]} == SKIPPED["Gan"]
    assert steps[""] == SKIPPED["Plain"][""]
    alone = [int(step[0]) for step in map(np.flatnonzero, poison) if len(step) == 1]
    assert {row // 4 for row in alone} == {0, 1, 2, 3}  # of four


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_one_device(case, of_one_device):
    assert_same(of_one_device(*case), case, of_one_device)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("replicas", [2, 4])
def test_devices_of_one_process_equal_one(case, replicas, strategy_of, of_one_device):
    result = strategies.train(*case, strategy_of(replicas))
    assert_same(result, case, of_one_device)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_two_workers_equal_one_device(case, cluster, of_one_device):
    result = dict(np.load(cluster("workers") / f"{name_of(case)}.npz"))
    assert_same(result, case, of_one_device)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_worker_of_servers_equals_one_device(case, cluster, of_one_device):
    result = dict(np.load(cluster("servers") / f"{name_of(case)}.npz"))
    assert_same(result, case, of_one_device, static_scale=1024)


@pytest.mark.parametrize("kind", CLUSTERS)
@pytest.mark.parametrize("by", ["mirrored", "one_device"])
def test_clusters_restore_what_others_saved(by, kind, cluster, of_one_device):
    result = dict(np.load(cluster(kind) / f"restored {by}.npz"))
    assert result["step"] == STEPS + 3
    assert_close(result, of_one_device(by))


@pytest.mark.parametrize("kind, replicas", [("workers", 1), ("workers", 2),
                                            ("servers", 1)])
def test_others_restore_what_clusters_saved(
    kind, replicas, cluster, strategy_of, of_one_device
):
    result = strategies.restored(cluster(kind) / "saved", strategy_of(replicas))
    assert_close(result, of_one_device("one_device"))
