"""Which processes train together: TF_CONFIG, Slurm or Kubernetes, checked."""

import collections
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
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
    """

    jobs: Mapping[str, Sequence[str]]
    job: str
    index: int

    @property
    def resolver(self) -> tf.distribute.cluster_resolver.ClusterResolver:
        """What TensorFlow's strategies take, with the GPUs visible by now."""
        # Slurm's own takes SLURM_PROCID as the index whenever it is asked, and sorts.
        gpus = tf.config.get_visible_devices("GPU")
        return _resolvers.SimpleClusterResolver(
            tf.train.ClusterSpec(dict(self.jobs)), task_type=self.job,
            task_id=self.index, num_accelerators={"GPU": len(gpus)}, rpc_layer="grpc")

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


def find_cluster() -> Cluster | None:
    """Returns the cluster that the environment describes; None: this process alone.

    In this order: `TF_CONFIG`; Kubernetes, where `KUBERNETES_SELECTOR` holds the label
    selector of the pods and `NODE_IP` the address of this pod's node; a Slurm step of
    several tasks.

    Raises:
        ClusterError: the description is incomplete or contradicts itself.
    """
    if os.environ.get("TF_CONFIG", "").strip() not in ("", "{}"):
        return _from_tf_config(os.environ["TF_CONFIG"])
    if selector := os.environ.get("KUBERNETES_SELECTOR"):
        return _from_kubernetes(selector, os.environ.get("NODE_IP"))
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_slurm()
    return None


def _from_tf_config(text: str) -> Cluster | None:
    try:
        config = json.loads(text)
    except ValueError as error:
        cause = f"`TF_CONFIG` is not JSON: {error}."
        raise ClusterError(cause, _EXAMPLE) from error
    jobs, task = _key(config, "cluster", dict), _key(config, "task", dict)
    job, index = _key(task, "type", str, "task."), _key(task, "index", int, "task.")
    for name in [*jobs, job]:
        if name not in JOBS:
            rule = f"`TF_CONFIG` has the job {name!r}; jobs are {', '.join(JOBS)}."
            remedy = ("Correct it or leave it out; --mode=continuous_eval evaluates "
                      "beside training.")
            raise ClusterError(rule, remedy)
    for name in jobs:
        for address in _key(jobs, name, list, "cluster."):
            host, _, port = str(address).rpartition(":")
            if not (host and port.isdecimal()):
                rule = f"`TF_CONFIG` has the address {address!r} in cluster.{name}; "
                raise ClusterError(rule + "addresses are host:port.", _EXAMPLE)
    if not 0 <= index < len(jobs.get(job, ())):
        counts = ", ".join(f"{len(jobs[name])} {name}" for name in jobs)
        raise ClusterError(
            f"`TF_CONFIG` has the task {job} {index}, which is not in its cluster of "
            f"{counts}.",
            "Count the tasks of a job from 0, and list the addresses of all.")
    return _checked(Cluster(jobs, job, index), "TF_CONFIG")


def _key(mapping: Any, key: str, kind: type, path: str = "") -> Any:
    """Returns an entry of TF_CONFIG."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if fits and value not in ({}, []):
        return value
    kinds = {dict: "an object with entries", list: "a list with entries",
             str: "a string", int: "an integer"}
    lacks = "lacks the key" if value is None else f"has {value!r} for the key"
    rule = f"`TF_CONFIG` {lacks} {path + key!r}, which must be {kinds[kind]}."
    raise ClusterError(rule, _EXAMPLE)


def _from_slurm() -> Cluster | None:
    """A worker for each task of the step, on its node's name and its own port."""
    try:
        port = _SLURM_PORTS[int(os.environ["SLURM_JOB_ID"]) % len(_SLURM_PORTS)]
        # Which GPU a task sees is left to Slurm; the resolver must only not ask.
        resolver = _resolvers.SlurmClusterResolver(
            port_base=port, gpus_per_node=2**10, gpus_per_task=1, auto_set_gpu=False)
        addresses = resolver.cluster_spec().as_dict()["worker"]
        # The resolver sorts the nodes by name, which need not be the ranks' order.
        own_port = port + int(os.environ["SLURM_LOCALID"])
        index = addresses.index(f"{os.environ['SLURMD_NODENAME']}:{own_port}")
    except (RuntimeError, ValueError, LookupError) as error:
        cause = f"The Slurm step cannot be read: {error!r}.".replace("\n", " ")
        raise ClusterError(cause, "Start it by srun, or set TF_CONFIG.") from error
    return _checked(Cluster({"worker": addresses}, "worker", index), "Slurm")


def _from_kubernetes(selector: str, node_ip: str | None) -> Cluster | None:
    """A worker for each pod of the selector, at its node's address."""
    remedy = "See docs/clusters.md for what a pod needs, or set TF_CONFIG."
    try:
        from kubernetes import client, config

        config.load_incluster_config()
        resolver = _resolvers.KubernetesClusterResolver(
            {"worker": [selector]}, _KUBERNETES_PORT,
            override_client=client.CoreV1Api())
        addresses = list(resolver.cluster_spec().as_dict()["worker"])
    except Exception as error:  # of a client that is no part of mpl
        cause = f"The pods cannot be listed: {error!r}.".replace("\n", " ")
        raise ClusterError(cause, remedy) from error
    own = f"{node_ip}:{_KUBERNETES_PORT}"
    if own not in addresses:
        where = ", ".join(addresses) or "there are none"
        cause = f"`NODE_IP` ({node_ip}) is no address of a pod's node: {where}."
        raise ClusterError(cause, remedy)
    count = os.environ.get("WORKERS") or str(max(2, len(addresses)))
    if count != str(len(addresses)):
        cause = f"`KUBERNETES_SELECTOR` lists {len(addresses)} of {count} pods."
        raise ClusterError(cause, "Start again when all are there, or correct WORKERS.")
    return _checked(Cluster({"worker": addresses}, "worker", addresses.index(own)),
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
    if cluster.has_servers and not {"chief", "worker"} <= cluster.jobs.keys():
        rule = f"`{source}` has parameter servers, and lacks a chief or workers."
        raise ClusterError(rule, "Add one chief, which coordinates, and workers.")
    return cluster if len(everyone) > 1 else None
