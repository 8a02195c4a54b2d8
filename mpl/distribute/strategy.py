"""Which devices take part in a step."""

from typing import Any

import tensorflow as tf
from absl import logging

from mpl.errors import ConfigError

NAMES = ("auto", "one_device", "mirrored")
_LATER = ("multi_worker_mirrored", "parameter_server", "tpu")


def get_strategy(
    name: str = "auto", num_devices: int | None = None
) -> tf.distribute.Strategy:
    """Makes the strategy; nothing may have used TensorFlow's devices before.

    Args:
        name: `one_device`; `mirrored`: a replica on each device; `auto`: mirrored with
            several GPUs or `num_devices` > 1, else one device.
        num_devices: how many replicas; None: one for each GPU, 1 where there is none.
            Without a GPU they are logical devices of the CPU, to try things out.

    Raises:
        ConfigError: an unknown name, a number that does not go with it, fewer devices
            than asked for.
    """
    # Physical devices: listing logical ones would fix the number of logical CPUs.
    num_gpus = len(tf.config.get_visible_devices("GPU"))
    if num_gpus:
        num_gpus = len(tf.config.list_logical_devices("GPU"))
    name, devices = choose_devices(name, num_devices, num_gpus)
    if not num_gpus:
        _ensure_logical_cpus(len(devices))
    logging.info("Strategy %s on %s.", name, ", ".join(devices))
    if name == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    if "GPU" in devices[0]:
        return tf.distribute.MirroredStrategy(devices)
    # TensorFlow's own choice on CPUs, collectives, keeps one group size for the life of
    # a process: a second strategy of another size would fail.
    return tf.distribute.MirroredStrategy(
        devices, cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def choose_devices(
    name: str, num_devices: int | None, num_gpus: int
) -> tuple[str, list[str]]:
    """The rule of `get_strategy`: the name without `auto`, and the devices' names."""
    if name not in NAMES:
        raise ConfigError(
            f"`strategy` ({name}) "
            + ("is not part of this version." if name in _LATER else "is unknown."),
            f"Use one of {', '.join(NAMES)}.",
        )
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
            f"Use at most {num_gpus}; CUDA_VISIBLE_DEVICES=-1 uses the CPU instead.",
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
        dataset: batches of a static size that `check_batch` accepts.
        strategy: what runs the steps.

    Returns:
        A dataset to iterate over under the strategy: for one replica on the CPU the
        given one, since a distributed iterator costs about 0.2 ms a batch there.
    """
    devices = strategy.extended.worker_devices
    if len(devices) == 1 and "CPU" in devices[0].upper():
        return dataset
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
