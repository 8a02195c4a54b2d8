"""Which devices take part in a step."""

from typing import Any

import tensorflow as tf

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
    name: str = "auto",
    num_devices: int | None = None,
    *,
    cluster: Cluster | None = None,
    tpu: str | None = None,
    communication: str = "auto",
    timeout_secs: float = 300.0,
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
    name = choose_name(name, cluster, tpu)
    if name == "tpu":
        return tpu_lib.connect(tpu, timeout_secs)
    if name == "parameter_server":
        assert cluster
        return tf.distribute.ParameterServerStrategy(cluster.resolver)
    # Physical devices: listing logical ones would fix the number of logical CPUs.
    gpus = tf.config.get_visible_devices("GPU")
    num_gpus = len(gpus)
    if num_gpus and name != "multi_worker_mirrored":
        num_gpus = len(tf.config.list_logical_devices("GPU"))
    if name == "multi_worker_mirrored":
        return _multi_worker(cluster, num_devices, gpus, communication)
    name, devices = choose_devices(name, num_devices, num_gpus)
    if not num_gpus:
        _ensure_logical_cpus(len(devices))
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    if communication == "ring" or communication == "nccl" and not num_gpus:
        raise ConfigError(
            f"`communication` ({communication}) does not go with `strategy` mirrored"
            + (" on CPUs." if communication == "nccl" else "."),
            "Use --communication=auto; ring is for several processes, nccl for GPUs.",
        )
    if num_gpus:  # by TensorFlow's collectives, which are NCCL's
        return tf.distribute.MirroredStrategy(devices)
    # TensorFlow's own choice on CPUs, collectives, keeps one group size for the life of
    # a process: a second strategy of another size would fail.
    return tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def choose_name(name: str, cluster: Cluster | None, tpu: str | None) -> str:
    """Returns the name of the strategy, `auto` where this machine's devices decide.

    Raises:
        ConfigError: the name is unknown, or does not go with the cluster or the TPU.
    """
    if name not in NAMES:
        raise ConfigError(
            f"`strategy` ({name}) is unknown.", f"Use one of {', '.join(NAMES)}."
        )
    if tpu is not None or name == "tpu":
        if name not in ("auto", "tpu") or tpu is None:
            raise ConfigError(
                f"`strategy` ({name}) and `tpu` ({tpu}) do not go together.",
                "Use --strategy=tpu with --tpu=<name or address>, or --tpu=local.",
            )
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
            f"Use --strategy={fits}, or start the process without a cluster.",
        )
    return fits


def reason(name: str, num_devices: int | None, cluster: Cluster | None) -> str:
    """Returns why `get_strategy` chose what it did, in a few words."""
    if name != "auto":
        return f"--strategy={name}"
    if cluster is not None:
        return f"a cluster of {sum(map(len, cluster.jobs.values()))} processes"
    if num_devices is not None:
        return f"--num_devices={num_devices}"
    count = len(tf.config.get_visible_devices("GPU"))
    return f"GPUs found: {count}" if count else "no GPU was found"


def _multi_worker(
    cluster: Cluster | None, num_devices: int | None, gpus: list, communication: str
) -> tf.distribute.Strategy:
    assert cluster
    if (num_devices or 1) > (len(gpus) or 1):
        raise ConfigError(
            f"`num_devices` ({num_devices}) is more than the {len(gpus) or 1} of each "
            "process.",
            "Use fewer, or more processes; without GPUs a process has one device.",
        )
    if communication == "nccl" and not gpus:
        cause = "`communication` (nccl) needs GPUs, and TensorFlow sees none."
        raise ConfigError(cause, "Use --communication=auto or ring.")
    if num_devices and gpus:
        tf.config.set_visible_devices(gpus[:num_devices], "GPU")
    kind = tf.distribute.experimental.CommunicationImplementation[communication.upper()]
    options = tf.distribute.experimental.CommunicationOptions(implementation=kind)
    return tf.distribute.MultiWorkerMirroredStrategy(cluster.resolver, options)


def choose_devices(
    name: str, num_devices: int | None, num_gpus: int
) -> tuple[str, list[str]]:
    """The rule on one machine: the name without `auto`, and the devices' names."""
    if num_devices is not None and num_devices < 1:
        raise ConfigError(
            f"`num_devices` ({num_devices}) must be 1 or more.",
            "Leave it out to use all GPUs, or the CPU where there is none.",
        )
    if name == "one_device" and (num_devices or 1) > 1:
        raise ConfigError(
            f"`num_devices` ({num_devices}) must be 1 with `strategy` one_device.",
            "Leave it out, or use mirrored.",
        )
    if num_gpus and (num_devices or 1) > num_gpus:
        raise ConfigError(
            f"`num_devices` ({num_devices}) is more than the {num_gpus} GPUs that "
            "TensorFlow sees.",
            f"Use at most {num_gpus}; --visible_devices=cpu uses the CPU instead.",
        )
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
        f"Use {' or '.join(sizes)}.",
    )


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
        size = next(iter(tf.nest.flatten(dataset.element_spec))).shape[0]
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
