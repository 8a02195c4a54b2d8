"""SIGTERM to real processes, wherever they are."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
RUN = ROOT / "tests" / "launch" / "preempted_run.py"
LAUNCHER = ["-m", "mpl.launch.local", "--workers=2", "--", sys.executable]


@contextlib.contextmanager
def started(folder, *flags, launcher=(), limit_secs=120, **environ):
    """Starts the program with its output in a pipe; leaves no process."""
    process = subprocess.Popen(
        [sys.executable, *launcher, str(RUN), f"--workdir={folder}", *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={
            **os.environ, "PYTHONPATH": str(ROOT), "TF_NUM_INTRAOP_THREADS": "1",
            "PYTHONUNBUFFERED": "1", **environ})
    timer = threading.Timer(limit_secs, process.kill)  # and so reading ends
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
        left = subprocess.run(["pgrep", "-f", str(folder)], stdout=subprocess.PIPE)
        assert left.stdout == b""


def read_until(process, text, times=1):
    """Returns the lines up to and with the n-th that holds a text."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        times -= text in line
        if not times:
            return lines
    pytest.fail(f"{text!r} was not seen:\n" + "\n".join(lines))


def finished(folder, *flags, **environ):
    with started(folder, *flags, **environ) as process:
        output = process.stdout.read()
        assert process.wait() == 0, output
    return output.splitlines()


def state(folder, step=20):
    """What the last checkpoint holds, but the number of saves."""
    assert (folder / "checkpoints" / f"ckpt-{step}.commit").exists()
    reader = tf.train.load_checkpoint(str(folder / "checkpoints" / f"ckpt-{step}"))
    return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()
            if "save_counter" not in key and key != "_CHECKPOINTABLE_OBJECT_GRAPH"}


def recorded(folder):
    """The lines of metrics.jsonl, without times and notes."""
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [{name: value for name, value in line.items() if "per_sec" not in name}
            for line in lines if line["split"] != "note"]


def notes(folder):
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [line for line in lines if line["split"] == "note"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, finished(folder, "--mode=all")[-1]


PAUSES = {"train": "0.3", "input": "0.4", "eval": "1", "save": "2", "export": "2",
          "predict": "1"}


@pytest.mark.parametrize("place", PAUSES)
def test_sigterm_saves_and_the_same_command_goes_on(place, undisturbed, tmp_path):
    with started(tmp_path, "--mode=all", AT=place, PAUSE=PAUSES[place]) as process:
        lines = read_until(process, f"at {place}", times=3 if place == "train" else 1)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as `timeout` does: it is one request
        lines += process.stdout.read().splitlines()
        assert process.wait() == 42, "\n".join(lines)
    past, step = lines.count(f"past {place}"), int(lines[-1].split()[-1])
    assert lines[-1] == f"code 42 after step {step}"
    if place == "train":
        assert 3 <= step == past == lines.count("at train") < 10
    elif place == "input":
        assert step == 1 and past >= 8  # a batch
    elif place == "eval":
        assert (step, past, lines.count("at eval")) == (10, 1, 1)
        assert [(line["step"], line["split"]) for line in recorded(tmp_path)] == [
            (10, "train")]
    elif place == "save":
        assert 10 <= step <= 20 and past == lines.count("at save") >= 2  # one best
    else:
        assert (step, past) == (20, 1)
        assert (tmp_path / "export").exists()
        assert not (tmp_path / "predictions.npz").exists()
    names = os.listdir(tmp_path) + os.listdir(tmp_path / "checkpoints")
    assert not [name for name in names if "tmp" in name or "temp" in name]
    assert (tmp_path / "checkpoints" / f"ckpt-{step}.commit").exists()
    said = (f"Preempted after step {step}; last checkpoint: {tmp_path}/checkpoints/"
            f"ckpt-{step}\nGo on with: ")
    assert said in "\n".join(lines)
    (note,) = notes(tmp_path)
    assert note["step"] == step and note["note"].startswith(said)
    command = note["note"].partition("Go on with: ")[2]
    assert f"--workdir={tmp_path} --mode=all" in command

    folder, result = undisturbed
    assert finished(tmp_path, "--mode=all")[-1] == result
    expected, found = state(folder), state(tmp_path)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, key)
    evaluated = [line for line in recorded(tmp_path) if line["split"] != "train"]
    assert evaluated == [
        line for line in recorded(folder) if line["split"] != "train"]
    assert (tmp_path / "predictions.npz").exists()


def test_a_second_sigterm_ends_a_step_that_hangs(tmp_path):
    with started(tmp_path, AT="train", PAUSE="1000", FROM="2") as process:
        read_until(process, "at train", times=2)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert not list(tmp_path.glob("checkpoints/*"))


def test_another_signal_by_flag(tmp_path):
    flag = "--preemption_signal=SIGUSR1"
    with started(tmp_path, flag, AT="train", PAUSE="0.3") as process:
        read_until(process, "at train", times=2)
        process.send_signal(signal.SIGUSR1)
        lines = process.stdout.read().splitlines()
        assert process.wait() == 42, "\n".join(lines)
    step = int(lines[-1].split()[-1])
    assert (tmp_path / "checkpoints" / f"ckpt-{step}.commit").exists()


def test_ctrl_c_ends_after_the_step_too(tmp_path):
    with started(tmp_path, AT="train", PAUSE="0.3") as process:
        read_until(process, "at train", times=2)
        process.send_signal(signal.SIGINT)
        lines = process.stdout.read().splitlines()
        assert process.wait() == 130, "\n".join(lines)
    assert lines[-1] == f"code 130 after step {1 + lines.count('at train') + 1}"


def test_a_worker_that_is_preempted_takes_the_others_with_it(tmp_path):
    flags = ["--steps_per_loop=5", "--train_steps=1000", "--checkpoint_every_steps=500",
             "--eval_every_steps=500", "--log_every_steps=500"]
    with started(tmp_path, *flags, launcher=LAUNCHER, AT="train", PAUSE="0.05"
                 ) as process:
        lines = read_until(process, "[worker 1] past train", times=12)
        (pid,) = re.findall(r"^\[worker 1\] pid (\d+)$", "\n".join(lines), re.M)
        os.kill(int(pid), signal.SIGTERM)
        lines += process.stdout.read().splitlines()
        assert process.wait() == 42, "\n".join(lines)
    ends = re.findall(
        r"^\[worker (\d)\] code (\d+) after step (\d+)$", "\n".join(lines), re.M)
    (_, _, step), _ = ends
    assert sorted(ends) == [("0", "42", step), ("1", "42", step)]
    assert 10 < int(step) < 500 and int(step) % 5 == 0
    markers = [path.name for path in tmp_path.glob("checkpoints/*.commit")]
    assert markers == [f"ckpt-{step}.commit"]
