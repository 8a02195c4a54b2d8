"""Which devices take part in a step."""

import faulthandler
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.distribute import tpu as tpu_lib
from mpl.distribute.cluster import Cluster
from mpl.errors import ConfigError

NAMES = (
    "auto", "one_device", "mirrored", "multi_worker_mirrored", "parameter_server", "tpu"
)  # fmt: skip
_START_A_CLUSTER = (
    "Set TF_CONFIG, run under Slurm, or start one on this machine: python -m "
    "mpl.launch.local --workers=2 -- <command>; --strategy=auto takes what is there."
)


def get_strategy(
    name: str = "auto", num_devices: int | None = None, *,
    cluster: Cluster | None = None, tpu: str | None = None,
    communication: str = "auto", timeout_secs: float = 300.0,
) -> tf.distribute.Strategy:
    """Makes the strategy; nothing may have used TensorFlow's devices before.

    Args:
        name: `one_device`; `mirrored`: a replica on each device; `auto`, and others:
            see `choose_name`.
        num_devices: how many replicas in this process; None: one for each GPU, 1 where
            there is none. Without a GPU they are logical devices of the CPU, to try
            things out.
        cluster: the processes that train together.
        tpu: name or address of a TPU.
        communication: `auto`, `nccl` or `ring`.
        timeout_secs: how long to wait for a TPU.

    Raises:
        ConfigError: an unknown name, a number that does not go with it, fewer devices
            than asked for.
        ClusterError: the TPU cannot be reached.
    """
    name, devices = choose(
        name, num_devices, cluster=cluster, tpu=tpu, communication=communication)
    if tpu is not None:
        return tpu_lib.connect(tpu, timeout_secs)
    if cluster is not None and cluster.has_servers:
        return tf.distribute.ParameterServerStrategy(cluster.resolver)
    if cluster is not None:
        return _multi_worker(cluster, len(devices), communication, timeout_secs)
    if "CPU" in devices[0]:
        _ensure_logical_cpus(len(devices))
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    if "GPU" in devices[0]:  # by TensorFlow's collectives, which are NCCL's
        return tf.distribute.MirroredStrategy(devices)
    # TensorFlow's own choice on CPUs, collectives, keeps one group size for the life of
    # a process: a second strategy of another size would fail.
    return tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def choose(
    name: str, num_devices: int | None, *, cluster: Cluster | None, tpu: str | None,
    communication: str,
) -> tuple[str, list[str]]:
    """The rule of `get_strategy`: the name without `auto`, and this process's devices.

    Raises:
        ConfigError: settings that do not go together or with what is there.
    """
    name = choose_name(name, cluster, tpu)
    num_gpus = len(tf.config.get_visible_devices("GPU"))
    if num_gpus and cluster is None and tpu is None:
        # Physical devices above: listing logical ones fixes the number of CPUs.
        num_gpus = len(tf.config.list_logical_devices("GPU"))
    devices: list[str] = []
    if name == "tpu":
        if num_devices is not None:
            cause = f"`num_devices` ({num_devices}) does not go with a TPU."
            raise ConfigError(cause, "Leave it out: all of its cores take part.")
    elif name != "parameter_server":
        if cluster is not None and not num_gpus and (num_devices or 1) > 1:
            raise ConfigError(
                f"`num_devices` ({num_devices}) must be 1: without GPUs each process "
                "of a cluster has one device.",
                "Leave it out, or start more processes.")
        name, devices = choose_devices(name, num_devices, num_gpus)
    between_gpus = name in ("mirrored", "multi_worker_mirrored") and num_gpus
    if (communication == "ring" and name != "multi_worker_mirrored"
            or communication == "nccl" and not between_gpus):
        on = " on CPUs" if devices and not num_gpus else ""
        cause = f"`communication` ({communication}) does not go with `strategy` {name}"
        raise ConfigError(
            f"{cause}{on}.",
            "Use --communication=auto; ring is for several processes, nccl for GPUs.")
    return name, devices


def choose_name(name: str, cluster: Cluster | None, tpu: str | None) -> str:
    """Returns the name of the strategy, `auto` where this machine's devices decide.

    Raises:
        ConfigError: the name is unknown, or does not go with the cluster or the TPU.
    """
    if name not in NAMES:
        cause = f"`strategy` ({name}) is unknown."
        raise ConfigError(cause, f"Use one of {', '.join(NAMES)}.")
    if tpu is not None and cluster is not None:
        raise ConfigError(
            f"`tpu` ({tpu}) does not go with the cluster that this process is one of.",
            "Start one process without TF_CONFIG: it uses all hosts of the TPU.")
    if tpu is not None or name == "tpu":
        if name not in ("auto", "tpu") or tpu is None:
            raise ConfigError(
                f"`strategy` ({name}) and `tpu` ({tpu}) do not go together.",
                "Use --strategy=tpu with --tpu=<name or address>, or --tpu=local.")
        return "tpu"
    if cluster is None:
        if name in ("multi_worker_mirrored", "parameter_server"):
            cause = f"`strategy` ({name}) needs a cluster, and none is described."
            raise ConfigError(cause, _START_A_CLUSTER)
        return name
    fits = "parameter_server" if cluster.has_servers else "multi_worker_mirrored"
    if name not in ("auto", fits):
        raise ConfigError(
            f"`strategy` ({name}) does not go with the cluster that this process is "
            f"one of, which is made for {fits}.",
            f"Use --strategy={fits}, or start the process without a cluster.")
    return fits


def reason(
    name: str, num_devices: int | None, cluster: Cluster | None, tpu: str | None = None
) -> str:
    """Returns why `get_strategy` chose what it did, in a few words."""
    if name != "auto":
        return f"--strategy={name}"
    if tpu is not None:
        return f"--tpu={tpu}"
    if cluster is not None:
        return f"a cluster of {sum(map(len, cluster.jobs.values()))} processes"
    if num_devices is not None:
        return f"--num_devices={num_devices}"
    if tf.config.get_visible_devices("GPU"):
        return "all visible GPUs"
    there = tf.config.list_physical_devices("GPU")
    return "no GPU is visible" if there else "no GPU was found"


def _multi_worker(
    cluster: Cluster, num_devices: int, communication: str, timeout_secs: float
) -> tf.distribute.Strategy:
    gpus = tf.config.get_visible_devices("GPU")
    if len(gpus) > num_devices:
        tf.config.set_visible_devices(gpus[:num_devices], "GPU")
    kind = tf.distribute.experimental.CommunicationImplementation[communication.upper()]
    options = tf.distribute.experimental.CommunicationOptions(implementation=kind)
    others = [cluster.name(rank) for rank in range(len(cluster.addresses))
              if rank != cluster.rank]
    logging.info("Waiting up to %g s for %s.", timeout_secs, ", ".join(others))
    # TensorFlow waits there for all, with Python's lock: no thread of Python's could
    # end it if one of them died on the way.
    faulthandler.dump_traceback_later(timeout_secs, exit=True, file=2)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(cluster.resolver, options)
    finally:
        faulthandler.cancel_dump_traceback_later()


def choose_devices(
    name: str, num_devices: int | None, num_gpus: int
) -> tuple[str, list[str]]:
    """The rule on one machine: the name without `auto`, and the devices' names."""
    if num_devices is not None and num_devices < 1:
        raise ConfigError(
            f"`num_devices` ({num_devices}) must be 1 or more.",
            "Leave it out to use all GPUs, or the CPU where there is none.")
    if name == "one_device" and (num_devices or 1) > 1:
        raise ConfigError(
            f"`num_devices` ({num_devices}) must be 1 with `strategy` one_device.",
            "Leave it out, or use mirrored.")
    if num_gpus and (num_devices or 1) > num_gpus:
        raise ConfigError(
            f"`num_devices` ({num_devices}) is more than the {num_gpus} GPUs that "
            "TensorFlow sees.",
            f"Use at most {num_gpus}; --visible_devices=cpu uses the CPU instead.")
    count = 1 if name == "one_device" else num_devices or num_gpus or 1
    if name == "auto":
        name = "mirrored" if count > 1 else "one_device"
    return name, [f"{'GPU' if num_gpus else 'CPU'}:{i}" for i in range(count)]


def check_batch(
    global_batch_size: int, replicas: int, accumulate_steps: int = 1
) -> None:
    """Checks that every replica and micro-batch gets the same number of examples.

    Raises:
        ConfigError: with the nearest sizes that fit.
    """
    parts = replicas * accumulate_steps
    if global_batch_size > 0 and global_batch_size % parts == 0:
        return
    rule = f"{replicas} replicas"
    if accumulate_steps > 1:
        rule = f"{parts} ({rule} × {accumulate_steps} micro-batches)"
    below = global_batch_size // parts * parts
    sizes = [str(size) for size in (below, below + parts) if size > 0] or [str(parts)]
    raise ConfigError(
        f"`global_batch_size` ({global_batch_size}) must be divisible by {rule}.",
        f"Use {' or '.join(sizes)}.")


def distribute_dataset(
    dataset: tf.data.Dataset, strategy: tf.distribute.Strategy
) -> Any:
    """Deals global batches to the replicas, slice by slice, in the dataset's order.

    Args:
        dataset: batches of a static size that `check_batch` accepts; with several
            workers, this one's part of them.
        strategy: what runs the steps.

    Returns:
        A dataset to iterate over under the strategy: for one replica on the CPU the
        given one, since a distributed iterator costs about 0.2 ms a batch there.
    """
    devices = strategy.extended.worker_devices
    if len(devices) == 1 and "CPU" in devices[0].upper():
        return dataset
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        size = tf.nest.flatten(dataset.element_spec)[0].shape[0]
        mine = dataset.rebatch(size // len(devices))
        return strategy.distribute_datasets_from_function(lambda _: mine)
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        return dataset  # for the chief itself, or for a loop that deals it to workers
    return strategy.experimental_distribute_dataset(dataset)


def _ensure_logical_cpus(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    if len(tf.config.get_logical_device_configuration(cpu) or [None]) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError as error:  # TensorFlow has started with fewer
        raise ConfigError(
            f"`num_devices` ({count}) is more than the "
            f"{len(tf.config.list_logical_devices('CPU'))} that TensorFlow has set up; "
            "they are already initialised.",
            "Make the strategy before any tensor, or restart the notebook's kernel.",
        ) from error
