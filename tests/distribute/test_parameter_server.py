"""Training by workers that a chief coordinates: real processes on this machine."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import coordinated_run
import pytest
import tensorflow as tf

from mpl.distribute import Cluster, check_server_settings, coordinating
from mpl.distribute import parameter_server, serve
from mpl.errors import ClusterError, ConfigError
from mpl.launch.session import Session

ROOT = pathlib.Path(__file__).parents[2]
RUN = pathlib.Path(coordinated_run.__file__)
PATIENCE_SECS = 240.0


def free_addresses(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for each in sockets:
        each.close()
    return addresses


def until(condition, what):
    deadline = time.monotonic() + PATIENCE_SECS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


class Processes:
    """A chief, two workers and a parameter server, each started when asked for."""

    def __init__(self, folder, gone_secs):
        self.gone_secs = str(gone_secs)  # within which a chief may come back
        chief, *workers, server = free_addresses(4)
        self.jobs = {"chief": [chief], "worker": workers, "ps": [server]}
        self.folder, self.running = folder, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.running.values():
            process.kill()
            process.wait(30)

    def start(self, job, index=0, what="serve", **environ):
        task = {"cluster": self.jobs, "task": {"type": job, "index": index}}
        log = open(self.folder / f"{job}{index}.log", "a")
        process = self.running[job, index] = subprocess.Popen(
            [sys.executable, str(RUN), what, str(self.folder)], cwd=ROOT, stdout=log,
            stderr=log, env={
                **os.environ, "PYTHONPATH": str(ROOT), "TF_CONFIG": json.dumps(task),
                "GONE_SECS": self.gone_secs, "TF_NUM_INTRAOP_THREADS": "1", **environ})
        log.close()
        return process

    def start_servers(self):
        return [self.start("ps"), self.start("worker", 0), self.start("worker", 1)]

    def kill(self, job, index=0):
        self.running[job, index].send_signal(signal.SIGKILL)
        self.running[job, index].wait(30)

    def log(self, job="chief", index=0):
        return (self.folder / f"{job}{index}.log").read_text()

    def end(self, job="chief", index=0):
        """Returns the exit code of a process."""
        try:
            return self.running[job, index].wait(PATIENCE_SECS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{job} {index} does not end:\n{self.log(job, index)[-3000:]}")

    def seen(self, what):
        assert self.end() == 0, self.log()[-5000:]
        return json.loads((self.folder / f"{what}.json").read_text())


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A run on one device: its folder and its results."""
    folder = tmp_path_factory.mktemp("one_device")
    results = session(folder, train_steps=10).go()
    return folder, results


def session(folder, **settings):
    experiment = coordinated_run.made(
        tf.distribute.OneDeviceStrategy("CPU:0"), workdir=str(folder), ema_decay=0.9,
        policy="mixed_bfloat16", **settings)
    return Session(experiment, str(folder))


@pytest.fixture(scope="module")
def seen(tmp_path_factory, one_device):
    """What the chief saw in one cluster, and how the others ended."""
    folder = tmp_path_factory.mktemp("checks")
    with Processes(folder, gone_secs=5) as processes:
        processes.start_servers()
        processes.start("chief", what="checks", ONE_DEVICE=str(one_device[0]))
        seen = processes.seen("checks")
        tasks = ("ps", 0), ("worker", 0), ("worker", 1)
        seen["ends"] = [processes.end(*task) for task in tasks]
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_the_loss_falls_and_counts_are_exact(seen, policy):
    values = seen[policy]
    assert values["after"]["loss"] < 0.5 * values["before"]["loss"]
    assert values["after"]["accuracy"] > 0.9
    assert values["global_step"] == values["position"] == 60
    assert values["applied"] + values["skipped"] == 60
    assert values["skipped"] == 0
    # Two workers added to the metrics at a time.
    assert values["report"]["examples"] == 60 * coordinated_run.BATCH
    assert values["after"]["examples"] == 100
    scale = 1024 if policy == "mixed_float16" else 1
    assert values["report"]["loss_scale"] == scale


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rich", "averaged"])
def test_micro_batches_tables_statistics_and_averages(seen, kind):
    assert seen[kind]["after"]["loss"] < seen[kind]["before"]["loss"]
    assert seen[kind]["global_step"] == seen[kind]["applied"] == 40


@pytest.mark.slow
def test_the_limit_of_skips_is_seen_at_a_block_s_edge(seen):
    bad = seen["bad"]
    assert (bad["early"], bad["late"]) == (False, True)
    assert (bad["applied"], bad["skipped"], bad["global_step"]) == (0, 8, 8)
    assert bad["error"].startswith("At step 8: 8 steps in a row were skipped: ")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "message"), [
    ("loss_scale", "`loss_scale` (dynamic) is dynamic, which parameter servers do not "
     "allow.\nUse --loss_scale=1024, or another power of two."),
    ("deterministic", "`deterministic` (True) does not go with `strategy` "
     "parameter_server: workers write as they come.\nLeave it out, or use --strategy="
     "multi_worker_mirrored, in a cluster without ps."),
])  # fmt: skip
def test_what_cannot_work_is_refused(seen, name, message):
    assert seen[f"refused_{name}"] == message


@pytest.mark.slow
def test_the_number_of_steps_must_be_known(seen):
    assert seen["endless"] == (
        "`num_steps` (-1) must be known with parameter servers.\n"
        "Train for a number of steps.")


@pytest.mark.slow
def test_a_run_of_one_device_is_restored_on_servers(seen, one_device):
    results = one_device[1]
    assert seen["restored"]["step"] == 10
    for split in ("validation", "test"):
        assert seen["restored"][split] == pytest.approx(results[split], rel=1e-5)


@pytest.mark.slow
def test_servers_end_by_themselves_when_the_chief_is_gone(seen):
    assert seen["ends"] == [0, 0, 0]


def trained(folder):
    """Returns the lines of training in the log of metrics."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in map(json.loads, lines) if line["split"] == "train"]


@pytest.mark.slow
def test_lost_workers_are_done_without_and_a_lost_server_is_an_error(tmp_path):
    def wait_until(condition):
        """Waits until the last line of training, which is a new one, fulfils it."""
        count, chief = len(trained(tmp_path)), processes.running["chief", 0]
        until(lambda: chief.poll() is not None or any(
            map(condition, trained(tmp_path)[count:][-1:])), "a line")
        assert chief.poll() is None, processes.log()[-5000:]

    with Processes(tmp_path, gone_secs=60) as processes:
        processes.start_servers()
        chief = processes.start("chief", what="run", STEPS="1000000")
        wait_until(lambda line: 0 < line["worker"] < 1)  # both make steps
        processes.kill("worker", 1)
        wait_until(lambda line: line["worker"] == 0)
        processes.start("worker", 1)
        wait_until(lambda line: 0 < line["worker"] < 1)
        chief.send_signal(signal.SIGINT)
        counts = processes.seen("run")["counts"]
        steps = trained(tmp_path)[-1]["step"]
        assert counts["global_step"] == counts["position"] == steps
        # The lost step ran again elsewhere, and may have been counted before.
        assert steps <= counts["applied"] + counts["skipped"] <= steps + 1

        processes.start("chief", what="run", STEPS="1000000")
        wait_until(lambda line: line["step"] > steps)
        processes.kill("ps")
        assert processes.end() == 1
        assert f"Going on at step {steps} of 1000000" in processes.log()
        assert processes.log().rstrip().endswith(
            f"ClusterError: ps 0 ({processes.jobs['ps'][0]}) is gone, and with it "
            "variables of the model.\nRun the same command again once the cluster is "
            "up: it goes on from the last checkpoint.")

        processes.start("ps")
        steps = max(int(path.stem.split("-")[1])
                    for path in (tmp_path / "checkpoints").glob("ckpt-*.index"))
        processes.start("chief", what="run", STEPS=str(steps + 20))
        results = processes.seen("run")["results"]
        assert f"Going on at step {steps} of {steps + 20}" in processes.log()
    there = session(tmp_path, mode="eval", train_steps=steps + 20).go()
    for split in ("validation", "test"):
        assert there[split] == pytest.approx(results[split], rel=1e-5)


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_all_and_the_same_command_goes_on(tmp_path):
    command = [
        sys.executable, "-m", "mpl.launch.local", "--workers=2", "--ps=1", "--",
        sys.executable, str(RUN), f"--workdir={tmp_path}", "--train_steps=1000000"]
    step = 0
    for begins in ("", "Going on at step {} of 1000000 in "):
        launcher = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            until(lambda: launcher.poll() is not None or any(
                line["step"] > step for line in trained(tmp_path)), "a step")
            launcher.send_signal(signal.SIGINT)
            output, _ = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
            launcher.wait()
        left = subprocess.run(["pgrep", "-f", str(tmp_path)], stdout=subprocess.PIPE)
        assert (launcher.returncode, left.stdout) == (130, b""), output
        assert begins.format(step) in output
        stopped = re.search(
            r"^\[chief 0\] Stopped at step (\d+); last checkpoint: (.*)\n"
            r"\[chief 0\] Go on with: .* --workdir=(.*)\n", output, re.M)
        assert stopped, output
        before, step = step, int(stopped[1])
        assert step > before and step == trained(tmp_path)[-1]["step"]
        assert stopped[2] == f"{tmp_path}/checkpoints/ckpt-{step}"
        assert stopped[3] == str(tmp_path)
        assert tf.train.latest_checkpoint(tmp_path / "checkpoints") == stopped[2]


def cluster_of(job):
    chief, worker, server = free_addresses(3)
    return Cluster({"chief": [chief], "worker": [worker], "ps": [server]}, job, 0)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(parameter_server, "_LOOK_SECS", 0.05)
    monkeypatch.setattr(parameter_server, "_GONE_SECS", 0.3)


def test_the_chief_names_who_did_not_start(impatient):
    cluster = cluster_of("chief")
    host, _, port = cluster.jobs["worker"][0].rpartition(":")
    with socket.create_server((host, int(port))):
        with pytest.raises(ClusterError) as error, coordinating(cluster, 0.3):
            pytest.fail("the server is missing")
    assert str(error.value) == (
        f"ps 0 ({cluster.jobs['ps'][0]}) did not start within 0.3 s.\n"
        "Look at its log, or wait longer: --cluster_timeout.")


@pytest.mark.parametrize("kind", [tf.errors.UnavailableError, tf.errors.AbortedError])
def test_errors_are_of_a_lost_server_only_if_one_is_lost(impatient, kind):
    cluster = cluster_of("chief")
    host, _, port = cluster.jobs["worker"][0].rpartition(":")
    with socket.create_server((host, int(port))):
        host, _, port = cluster.jobs["ps"][0].rpartition(":")
        with socket.create_server((host, int(port))) as server:
            with pytest.raises(kind, match="of a worker"), coordinating(cluster, 5.0):
                raise kind(None, None, "of a worker")
            new = "from remote target /job:ps/replica:0/task:0: unknown device"
            with pytest.raises(ClusterError, match="^ps 0 .* is gone"):
                with coordinating(cluster, 5.0):
                    raise kind(None, None, new)
            with pytest.raises(ClusterError, match="^ps 0 .* is gone"):
                with coordinating(cluster, 5.0):
                    server.close()
                    raise kind(None, None, "of a worker")


def test_serving_ends_after_the_chief_and_needs_one(impatient, monkeypatch):
    fake = types.SimpleNamespace(target="grpc://there")
    monkeypatch.setattr(tf.distribute, "Server", lambda *_, **__: fake)
    cluster = cluster_of("worker")
    with pytest.raises(ClusterError, match=r"^chief 0 \(.*\) did not start within"):
        serve(cluster, 0.2)
    host, _, port = cluster.jobs["chief"][0].rpartition(":")
    with socket.create_server((host, int(port))):
        serving = threading.Thread(target=serve, args=(cluster, 5.0), daemon=True)
        serving.start()
        serving.join(1.0)
        assert serving.is_alive()
    serving.join(10.0)
    assert not serving.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_after_a_signal_serving_ends_with_the_chief(number, monkeypatch):
    fake = types.SimpleNamespace(target="grpc://there")
    monkeypatch.setattr(tf.distribute, "Server", lambda *_, **__: fake)
    cluster, former = cluster_of("worker"), signal.getsignal(number)
    host, _, port = cluster.jobs["chief"][0].rpartition(":")
    chief, start = socket.create_server((host, int(port))), time.monotonic()
    threads = [threading.Timer(2.0, os.kill, (os.getpid(), number)),
               threading.Timer(4.0, chief.close)]
    for thread in threads:
        thread.start()
    serve(cluster, 30.0, "SIGUSR1")
    for thread in threads:
        thread.join()
    assert 4.0 <= time.monotonic() - start < 30  # else a minute after the chief
    assert signal.getsignal(number) == former


def test_a_port_in_use_is_an_error():
    cluster = cluster_of("worker")
    port = int(cluster.jobs["worker"][0].partition(":")[2])
    with socket.create_server(("0.0.0.0", port)):
        with pytest.raises(ClusterError, match="^The address localhost:.* cannot be"):
            serve(cluster, 0.1)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("debug_eager", True, "`debug_eager` (True) does not go with `strategy` "
     "parameter_server: workers run traced steps alone.\n"
     "Leave it out, or use --strategy=one_device."),
    ("jit_compile", True, "`jit_compile` (True) does not go with `strategy` "
     "parameter_server: a step's variables lie elsewhere.\nUse --jit_compile=auto."),
    ("num_devices", 2, "`num_devices` (2) does not go with `strategy` "
     "parameter_server: a worker has one device.\nLeave it out."),
    ("max_bad_records", 3, "`max_bad_records` (3) does not go with `strategy` "
     "parameter_server: workers do not see copies of files in the chief's memory.\n"
     "Repair the files, and leave it out."),
    ("communication", "ring", "`communication` (ring) does not go with `strategy` "
     "parameter_server: nothing is summed.\nUse --communication=auto."),
])  # fmt: skip
def test_settings_that_servers_cannot_give(name, value, message):
    check_server_settings(coordinated_run.Config(), 1)
    with pytest.raises(ConfigError) as error:
        check_server_settings(coordinated_run.Config(**{name: value}), 1)
    assert str(error.value) == message


def test_a_worker_takes_one_gpu():
    with pytest.raises(ConfigError, match="^Each worker has 2 GPUs"):
        check_server_settings(coordinated_run.Config(), 2)
