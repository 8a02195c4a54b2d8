"""Parameter servers: the processes that serve, and the one that needs them.

The chief coordinates: it builds the experiment, hands steps to the workers, evaluates
and writes. The variables lie on the servers; workers and servers do as they are told.
"""

import contextlib
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from mpl.distribute.cluster import Cluster
from mpl.errors import ClusterError, ConfigError

_LOOK_SECS = 1.0
_GONE_SECS = 60.0  # within which a chief may be started again
_ANSWER_SECS = 5.0
_LOG = "Look at its log, or wait longer: --cluster_timeout."


def serve(cluster: Cluster, timeout_secs: float = 300.0) -> None:
    """Serves as a worker or a parameter server until the chief is gone for a minute.

    After SIGTERM it ends as soon as the chief is gone.

    TensorFlow's servers never end and do not tell whether anybody needs them. The chief
    listens at its address from the time when it has found all of them, so this looks
    whether somebody does. A worker that is started again joins in where it was.

    Args:
        cluster: of which this process is a worker or a parameter server.
        timeout_secs: how long to wait for the chief to appear.

    Raises:
        ClusterError: the port is taken, or the chief did not appear.
    """
    own, chief = cluster.jobs[cluster.job][cluster.index], cluster.jobs["chief"][0]
    try:
        server = tf.distribute.Server(
            tf.train.ClusterSpec(dict(cluster.jobs)), job_name=cluster.job,
            task_index=cluster.index, protocol="grpc")
    except tf.errors.OpError as error:
        cause = f"The address {own} cannot be used: {error.message}.".replace("\n", " ")
        remedy = "End the process that uses it, or take another port."
        raise ClusterError(cause, remedy) from error
    logging.info("Serving as %s %d at %s.", cluster.job, cluster.index, server.target)
    # Ctrl-C and SIGTERM reach all; the chief needs its servers to save.
    asked: list[int] = []
    former = {}
    if threading.current_thread() is threading.main_thread():
        former[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        former[signal.SIGTERM] = signal.signal(
            signal.SIGTERM, lambda number, _: asked.append(number)
        )
    has_come, deadline = False, time.monotonic() + timeout_secs
    while time.monotonic() < deadline:
        if _answers(chief):
            has_come, deadline = True, time.monotonic() + _GONE_SECS
        elif asked:
            break
        time.sleep(_LOOK_SECS)
    for number, handler in former.items():
        signal.signal(number, handler)
    if not (has_come or asked):
        cause = f"chief 0 ({chief}) did not start within {timeout_secs:g} s."
        raise ClusterError(cause, _LOG)


@contextlib.contextmanager
def coordinating(
    cluster: Cluster | None, timeout_secs: float = 300.0
) -> Iterator[None]:
    """Waits for all who serve; then makes the loss of a parameter server an error.

    Enter it before the strategy is made, which would wait for ever.

    Args:
        cluster: of which this process is the chief; None: there are no servers.
        timeout_secs: how long to wait.

    Raises:
        ClusterError: a process did not start, or a parameter server is lost.
    """
    if cluster is None:
        yield
        return
    missing = _tasks(cluster, "ps") | _tasks(cluster, "worker")
    deadline = time.monotonic() + timeout_secs
    while missing := _silent(missing):
        if time.monotonic() > deadline:
            cause = f"{', '.join(missing)} did not start within {timeout_secs:g} s."
            raise ClusterError(cause, _LOG)
        time.sleep(_LOOK_SECS)
    tf.get_logger().addFilter(_matters)
    try:
        yield
    except Exception as error:  # some are TensorFlow's own, without a public type
        if not (lost := _lost(cluster, error)):
            raise
        raise ClusterError(
            f"{', '.join(lost)} is gone, and with it variables of the model.",
            "Run the same command again once the cluster is up: it goes on from the "
            "last checkpoint.",
        ) from error
    finally:
        tf.get_logger().removeFilter(_matters)


def check_server_settings(config: Any, replicas: int = 1) -> None:
    """Checks that a run wants nothing that parameter servers cannot give.

    Args:
        config: the run's settings.
        replicas: how many devices a worker has, where that is known.

    Raises:
        ConfigError: with the first setting that does not go with them.
    """
    in_step = "use --strategy=multi_worker_mirrored, in a cluster without ps."
    rules = (
        ("deterministic", config.deterministic, "workers write as they come",
         f"Leave it out, or {in_step}"),
        ("debug_eager", config.debug_eager, "workers run traced steps alone",
         "Leave it out, or use --strategy=one_device."),
        ("jit_compile", config.jit_compile is True, "a step's variables lie elsewhere",
         "Use --jit_compile=auto."),
        ("num_devices", config.num_devices is not None, "a worker has one device",
         "Leave it out."),
        ("communication", config.communication != "auto", "nothing is summed",
         "Use --communication=auto."),
        ("reduce_dtype", config.reduce_dtype != "float32", "nothing is summed",
         "Use --reduce_dtype=float32."),
        ("bucket_mb", config.bucket_mb != 32, "no variables are packed",
         "Use --bucket_mb=32, the default."),
    )  # fmt: skip
    for name, is_set, why, remedy in rules:
        if is_set:
            raise ConfigError(
                f"`{name}` ({getattr(config, name)}) does not go with `strategy` "
                f"parameter_server: {why}.", remedy)
    if replicas > 1:
        cause = f"Each worker has {replicas} GPUs; with parameter servers it takes one."
        raise ConfigError(cause, "Start a worker for each GPU: CUDA_VISIBLE_DEVICES=0.")


def _matters(record: Any) -> bool:
    """Leaves out warnings that the chief computes and traces: to evaluate and save."""
    message = record.getMessage()
    return "without using `ClusterCoordinator.schedule`" not in message and (
        "MultiDeviceSaver" not in message)


def _tasks(cluster: Cluster, job: str) -> dict[str, str]:
    """Returns the addresses of a job by what errors call it: `ps 0 (host:12345)`."""
    return {f"{job} {index} ({address})": address
            for index, address in enumerate(cluster.jobs[job])}


def _silent(tasks: Mapping[str, str]) -> dict[str, str]:
    return {name: at for name, at in tasks.items() if not _answers(at)}


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host, int(port)), _ANSWER_SECS).close()
        return True
    return False


def _lost(cluster: Cluster, error: Exception) -> list[str]:
    """Returns the parameter servers that are gone, or were and are new."""
    servers = _tasks(cluster, "ps")
    named = re.findall(r"remote target /job:ps/replica:0/task:(\d+)", str(error))
    return list(_silent(servers)) or [
        name for index, name in enumerate(servers) if str(index) in named]
