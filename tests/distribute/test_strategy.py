"""Which devices take part, by name and number; batch sizes that fit them."""

import pathlib
import subprocess
import sys

import pytest
import tensorflow as tf

from mpl.distribute import (
    Cluster,
    check_batch,
    distribute_dataset,
    get_strategy,
    reason,
)
from mpl.distribute.strategy import choose_devices, choose_name
from mpl.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "num_devices", "num_gpus", "chosen"),
    [
        ("auto", None, 0, ("one_device", ["CPU:0"])),
        ("auto", None, 1, ("one_device", ["GPU:0"])),
        ("auto", None, 2, ("mirrored", ["GPU:0", "GPU:1"])),
        ("auto", 1, 8, ("one_device", ["GPU:0"])),
        ("auto", 2, 8, ("mirrored", ["GPU:0", "GPU:1"])),
        ("auto", 2, 0, ("mirrored", ["CPU:0", "CPU:1"])),
        ("one_device", None, 8, ("one_device", ["GPU:0"])),
        ("one_device", 1, 0, ("one_device", ["CPU:0"])),
        ("mirrored", None, 0, ("mirrored", ["CPU:0"])),
        ("mirrored", None, 2, ("mirrored", ["GPU:0", "GPU:1"])),
        ("mirrored", 3, 0, ("mirrored", ["CPU:0", "CPU:1", "CPU:2"])),
    ],
)
def test_choose_devices(name, num_devices, num_gpus, chosen):
    assert choose_devices(name, num_devices, num_gpus) == chosen


@pytest.mark.parametrize(
    ("name", "num_devices", "num_gpus", "message"),
    [
        ("auto", 0, 0, r"`num_devices` \(0\) must be 1 or more"),
        ("one_device", 2, 0, r"`num_devices` \(2\) must be 1 with `strategy`"),
        ("mirrored", 4, 2, r"\(4\) is more than the 2 GPUs .*\nUse at most 2"),
        ("auto", 2, 1, r"\(2\) is more than the 1 GPUs"),
    ],
)
def test_impossible_devices_are_errors(name, num_devices, num_gpus, message):
    with pytest.raises(ConfigError, match=message):
        choose_devices(name, num_devices, num_gpus)


WORKERS = Cluster({"worker": ["a:1", "b:1"]}, "worker", 0)
SERVERS = Cluster({"chief": ["a:1"], "worker": ["b:1"], "ps": ["c:1"]}, "chief", 0)


@pytest.mark.parametrize(("name", "cluster", "tpu", "chosen"), [
    ("auto", None, None, "auto"), ("mirrored", None, None, "mirrored"),
    ("auto", WORKERS, None, "multi_worker_mirrored"),
    ("multi_worker_mirrored", WORKERS, None, "multi_worker_mirrored"),
    ("auto", SERVERS, None, "parameter_server"),
    ("parameter_server", SERVERS, None, "parameter_server"),
    ("auto", None, "local", "tpu"), ("tpu", None, "a-name", "tpu"),
])
def test_choose_name(name, cluster, tpu, chosen):
    assert choose_name(name, cluster, tpu) == chosen


@pytest.mark.parametrize(("name", "cluster", "tpu", "message"), [
    ("mirored", None, None, r"`strategy` \(mirored\) is unknown.\nUse one of auto,"),
    ("tpu", None, None, r"\(tpu\) and `tpu` \(None\) do not go .*\n.*--tpu=local"),
    ("auto", WORKERS, "x", r"`tpu` \(x\) does not go with the cluster"),
    ("mirrored", None, "x", r"\(mirrored\) and `tpu` \(x\) do not go together"),
    ("parameter_server", None, None, r"needs a cluster.*\nSet TF_CONFIG.*launch.local"),
    ("multi_worker_mirrored", None, None, "needs a cluster, and none is described"),
    ("one_device", WORKERS, None, "made for multi_worker_mirrored.*\n.*without a clu"),
    ("parameter_server", WORKERS, None, "made for multi_worker_mirrored"),
    ("multi_worker_mirrored", SERVERS, None, "made for parameter_server"),
])
def test_a_strategy_that_does_not_go_with_what_is_there(name, cluster, tpu, message):
    with pytest.raises(ConfigError, match=message):
        choose_name(name, cluster, tpu)


@pytest.mark.parametrize(("name", "communication", "message"), [
    ("mirrored", "nccl", r"\(nccl\) does not go with `strategy` mirrored on CPUs"),
    ("mirrored", "ring", r"\(ring\) does not go with `strategy` mirrored on CPUs"),
])
def test_communication_that_a_strategy_has_not(name, communication, message):
    with pytest.raises(ConfigError, match=message):
        get_strategy(name, 2, communication=communication)


def test_workers_on_cpus_have_one_device_and_no_nccl():
    with pytest.raises(ConfigError, match=r"\(2\) must be 1: without GPUs each"):
        get_strategy("auto", 2, cluster=WORKERS)
    with pytest.raises(ConfigError, match=r"\(nccl\) .* multi_worker_mirrored on CPUs"):
        get_strategy("auto", cluster=WORKERS, communication="nccl")


def test_one_device_has_nothing_to_communicate_and_a_tpu_all_its_cores():
    with pytest.raises(ConfigError, match=r"\(ring\) .* `strategy` one_device on CPUs"):
        get_strategy("one_device", communication="ring")
    with pytest.raises(ConfigError, match=r"`num_devices` \(2\) does not go with a"):
        get_strategy("auto", 2, tpu="local")


@pytest.mark.parametrize("communication", ["nccl", "ring"])
def test_on_a_tpu_or_servers_nobody_asks_about_cpus(communication):
    for name, there in (("tpu", {"tpu": "local"}),
                        ("parameter_server", {"cluster": SERVERS})):
        with pytest.raises(ConfigError) as caught:
            get_strategy(name, **there, communication=communication)
        assert caught.value.cause == (
            f"`communication` ({communication}) does not go with `strategy` {name}.")


@pytest.mark.parametrize(("name", "num_devices", "cluster", "tpu", "words"), [
    ("auto", None, None, None, "no GPU was found"),
    ("auto", 2, None, None, "--num_devices=2"),
    ("mirrored", 2, None, None, "--strategy=mirrored"),
    ("auto", None, WORKERS, None, "a cluster of 2 processes"),
    ("auto", None, None, "v4", "--tpu=v4"),
])
def test_the_reason_of_a_choice(name, num_devices, cluster, tpu, words):
    assert reason(name, num_devices, cluster, tpu) == words


def test_the_reason_knows_hidden_gpus(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind] * 2)
    for visible, words in ((["GPU"], "all visible GPUs"), ([], "no GPU is visible")):
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: visible)
        assert reason("auto", None, None) == words


def test_get_strategy_on_the_cpu():
    one = get_strategy()
    assert isinstance(one, tf.distribute.OneDeviceStrategy)
    assert one.num_replicas_in_sync == 1
    mirrored = get_strategy("mirrored", 2)
    assert isinstance(mirrored, tf.distribute.MirroredStrategy)
    assert mirrored.num_replicas_in_sync == 2


def _run(program):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_logical_cpus_are_made_before_tensorflow_starts():
    result = _run(
        "from mpl.distribute.strategy import get_strategy\n"
        "print(get_strategy('auto', 3).num_replicas_in_sync)\n"
        "print(get_strategy('mirrored', 2).num_replicas_in_sync)\n"
    )
    assert result.stdout.split() == ["3", "2"], result.stderr


@pytest.mark.slow
def test_devices_already_initialised_are_an_error():
    result = _run(
        "import tensorflow as tf\n"
        "from mpl.distribute.strategy import get_strategy\n"
        "tf.constant(1)\n"
        "get_strategy('mirrored', 2)\n"
    )
    assert result.returncode != 0
    cause, remedy = result.stderr.splitlines()[-2:]
    assert "`num_devices` (2) is more than the 1 that TensorFlow has set up" in cause
    assert "already initialised" in cause
    assert remedy.startswith("Make the strategy before any tensor")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 8), r"`global_batch_size` \(100\) must be divisible by 8 replicas."
                   r"\nUse 96 or 104."),
        ((100, 2, 3), r"by 6 \(2 replicas × 3 micro-batches\).\nUse 96 or 102."),
        ((3, 4), "Use 4."),
        ((0, 1), "Use 1."),
        ((-5, 2), "Use 2."),
    ],
)
def test_a_batch_that_does_not_divide_is_an_error(sizes, message):
    with pytest.raises(ConfigError, match=message):
        check_batch(*sizes)


def test_a_batch_that_divides_passes():
    assert check_batch(96, 8) is None
    assert check_batch(96, 4, 3) is None


def test_one_cpu_reads_the_dataset_itself(strategy_of):
    dataset = tf.data.Dataset.range(8).batch(4, drop_remainder=True)
    assert distribute_dataset(dataset, strategy_of(1)) is dataset
    distributed = distribute_dataset(dataset, strategy_of(2))
    assert isinstance(distributed, tf.distribute.DistributedDataset)
    first = strategy_of(2).experimental_local_results(next(iter(distributed)))
    assert [part.numpy().tolist() for part in first] == [[0, 1], [2, 3]]
