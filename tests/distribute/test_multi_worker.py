"""Real processes that train together: what is written, what happens when one fails."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from mpl.launch import local

pytestmark = pytest.mark.slow

FAULTY = str(pathlib.Path(__file__).with_name("faulty.py"))
MARK = 10**6 + os.getpid()  # of this test's processes
SECS = 200  # after which a cluster that hangs fails its test


def start(workdir, *flags, fault="", workers=2, grace_secs=120):
    """Runs a cluster to its end; returns exit code, output, seconds."""
    command = [sys.executable, "-m", "mpl.launch.local", f"--workers={workers}",
               f"--grace_secs={grace_secs}", "--", sys.executable, FAULTY, *flags,
               f"--summary_every_steps={MARK}"]
    command += [f"--workdir={workdir}"] * (workdir is not None)
    began = time.monotonic()
    done = subprocess.run(
        command, timeout=SECS, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FAULT": fault})
    left = subprocess.run(["pgrep", "-f", f"{FAULTY} .*{MARK}"], text=True,
                          stdout=subprocess.PIPE).stdout.split()
    assert not left
    return done.returncode, done.stdout, time.monotonic() - began


def final(output):
    """The result line, which the chief alone prints."""
    line, = re.findall(r"^\[worker 0\] (faulty: loss .*)$", output, re.M)
    return line


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "undisturbed"
    code, output, _ = start(workdir)
    assert code == 0, output
    return workdir, output


def test_the_chief_alone_writes_and_reports(undisturbed):
    workdir, output = undisturbed
    assert len(re.findall(r"MultiWorkerMirroredStrategy, 2 replicas", output)) == 2
    steps = [json.loads(line)["step"] for line in
             (workdir / "metrics.jsonl").read_text().splitlines()
             if json.loads(line).get("split") == "train"]
    assert steps == list(range(5, 45, 5))
    assert not re.findall(r"\[worker 1\] (step|Files|faulty)", output)
    assert final(output)


LAST = {"train:1:12": 15, "train:0:12": 15, "eval:1:20": 15, "save:0:25": 20}


@pytest.mark.parametrize("fault", LAST)
def test_a_killed_process_is_named_and_nothing_is_lost(fault, undisturbed, tmp_path):
    phase, rank, step = fault.split(":")
    code, output, secs = start(tmp_path / "run", fault=fault)
    assert code == 128 + 9 and secs < 120
    other = 1 - int(rank)
    assert re.search(
        rf"^\[worker {other}\] worker {rank} \(127.0.0.1:\d+\) is gone: its process "
        r"has ended\.\n(.*\n)*\[worker \d\] Run the same command again", output, re.M)
    code, output, _ = start(tmp_path / "run")
    assert code == 0, output
    assert re.search(r"Going on at step (\d+) of 40", output)[1] == str(LAST[fault])
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
