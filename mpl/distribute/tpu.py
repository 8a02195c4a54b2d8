"""Connecting with a TPU, within a bounded time."""

import queue
import threading
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.errors import ClusterError

_REMEDY = (
    "Check that the TPU runs and --tpu is its name, its address grpc://host:8470, or "
    "local; --cluster_timeout waits longer, and without --tpu this machine trains."
)


def connect(name: str, timeout_secs: float) -> tf.distribute.Strategy:
    """Connects with a TPU, starts it anew, and returns its strategy.

    From then on this thread's operations run on the TPU's host, if that is another.

    Args:
        name: of a Cloud TPU, or its address `grpc://host:port`; `local`: the TPU of
            this machine.
        timeout_secs: how long all of it may take.

    Raises:
        ClusterError: there is no such TPU, or it did not answer in time.

    Source: https://www.tensorflow.org/guide/tpu
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def start() -> None:
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
            tf.config.experimental_connect_to_cluster(
                resolver, make_master_device_default=False)
            tf.tpu.experimental.initialize_tpu_system(resolver)
            outcome.put((tf.distribute.TPUStrategy(resolver), resolver.master()))
        except Exception as error:
            outcome.put(error)

    # Nothing can break these calls off; a daemon thread does not keep a process alive.
    threading.Thread(target=start, daemon=True).start()
    try:
        result = outcome.get(timeout=timeout_secs)
    except queue.Empty:
        cause = f"The TPU {name!r} did not answer within {timeout_secs:g} s."
        raise ClusterError(cause, _REMEDY) from None
    if isinstance(result, Exception):
        reason = str(result).partition("\n")[0].rstrip(".")
        cause = f"The TPU {name!r} cannot be used: {type(result).__name__}: {reason}."
        raise ClusterError(cause, _REMEDY) from result
    strategy, master = result
    if master:
        # TensorFlow's call would enter it for its own thread, which has ended.
        tf.device("/job:worker/replica:0/task:0/device:CPU:0").__enter__()
    cores, hosts = strategy.num_replicas_in_sync, strategy.extended.num_hosts
    logging.info("TPU %s: cores: %d, hosts: %d.", name, cores, hosts)
    return strategy
