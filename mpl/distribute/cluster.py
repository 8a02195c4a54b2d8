"""Which processes train together: TF_CONFIG, Slurm or Kubernetes, checked."""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from mpl.errors import ClusterError

_resolvers = tf.distribute.cluster_resolver
JOBS = ("chief", "worker", "ps")
_EXAMPLE = (
    'Write {"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": '
    '"worker", "index": 0}}, or start it by python -m mpl.launch.local.'
)
_SLURM_PORTS = range(15000, 25000, 16)  # a node's tasks take consecutive ports
_KUBERNETES_PORT = 8470


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, and which of them this one is.

    Attributes:
        jobs: addresses `host:port` by job: "chief", "worker", "ps".
        job: of this process.
        index: of this process in its job.
        resolver: TensorFlow's, for its strategies.
    """

    jobs: Mapping[str, Sequence[str]]
    job: str
    index: int
    resolver: Any = dataclasses.field(compare=False, default=None)

    @property
    def has_servers(self) -> bool:
        """Whether there are parameter servers."""
        return bool(self.jobs.get("ps"))

    @property
    def addresses(self) -> list[str]:
        """Of all who train in step, the chief's first."""
        return [*self.jobs.get("chief", ()), *self.jobs.get("worker", ())]

    @property
    def rank(self) -> int:
        """The place of this process in `addresses`."""
        before = self.jobs.get("chief", ()) if self.job == "worker" else ()
        return len(before) + self.index

    def name(self, rank: int) -> str:
        """Returns what errors call a process: `worker 1 (host1:12345)`."""
        chiefs = len(self.jobs.get("chief", ()))
        job, index = ("chief", rank) if rank < chiefs else ("worker", rank - chiefs)
        return f"{job} {index} ({self.addresses[rank]})"


def find_cluster(environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """Returns the cluster that the environment describes; None: this process alone.

    In this order: `TF_CONFIG`; Kubernetes, where `KUBERNETES_SELECTOR` holds the label
    selector of the pods and `NODE_IP` the address of this pod's node; a Slurm step of
    several tasks.

    Raises:
        ClusterError: the description is incomplete or contradicts itself.
    """
    if environ.get("TF_CONFIG", "").strip() not in ("", "{}"):
        return _from_tf_config(environ["TF_CONFIG"])
    if environ.get("KUBERNETES_SELECTOR"):
        return _from_kubernetes(environ, _kubernetes_client)
    if int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return _from_slurm(environ)
    return None


def _from_tf_config(text: str) -> Cluster | None:
    try:
        config = json.loads(text)
    except ValueError as error:
        cause = f"`TF_CONFIG` is not JSON: {error}."
        raise ClusterError(cause, _EXAMPLE) from error
    jobs = _key(config, "cluster", dict)
    for job, addresses in jobs.items():
        if job not in JOBS:
            rule = f"`TF_CONFIG` has the job {job!r}; jobs are {', '.join(JOBS)}."
            remedy = "Leave it out; --mode=continuous_eval evaluates beside training."
            raise ClusterError(rule, remedy)
        _key(jobs, job, list, "cluster.")
        for address in addresses:
            host, _, port = str(address).rpartition(":")
            if not (host and port.isdecimal()):
                rule = f"`TF_CONFIG` has the address {address!r} in cluster.{job}; "
                raise ClusterError(rule + "addresses are host:port.", _EXAMPLE)
    task = _key(config, "task", dict)
    job, index = _key(task, "type", str, "task."), _key(task, "index", int, "task.")
    if not 0 <= index < len(jobs.get(job, ())):
        counts = ", ".join(f"{len(addresses)} {job}" for job, addresses in jobs.items())
        raise ClusterError(
            f"`TF_CONFIG` has the task {job} {index}, which is not in its cluster of "
            f"{counts}.",
            "Count the tasks of a job from 0, and list the addresses of all.",
        )
    return _checked(Cluster(
        jobs, job, index, _resolvers.TFConfigClusterResolver()), "TF_CONFIG")


def _key(mapping: Any, key: str, kind: type, path: str = "") -> Any:
    """Returns an entry of TF_CONFIG."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if isinstance(value, kind) and not isinstance(value, bool) and value not in ({}, []):
        return value
    kinds = {dict: "an object", list: "a list", str: "a string", int: "an integer"}
    lacks = "lacks the key" if value is None else f"has {value!r} for the key"
    raise ClusterError(
        f"`TF_CONFIG` {lacks} {path + key!r}, which must be {kinds[kind]} and hold "
        "something.", _EXAMPLE)


def _from_slurm(environ: Mapping[str, str]) -> Cluster | None:
    """A worker for each task of the step, on its node's name and its own port."""
    try:
        job_id = int(environ.get("SLURM_JOB_ID", 0))
        resolver = _resolvers.SlurmClusterResolver(
            port_base=_SLURM_PORTS[job_id % len(_SLURM_PORTS)],
            # Which GPU a task sees is left to Slurm; the resolver must only not ask.
            gpus_per_node=2**10, gpus_per_task=1, auto_set_gpu=False)
        addresses = resolver.cluster_spec().as_dict()["worker"]
        # The resolver sorts the nodes by name, which need not be the ranks' order.
        host, local = environ["SLURMD_NODENAME"], int(environ["SLURM_LOCALID"])
        own = [address for address in addresses if address.startswith(f"{host}:")][local]
    except (RuntimeError, ValueError, LookupError) as error:
        cause = f"The Slurm step cannot be read: {error}.".replace("\n", " ")
        raise ClusterError(cause, "Start it by srun, or set TF_CONFIG.") from error
    resolver.task_type, resolver.task_id = "worker", addresses.index(own)
    return _checked(
        Cluster({"worker": addresses}, "worker", resolver.task_id, resolver), "Slurm")


def _kubernetes_client() -> Any:
    from kubernetes import client, config

    config.load_incluster_config()
    return client.CoreV1Api()


def _from_kubernetes(
    environ: Mapping[str, str], make_client: Callable[[], Any]
) -> Cluster | None:
    """A worker for each pod of the selector; the resolver tells their nodes' addresses."""
    try:
        resolver = _resolvers.KubernetesClusterResolver(
            {"worker": [environ["KUBERNETES_SELECTOR"]]},
            tf_server_port=_KUBERNETES_PORT, override_client=make_client())
        addresses = resolver.cluster_spec().as_dict()["worker"]
        own = addresses.index(f"{environ['NODE_IP']}:{_KUBERNETES_PORT}")
    except Exception as error:  # of a client that is no part of mpl
        cause = f"The pods cannot be listed: {error!r}.".replace("\n", " ")
        remedy = "See docs/clusters.md for what a pod needs, or set TF_CONFIG."
        raise ClusterError(cause, remedy) from error
    resolver.task_type, resolver.task_id = "worker", own
    return _checked(Cluster({"worker": addresses}, "worker", own, resolver),
                    "KUBERNETES_SELECTOR")


def _checked(cluster: Cluster, source: str) -> Cluster | None:
    """Returns the cluster, or None if it is this process alone."""
    everyone = [*cluster.addresses, *cluster.jobs.get("ps", ())]
    (address, count), = collections.Counter(everyone).most_common(1)
    if count > 1:
        rule = f"`{source}` gives the address {address} to {count} processes."
        raise ClusterError(rule, "Give each a host and port of its own.")
    if len(cluster.jobs.get("chief", ())) > 1:
        raise ClusterError(f"`{source}` has several chiefs.", "Have one chief at most.")
    if cluster.has_servers and not (
        cluster.jobs.get("chief") and cluster.jobs.get("worker")
    ):
        rule = f"`{source}` has parameter servers, and lacks a chief or workers."
        raise ClusterError(rule, "Add one chief, which coordinates, and workers.")
    return cluster if len(everyone) > 1 else None
