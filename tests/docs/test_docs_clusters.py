"""What docs/clusters.md gives to paste."""

import json
import os
import pathlib
import re
import subprocess
import textwrap

import pytest

from mpl.distribute import find_cluster

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def blocks(language, holds):
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [block for block in found if holds in block]


def run(script, environ, check=True):
    """Runs bash with this environment alone."""
    path = f"{environ.pop('FIRST', '')}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-eu", "-c", script], env={"PATH": path, **environ}, check=check,
        capture_output=True, text=True, timeout=20)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("TF_CONFIG", "KUBERNETES_SELECTOR", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def set_environ(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_tf_config_by_hand(monkeypatch):
    (script,) = blocks("bash", "# on host0")
    for index, text in enumerate(re.findall(r"export TF_CONFIG='(.*)'", script)):
        set_environ(monkeypatch, TF_CONFIG=text)
        cluster = find_cluster()
        assert cluster.addresses == ["host0:12345", "host1:12345"]
        assert cluster.rank == index
    assert index == 1


# Slurm


@pytest.fixture
def slurm():
    (script,) = blocks("bash", "#SBATCH")
    return script


def test_slurm_passes_the_shell_check(slurm, tmp_path):
    assert slurm.startswith("#!/bin/bash\n#SBATCH ")
    (tmp_path / "script").write_text(slurm)
    subprocess.run(["bash", "-n", str(tmp_path / "script")], check=True, timeout=20)


@pytest.mark.parametrize("status, requeued", [(0, []), (1, []), (42, ["requeue 42"])])
def test_slurm_requeues_what_the_signal_stopped(slurm, status, requeued, tmp_path):
    for name in ("srun", "scontrol"):
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/{name}.log\n'
                        f"exit {status if name == 'srun' else 0}\n")
        path.chmod(0o755)
    script = slurm.partition("\n\n")[2]
    done = subprocess.run(
        ["bash", "-c", script], timeout=20, capture_output=True, env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42",
            "SLURM_CPUS_PER_TASK": "8", "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (status, b"")
    (words,) = (tmp_path / "srun.log").read_text().splitlines()
    assert words == (
        "--cpus-per-task=8 --label --wait=60 .venv/bin/python -m experiments.digits "
        "--workdir=runs/digits --global_batch_size=512")
    log = tmp_path / "scontrol.log"
    assert (log.read_text().splitlines() if log.exists() else []) == requeued


@pytest.mark.parametrize("nodes, names, per_node", [
    ("n[9-10]", ["n9", "n10"], "1(x2)"), ("gpu-a,gpu-b", ["gpu-a", "gpu-b"], "1(x2)"),
    ("n[9-10]", ["n9", "n9", "n10", "n10"], "2(x2)"),
    ("node[099-100]", ["node099", "node100", "node100"], "1,2"),
])
def test_what_srun_sets_makes_the_cluster_of_the_page(
    nodes, names, per_node, monkeypatch
):
    job_id = 5_000_123
    base = 15000 + 16 * (job_id % 625)  # as the page says
    assert "15000 + 16 × (job id mod 625)" in PAGE
    found, clusters = [], []
    for rank, name in enumerate(names):
        local = names[:rank].count(name)
        set_environ(
            monkeypatch, SLURM_JOB_ID=job_id, SLURM_PROCID=rank, SLURM_LOCALID=local,
            SLURMD_NODENAME=name, SLURM_STEP_NUM_TASKS=len(names),
            SLURM_STEP_NODELIST=nodes, SLURM_STEP_TASKS_PER_NODE=per_node)
        cluster = find_cluster()
        clusters.append(cluster.addresses)
        found.append(cluster.addresses[cluster.rank])
        assert found[-1] == f"{name}:{base + local}"
    assert sorted(found) == sorted(clusters[0])
    assert all(addresses == clusters[0] for addresses in clusters)


# Kubernetes


def manifest(holds):
    (text,) = blocks("yaml", holds)
    return text


def shell_of(text):
    """The script of the container, read without a YAML library."""
    lines = text.partition("- |\n")[2].splitlines(keepends=True)
    indent = len(lines[0]) - len(lines[0].lstrip())
    ends = [i for i, line in enumerate(lines) if not line.startswith(" " * indent)]
    return textwrap.dedent("".join(lines[:ends[0]]))


@pytest.mark.parametrize("workers", [1, 2, 12])
def test_the_shell_of_the_jobset_makes_tf_config(workers, monkeypatch, tmp_path):
    shell = shell_of(manifest("kind: JobSet"))
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$TF_CONFIG" "$@"\n')
    python.chmod(0o755)
    for index in range(workers):
        done = run(shell, {"FIRST": f"{tmp_path}:", "WORKERS": str(workers),
                           "JOBSET": "digits", "JOB_COMPLETION_INDEX": str(index)})
        text, *words = done.stdout.splitlines()
        assert words == ["-m", "experiments.digits", "--workdir=/runs/digits",
                         "--global_batch_size=128"]
        addresses = [f"digits-worker-0-{i}.digits:12345" for i in range(workers)]
        task = {"type": "worker", "index": index}
        assert json.loads(text) == {"cluster": {"worker": addresses}, "task": task}
        set_environ(monkeypatch, TF_CONFIG=text)
        cluster = find_cluster()
        if workers == 1:
            assert cluster is None
        else:
            assert (cluster.addresses, cluster.rank) == (addresses, index)


def test_the_shell_of_the_jobset_fails_without_its_variables():
    shell = shell_of(manifest("kind: JobSet"))
    done = run(shell, {"WORKERS": "2", "JOBSET": "digits"}, check=False)
    assert done.returncode != 0 and "JOB_COMPLETION_INDEX" in done.stderr


def test_kubernetes_replaces_nothing_in_the_shell():
    """It would expand $(NAME), and turn $$ into $."""
    shell = shell_of(manifest("kind: JobSet"))
    assert "TF_CONFIG" in shell and "$(" not in shell and "$$" not in shell


def test_the_jobset():
    yaml = pytest.importorskip("yaml")
    storage, jobset = yaml.safe_load_all(manifest("kind: JobSet"))
    assert (jobset["apiVersion"], jobset["kind"]) == (
        "jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    assert (job["name"], job["replicas"]) == ("worker", 1)  # the shell relies on it
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environ = {entry["name"]: entry for entry in container["env"]}
    assert spec["parallelism"] == spec["completions"] == 2
    assert environ["WORKERS"]["value"] == "2"
    assert container["args"] == [shell_of(manifest("kind: JobSet"))]
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == storage["metadata"]["name"]


def test_the_job_for_the_resolver():
    yaml = pytest.importorskip("yaml")
    account, role, binding, job = yaml.safe_load_all(manifest("KUBERNETES_SELECTOR"))
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == account["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert pod["hostNetwork"] is True
    (container,) = pod["containers"]
    environ = {entry["name"]: entry for entry in container["env"]}
    assert environ["KUBERNETES_SELECTOR"]["value"] == (
        f"job-name={job['metadata']['name']}")
    assert environ["NODE_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.hostIP"
    assert container["ports"] == [{"containerPort": 8470, "hostPort": 8470}]


# The launcher


def test_the_flags_of_the_launcher_are_those_of_the_page(capsys):
    from mpl.launch import local

    for script in blocks("bash", "mpl.launch.local"):
        words = script.replace("\\\n", "").split()
        assert words[:3] == ["python", "-m", "mpl.launch.local"]
        assert any(word.startswith("--workdir=") for word in words)
    with pytest.raises(SystemExit):
        local.main(["--help"])
    flags = capsys.readouterr().out
    named = {"--workers", "--ps", "--grace_secs"}
    assert all(flag in flags and flag in PAGE for flag in named)
    assert "(default: 30.0)" in flags and "`--grace_secs` (30)" in PAGE
    assert "up to 10 times" in PAGE
