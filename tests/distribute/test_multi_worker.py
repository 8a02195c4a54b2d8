"""Real processes that train together: what is written, what happens when one fails."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import mpl
from mpl.launch import local

pytestmark = pytest.mark.slow

FAULTY = str(pathlib.Path(__file__).with_name("faulty.py"))
MARK = 10**6 + os.getpid()  # of this test's processes
SECS = 200  # after which a cluster that hangs fails its test


def start(workdir, *flags, fault="", workers=2, grace_secs=120):
    """Runs a cluster to its end; returns exit code, output, seconds since the fault."""
    command = [sys.executable, "-m", "mpl.launch.local", f"--workers={workers}",
               f"--grace_secs={grace_secs}", "--", sys.executable, FAULTY, *flags,
               f"--summary_every_steps={MARK}"]
    command += [f"--workdir={workdir}"] * (workdir is not None)
    done = subprocess.run(
        command, timeout=SECS, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FAULT": fault})
    ended = time.time()
    left = subprocess.run(["pgrep", "-f", f"{FAULTY} .*{MARK}"], text=True,
                          stdout=subprocess.PIPE).stdout.split()
    assert not left
    at = re.search(r"fault at (.*)", done.stdout)
    return done.returncode, done.stdout, ended - float(at[1]) if at else None


def final(output):
    """The result line, which the chief alone prints."""
    line, = re.findall(r"^\[worker 0\] (faulty: loss .*)$", output, re.M)
    return line


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "undisturbed"
    code, output, _ = start(workdir, "--mode=all")
    assert code == 0, output
    return workdir, output


def test_the_chief_alone_writes_and_reports(undisturbed):
    workdir, output = undisturbed
    assert len(re.findall(r"MultiWorkerMirroredStrategy, 2 replicas", output)) == 2
    lines = [json.loads(line) for line in
             (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert steps == list(range(5, 45, 5))
    assert [line["step"] for line in lines if line["split"] == "test"] == [40]
    assert not re.findall(r"\[worker 1\] (step|Files|Exported|Pred|faulty)", output)
    assert final(output)


def test_the_chief_alone_exports_and_predicts(undisturbed, tmp_path):
    """Of a file that another process writes, faulty.py makes an error."""
    workdir, output = undisturbed
    assert {path.name for path in workdir.iterdir()} == {
        "checkpoints", "export", "flagfile.txt", "goodput.json", "lock",
        "metrics.jsonl", "predictions.npz", "summaries"}
    count, = re.findall(r"^\[worker 0\] Predictions for (\d+) examples", output, re.M)
    predicted = np.load(workdir / "predictions.npz")["predictions"]
    assert int(count) == len(predicted) == 50
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    for mode, name in ("export", "model"), ("predict", "predicted.npz"):
        code, output, _ = start(
            workdir, f"--mode={mode}", f"--output={tmp_path / name}")
        assert code == 0, output
        assert len(re.findall(f" {tmp_path / name}", output)) == 1
    for path in workdir / "export", tmp_path / "model":
        np.testing.assert_allclose(
            mpl.load_predictor(path)({"x": x}), predicted, rtol=1e-5)
    again = np.load(tmp_path / "predicted.npz")["predictions"]
    np.testing.assert_array_equal(again, predicted)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "predicted.npz"}


# In one run after another, at which step, and the last checkpoint by then.
FAULTS = [("train", 7, 10), ("eval", 20, 15), ("save", 25, 20), ("stop", 32, 35)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_is_named_and_nothing_is_lost(rank, undisturbed, tmp_path):
    found = 0
    for phase, step, saved in FAULTS:
        stops = phase == "stop"  # and is killed after the grace
        code, output, secs = start(tmp_path / "run", fault=f"{phase}:{rank}:{step}",
                                   grace_secs=1 if stops else 120)
        assert (code, secs < 120) == (1 if stops else 128 + 9, True), output
        how = "nothing was heard of it for 60 s" if stops else "its process has ended"
        assert re.search(
            rf"^\[worker {1 - rank}\] worker {rank} \(127.0.0.1:\d+\) is gone: {how}\."
            rf"\n(.*\n)*\[worker {1 - rank}\] Run the same command again", output, re.M)
        assert not found or f"Going on at step {found} of 40" in output
        # The chief ends a save that is under way when another process dies.
        found = step if (phase, rank) == ("save", 1) else saved
    code, output, _ = start(tmp_path / "run")
    assert code == 0, output
    assert f"Going on at step {found} of 40" in output
    assert final(output) == final(undisturbed[1])


def test_who_dies_before_the_collectives_start_holds_nobody_up(tmp_path):
    """TensorFlow waits there with Python's lock held."""
    code, output, secs = start(
        tmp_path / "run", "--cluster_timeout=15", fault="start:1:")
    assert code == 128 + 9 and secs < 90
    assert re.search(r"Waiting up to 15 s for worker 1 \(127", output)
    assert re.search(r"^\[worker 0\] Timeout \(0:00:15\)!", output, re.M)


def test_each_process_reports_its_devices():
    code, output, _ = start(None, "--device_report", "--strategy=multi_worker_mirrored")
    assert code == 0
    assert len(re.findall(r"^\[worker \d\] Strategy  OneDevice", output, re.M)) == 2


def test_a_failure_of_one_ends_the_others_with_its_name(tmp_path):
    code, output, secs = start(tmp_path / "run", fault="raise:1:5")
    assert code == 1 and secs < 120
    assert re.search(r"^\[worker 0\] worker 1 .* failed: ValueError: told to fail\.$",
                     output, re.M)


@pytest.mark.parametrize("fault, fact", [
    ("data:1:", "train data, first_batch_crc32"), ("code:1:", "code of the experiment"),
    ("flags:1:", "--clip_norm")])
def test_workers_that_differ_are_found_before_they_train(fault, fact, tmp_path):
    code, output, _ = start(tmp_path / "run", fault=fault)
    assert code == 1
    errors = re.findall(rf"^\[worker (\d)\] `{fact}` differs: worker 0 ", output, re.M)
    assert sorted(errors) == ["0", "1"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_cluster_needs_a_folder():
    code, output, _ = start(None)
    assert code == 1
    assert re.search(r"^\[worker \d\] `workdir` is not set, and all", output, re.M)


def test_who_never_starts_is_named(tmp_path):
    first, second = (f"127.0.0.1:{port}" for port in local.free_ports(2))
    config = {"cluster": {"worker": [first, second]},
              "task": {"type": "worker", "index": 0}}
    done = subprocess.run(
        [sys.executable, FAULTY, f"--workdir={tmp_path}", "--cluster_timeout=2"],
        timeout=SECS, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path),
             "TF_CONFIG": json.dumps(config)})
    assert done.returncode == 1
    assert f"worker 1 ({second}) did not start within 2 s.\n" in done.stdout
