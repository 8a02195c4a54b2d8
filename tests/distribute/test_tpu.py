"""The start-up of a TPU with a fake one, and without any; what a TPU decides."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.distribute import get_strategy, tpu
from mpl.precision.loss_scale import get_loss_scale
from mpl.precision.policy import get_policy


class FakeTpu(tf.distribute.OneDeviceStrategy):
    """Counts how often a step is handed to it."""

    def __init__(self, resolver=None):
        super().__init__("CPU:0")
        self.resolver, self.runs, self.extended.num_hosts = resolver, 0, 1

    def run(self, *args, **kwargs):
        self.runs += 1
        return super().run(*args, **kwargs)


class Resolver:
    def __init__(self, tpu):
        self.tpu = tpu

    def master(self):
        return "" if self.tpu == "local" else "grpc://10.0.0.2:8470"


CALLS = {
    "resolver": (tf.distribute.cluster_resolver, "TPUClusterResolver"),
    "connect": (tf.config, "experimental_connect_to_cluster"),
    "initialize": (tf.tpu.experimental, "initialize_tpu_system"),
    "strategy": (tf.distribute, "TPUStrategy"),
}


@pytest.fixture
def calls(monkeypatch):
    """What is called of TensorFlow, which makes the fake TPU; `calls.set` fakes one."""
    class Calls(list):
        def set(self, what, result):
            def call(*args, **kwargs):
                self.append((what, *args, kwargs))
                return result(*args, **kwargs)

            monkeypatch.setattr(*CALLS[what], call)

    calls = Calls()
    calls.set("resolver", Resolver)
    calls.set("connect", lambda *args, **kwargs: None)
    calls.set("initialize", lambda *args: None)
    calls.set("strategy", FakeTpu)
    return calls


@pytest.fixture
def scopes(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(name):
        entered.append((name, threading.current_thread()))
        yield

    monkeypatch.setattr(tf, "device", device)
    return entered


@pytest.mark.parametrize("name, device", [
    ("v4", "/job:worker/replica:0/task:0/device:CPU:0"), ("local", None)])
def test_start_up_is_tensorflows(name, device, calls, scopes):
    strategy = tpu.connect(name, 30.0)
    resolver = strategy.resolver
    assert calls == [("resolver", {"tpu": name}),
                     ("connect", resolver, {"make_master_device_default": False}),
                     ("initialize", resolver, {}), ("strategy", resolver, {})]
    here = threading.current_thread()
    assert [scope for scope in scopes if "job" in scope[0]] == (
        [(device, here)] if device else [])


def test_the_log_tells_cores_and_hosts(calls, monkeypatch):
    said = []
    monkeypatch.setattr(
        tpu.logging, "info", lambda text, *values: said.append(text % values))

    def of_two_hosts(resolver):
        strategy = FakeTpu(resolver)
        strategy.extended.num_hosts = 2
        return strategy

    calls.set("strategy", of_two_hosts)
    tpu.connect("local", 30.0)
    assert said == ["TPU local: cores: 1, hosts: 2."]


@pytest.mark.parametrize("call", CALLS)
def test_what_fails_is_said_at_once(call, calls):
    def fail(*args, **kwargs):
        raise RuntimeError("TPU \"v4\" is not yet ready.\nmore")

    calls.set(call, fail)
    start = time.monotonic()
    with pytest.raises(mpl.ClusterError, match=(
        r"^The TPU 'v4' cannot be used: RuntimeError: TPU \"v4\" is not yet ready\.\n"
        r"Check that the TPU runs and --tpu is its name"
    )):
        tpu.connect("v4", 30.0)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("call", CALLS)
def test_what_hangs_is_given_up(call, calls):
    over = threading.Event()

    def hang(*args, **kwargs):
        over.wait(60)
        raise RuntimeError("The thread ends here.")

    calls.set(call, hang)
    start = time.monotonic()
    try:
        with pytest.raises(mpl.ClusterError, match=(
            r"^The TPU 'v4' did not answer within 0.2 s\.\nCheck .*--cluster_timeout"
        )):
            tpu.connect("v4", 0.2)
        assert time.monotonic() - start < 10
    finally:
        over.set()


def test_the_flag_leads_here(monkeypatch):
    monkeypatch.setattr(tpu, "connect", lambda *args: args)
    assert get_strategy("auto", tpu="v4", timeout_secs=7.0) == ("v4", 7.0)


# Without a TPU, in a process of its own.


@contextlib.contextmanager
def mute_server():
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield server.getsockname()[1]


def failing(name, timeout_secs, before="", **environ):
    """Runs connect in another process; returns its cause and the seconds taken."""
    code = (
        "import sys, time\n"
        f"{before}\n"
        "from mpl.distribute import tpu\n"
        "from mpl.errors import ClusterError\n"
        "start = time.monotonic()\n"
        "try:\n"
        f"    tpu.connect({name!r}, {timeout_secs})\n"
        "except ClusterError as error:\n"
        "    print(f'{time.monotonic() - start:.1f}\\n{error}', flush=True)\n"
        "    sys.exit(1)\n"
    )
    # No thread stuck in TensorFlow may keep the process: its end is bounded, too.
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, **environ}, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1, process.stderr
    secs, cause, remedy = process.stdout.splitlines()[-3:]
    assert remedy.startswith("Check that the TPU runs")
    return cause, float(secs)


@pytest.mark.slow
def test_no_tpu_on_this_machine():
    cause, secs = failing("local", 60)
    assert cause.startswith("The TPU 'local' cannot be used: NotFoundError: TPUs not")
    assert secs < 50


@pytest.mark.slow
def test_a_name_that_nobody_resolves():
    """Off Google's cloud the metadata server, which knows the project, is silent."""
    with mute_server() as port:
        cause, secs = failing("v4", 3, GCE_METADATA_IP=f"127.0.0.1:{port}")
    assert cause == "The TPU 'v4' did not answer within 3 s." and secs < 30


@pytest.mark.slow
def test_an_address_that_is_silent():
    with mute_server() as port:
        name = f"grpc://127.0.0.1:{port}"
        cause, secs = failing(name, 5)
    assert cause == f"The TPU '{name}' did not answer within 5 s." and secs < 30


@pytest.mark.slow
def test_an_address_without_a_tpu():
    """TensorFlow connects with it, and finds none."""
    with mute_server() as port:
        pass  # it is free now
    serve = ("import tensorflow as tf\n"
             f"jobs = {{'worker': ['localhost:{port}']}}\n"
             "server = tf.distribute.Server(jobs, 'worker', 0)\n")
    cause, secs = failing(f"grpc://localhost:{port}", 60, before=serve)
    assert "cannot be used: NotFoundError: TPUs not found in the cluster" in cause
    assert secs < 50


# What a TPU decides.


@pytest.fixture
def fake_tpu(monkeypatch):
    monkeypatch.setattr(tf.distribute, "TPUStrategy", FakeTpu)
    return FakeTpu()


def test_policies_on_a_tpu(fake_tpu):
    with fake_tpu.scope():
        assert get_policy("auto").name == "mixed_bfloat16"
        assert get_policy("p=f32,c=half").compute_dtype == tf.bfloat16
    assert get_policy("p=f32,c=half").compute_dtype == tf.float16


@pytest.mark.parametrize("name, policy, shown", [
    ("dynamic", "float32", "dynamic"), ("auto", "mixed_float16", "auto"),
    (mpl.DynamicLossScale, "mixed_bfloat16", "DynamicLossScale")])
def test_a_dynamic_scale_on_a_tpu_is_refused(name, policy, shown, fake_tpu):
    with fake_tpu.scope():
        name = name if isinstance(name, str) else name()
        message = (rf"`loss_scale` \({shown}\) is dynamic, .*bfloat16, which needs "
                   r"none\.\nUse --policy=mixed_bfloat16")
        with pytest.raises(mpl.ConfigError, match=message):
            get_loss_scale(name, get_policy(policy))
        assert float(get_loss_scale("auto", get_policy("mixed_bfloat16")).value) == 1
        assert float(get_loss_scale(64).value) == 64
    assert get_loss_scale("dynamic").is_dynamic


class Line(mpl.Experiment):
    def build_model(self):
        return keras.Sequential([
            keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(
                2, dtype="float32")])

    def build_data(self, split, context):
        x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
        return {"x": x, "y": (x.sum(1) > 0).astype(np.int32)}

    def loss(self, batch, training):
        logits = self.model(batch["x"], training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["y"], logits, from_logits=True)
        return mpl.LossOutput(losses, batch["weight"], (batch["y"], logits))


def test_many_steps_are_one_dispatch(fake_tpu):
    experiment = Line()
    config = mpl.RunConfig(train_steps=12, global_batch_size=8, learning_rate=0.1)
    experiment.setup(config, fake_tpu)
    assert experiment.policy.name == "mixed_bfloat16"
    assert not experiment.loss_scale.is_dynamic
    for _ in range(2):
        experiment.trainer.train(6)
    assert int(experiment.global_step) == 12
    assert experiment.train_report()["applied_steps"] == 12
    assert fake_tpu.runs == 1  # it was traced into a tf.while
