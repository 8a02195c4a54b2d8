"""What the environment says of a cluster, and what is wrong with it."""

import json
import os
import sys
import types

import pytest
import tensorflow as tf

from mpl.distribute import Cluster, find_cluster
from mpl.errors import ClusterError

TWO = {"worker": ["a:1", "b:2"]}
WITH_SERVERS = {"ps": ["p:1"], "worker": ["a:1", "b:2"], "chief": ["c:3"]}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("TF_CONFIG", "KUBERNETES_SELECTOR", "NODE_IP", "WORKERS",
                 "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tf_config(monkeypatch):
    """A function that sets TF_CONFIG, and returns the cluster that is found."""

    def found(cluster, job="worker", index=0, **more):
        config = {"cluster": cluster, "task": {"type": job, "index": index}, **more}
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
        return find_cluster()

    return found


def test_workers_alone(tf_config):
    cluster = tf_config(TWO, "worker", 1)
    assert cluster == Cluster(TWO, "worker", 1)
    assert cluster.addresses == ["a:1", "b:2"]
    assert (cluster.rank, cluster.has_servers) == (1, False)
    assert [cluster.name(0), cluster.name(1)] == ["worker 0 (a:1)", "worker 1 (b:2)"]


def test_the_chief_comes_first_whatever_the_order_of_jobs(tf_config):
    workers_first = {"worker": ["a:1", "b:2"], "chief": ["c:3"]}
    ranks = [tf_config(workers_first, *task).rank
             for task in (("chief", 0), ("worker", 0), ("worker", 1))]
    assert ranks == [0, 1, 2]
    cluster = tf_config(workers_first, "worker", 1)
    assert cluster.addresses == ["c:3", "a:1", "b:2"]
    assert [cluster.name(rank) for rank in range(3)] == [
        "chief 0 (c:3)", "worker 0 (a:1)", "worker 1 (b:2)"]


def test_servers_do_not_train_in_step(tf_config):
    cluster = tf_config(WITH_SERVERS, "ps")
    assert cluster.has_servers
    assert cluster.addresses == ["c:3", "a:1", "b:2"]


@pytest.mark.parametrize("job, index", [("worker", 1), ("chief", 0), ("ps", 0)])
def test_the_resolver_says_the_same_to_tensorflow(job, index, tf_config, monkeypatch):
    gpus = [types.SimpleNamespace(name="GPU:0"), types.SimpleNamespace(name="GPU:1")]
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: gpus)
    resolver = tf_config(WITH_SERVERS, job, index).resolver
    assert resolver.cluster_spec().as_dict() == WITH_SERVERS
    assert (resolver.task_type, resolver.task_id) == (job, index)
    assert (resolver.rpc_layer, resolver.num_accelerators()) == ("grpc", {"GPU": 2})


@pytest.mark.parametrize("text", ["", " ", "{}"])
def test_no_cluster(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    assert find_cluster() is None
    monkeypatch.delenv("TF_CONFIG")
    assert find_cluster() is None


@pytest.mark.parametrize("job", ["worker", "chief"])
def test_one_process_is_no_cluster(job, tf_config):
    assert tf_config({job: ["a:1"]}, job) is None


@pytest.mark.parametrize("text, cause", [
    ("{cluster", r"`TF_CONFIG` is not JSON: Expecting property name.*\."),
    ("[1]", "`TF_CONFIG` lacks the key 'cluster', which must be an object with "
     r"entries\."),
    ('{"task": {}}', "lacks the key 'cluster', which must be an object"),
    ('{"cluster": {}}', "has {} for the key 'cluster', which must be an object"),
    ('{"cluster": {"worker": ["a:1"]}}', "lacks the key 'task', which must be an obj"),
    ('{"cluster": {"worker": ["a:1"]}, "task": {"index": 0}}',
     "lacks the key 'task.type', which must be a string"),
    ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}',
     "lacks the key 'task.index', which must be an integer"),
    ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": "0"}}',
     "has '0' for the key 'task.index', which must be an integer"),
    ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": true}}',
     "has True for the key 'task.index', which must be an integer"),
    ('{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}',
     "has 'a:1' for the key 'cluster.worker', which must be a list with entries"),
    ('{"cluster": {"worker": []}, "task": {"type": "worker", "index": 0}}',
     r"has \[\] for the key 'cluster.worker', which must be a list with entries"),
])
def test_errors_name_the_key(text, cause, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ClusterError, match=cause) as info:
        find_cluster()
    assert info.value.remedy == (
        'Write {"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type":'
        ' "worker", "index": 0}}, or start it by python -m mpl.launch.local.')


@pytest.mark.parametrize("cluster, task, cause, remedy", [
    (TWO, ("worker", 2), "`TF_CONFIG` has the task worker 2, which is not in its "
     "cluster of 2 worker.", "Count the tasks of a job from 0"),
    (TWO, ("worker", -1), "has the task worker -1, which is not in its cluster", ""),
    (TWO, ("chief", 0), "has the task chief 0, which is not in its cluster of 2", ""),
    (TWO, ("evaluator", 0), "`TF_CONFIG` has the job 'evaluator'; jobs are chief, "
     "worker, ps.", "--mode=continuous_eval evaluates beside training."),
    ({**TWO, "evaluator": ["e:1"]}, ("worker", 0), "has the job 'evaluator'; jobs", ""),
    ({"worker": ["a:1", "b"]}, ("worker", 0), "`TF_CONFIG` has the address 'b' in "
     "cluster.worker; addresses are host:port.", "Write {"),
    ({"worker": ["a:1", ":2"]}, ("worker", 0), "has the address ':2' in", ""),
    ({"worker": ["a:1", 7]}, ("worker", 0), "has the address 7 in cluster.worker", ""),
    ({"worker": ["a:1", "a:1"]}, ("worker", 0), "`TF_CONFIG` gives the address a:1 to "
     "2 processes.", "Give each a host and port of its own."),
    ({**WITH_SERVERS, "ps": ["c:3"]}, ("ps", 0), "gives the address c:3 to 2", ""),
    ({"chief": ["a:1", "b:1"]}, ("chief", 0), "`TF_CONFIG` has several chiefs.", ""),
    ({**TWO, "ps": ["p:1"]}, ("ps", 0), "`TF_CONFIG` has parameter servers, and lacks "
     "a chief or workers.", "Add one chief, which coordinates, and workers."),
    ({"chief": ["c:1"], "ps": ["p:1"]}, ("ps", 0), "and lacks a chief or workers", ""),
])
def test_contradictions(cluster, task, cause, remedy, tf_config):
    with pytest.raises(ClusterError) as info:
        tf_config(cluster, *task)
    assert cause in info.value.cause and remedy in info.value.remedy


# Slurm


def slurm_task(monkeypatch, rank, local, node, nodes, per_node, job_id=0):
    tasks = {"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURMD_NODENAME": node,
             "SLURM_STEP_NUM_TASKS": 3, "SLURM_STEP_NODELIST": nodes,
             "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_JOB_ID": job_id}
    for name, value in tasks.items():
        monkeypatch.setenv(name, str(value))


def test_each_slurm_task_finds_its_own_address(monkeypatch):
    """As text n10 comes before n9, whose tasks have the ranks 0 and 1."""
    found = []
    for task in ((0, 0, "n9"), (1, 1, "n9"), (2, 0, "n10")):
        slurm_task(monkeypatch, *task, "n[9-10]", "2,1", job_id=3)
        cluster = find_cluster()
        assert cluster.addresses == ["n10:15048", "n9:15048", "n9:15049"]
        found.append(cluster.addresses[cluster.rank])
        resolver = cluster.resolver
        # TensorFlow asks for the addresses first, and then for its place.
        assert resolver.cluster_spec().as_dict() == {"worker": cluster.addresses}
        assert (resolver.task_type, resolver.task_id) == ("worker", cluster.rank)
    assert found == ["n9:15048", "n9:15049", "n10:15048"]


def test_slurm_jobs_have_ports_of_their_own(monkeypatch):
    ports = set()
    for job_id in range(10**6, 10**6 + 625):
        slurm_task(monkeypatch, 0, 0, "a", "a,b", "2,1", job_id)
        ports.add(int(find_cluster().addresses[0].removeprefix("a:")))
    assert len(ports) == 625 and min(ports) == 15000 and max(ports) == 15000 + 624 * 16


def test_slurm_leaves_gpus_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    slurm_task(monkeypatch, 2, 2, "a", "a", "3")
    assert find_cluster().rank == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_one_slurm_task_is_no_cluster(monkeypatch):
    slurm_task(monkeypatch, 0, 0, "a", "a", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert find_cluster() is None


def test_tf_config_comes_before_slurm(monkeypatch, tf_config):
    slurm_task(monkeypatch, 0, 0, "n1", "n1", "3")
    assert tf_config(TWO).addresses == ["a:1", "b:2"]


@pytest.mark.parametrize("name, value, cause", [
    ("SLURM_PROCID", None, "SLURM_PROCID not found in environment"),
    ("SLURM_STEP_NODELIST", None, "SLURM_STEP_NODELIST not found in environment"),
    ("SLURMD_NODENAME", None, "SLURMD_NODENAME"),
    ("SLURM_LOCALID", None, "SLURM_LOCALID"),
    ("SLURM_JOB_ID", None, "SLURM_JOB_ID"),
    ("SLURMD_NODENAME", "c", "'c:15000' is not in list"),
    ("SLURM_STEP_NODELIST", "n[1", "Invalid hostlist format"),
    ("SLURM_STEP_TASKS_PER_NODE", "1,1", "Requested 3 tasks but only 2 were assigned"),
])
def test_a_slurm_step_that_cannot_be_read(name, value, cause, monkeypatch):
    slurm_task(monkeypatch, 0, 0, "a", "a,b", "2,1")
    monkeypatch.delenv(name)
    if value is not None:
        monkeypatch.setenv(name, value)
    with pytest.raises(ClusterError, match="The Slurm step cannot be read") as info:
        find_cluster()
    assert cause in info.value.cause
    assert info.value.remedy == "Start it by srun, or set TF_CONFIG."


# Kubernetes


@pytest.fixture
def pods(monkeypatch):
    """A function that sets what a fake client lists: names, addresses, phases."""
    selectors = []

    def listed(*pods):
        items = [
            types.SimpleNamespace(
                metadata=types.SimpleNamespace(name=name),
                status=types.SimpleNamespace(host_ip=host_ip, phase=phase))
            for name, host_ip, phase in pods]

        class CoreV1Api:
            def list_pod_for_all_namespaces(self, label_selector):
                selectors.append(label_selector)
                return types.SimpleNamespace(items=items)

        module = types.ModuleType("kubernetes")
        module.client = types.SimpleNamespace(CoreV1Api=CoreV1Api)
        module.config = types.SimpleNamespace(load_incluster_config=lambda: None)
        monkeypatch.setitem(sys.modules, "kubernetes", module)
        monkeypatch.setenv("KUBERNETES_SELECTOR", "job-name=digits")
        return selectors

    return listed


def test_a_worker_for_each_pod(pods, monkeypatch):
    selectors = pods(("digits-1", "10.0.0.1", "Running"),
                     ("digits-0", "10.0.0.2", "Running"))
    monkeypatch.setenv("NODE_IP", "10.0.0.1")
    cluster = find_cluster()
    assert cluster.addresses == ["10.0.0.2:8470", "10.0.0.1:8470"]
    assert (cluster.job, cluster.rank, cluster.resolver.task_id) == ("worker", 1, 1)
    assert set(selectors) == {"job-name=digits"}


@pytest.mark.parametrize("workers, there, count", [
    (None, 1, 2), ("3", 2, 3), ("two", 2, "two")])
def test_pods_that_are_not_all_there(workers, there, count, pods, monkeypatch):
    pods(*[(f"p{n}", f"10.0.0.{n}", "Running") for n in range(there)])
    monkeypatch.setenv("NODE_IP", "10.0.0.0")
    if workers:
        monkeypatch.setenv("WORKERS", workers)
    with pytest.raises(ClusterError, match=f"lists {there} of {count} pods"):
        find_cluster()


@pytest.mark.parametrize("listed, node_ip, cause", [
    ([("p0", "10.0.0.1", "Running"), ("p1", "10.0.0.2", "Pending")], "10.0.0.1",
     "The pods cannot be listed: .*\"p1\" is not running; phase: \"Pending\""),
    ([("p0", "10.0.0.1", "Running")], None, r"`NODE_IP` \(None\) is no address of a "
     "pod's node: 10.0.0.1:8470."),
    ([], "10.0.0.1", r"`NODE_IP` \(10.0.0.1\) is no .*: there are none."),
])
def test_pods_that_are_no_cluster_yet(listed, node_ip, cause, pods, monkeypatch):
    pods(*listed)
    if node_ip:
        monkeypatch.setenv("NODE_IP", node_ip)
    with pytest.raises(ClusterError, match=cause) as info:
        find_cluster()
    assert info.value.remedy.startswith("See docs/clusters.md for what a pod needs")


def test_two_pods_on_one_node(pods, monkeypatch):
    pods(("p0", "10.0.0.1", "Running"), ("p1", "10.0.0.1", "Running"))
    monkeypatch.setenv("NODE_IP", "10.0.0.1")
    with pytest.raises(ClusterError, match="`KUBERNETES_SELECTOR` gives the address "
                       "10.0.0.1:8470 to 2 processes"):
        find_cluster()


def test_without_the_kubernetes_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.setenv("KUBERNETES_SELECTOR", "job-name=digits")
    with pytest.raises(ClusterError, match="The pods cannot be listed: .*kubernetes"):
        find_cluster()
