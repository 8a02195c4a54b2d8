"""What docs/preemption.md promises and gives to paste."""

import os
import pathlib
import re
import subprocess

import pytest

from mpl.errors import Preempted
from mpl.loop import watchdog

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "preemption.md").read_text("utf-8")


def block(language, holds):
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (text,) = [text for text in found if holds in text]
    return text


def test_exit_codes():
    assert f"| {Preempted('').code} | preempted" in PAGE
    assert f"| {watchdog.EXIT_CODE} | the watchdog" in PAGE


@pytest.mark.parametrize("status, requeued", [(0, []), (1, []), (42, ["requeue 7"])])
def test_slurm_requeues_what_was_preempted(status, requeued, tmp_path):
    for name in ("srun", "scontrol"):
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/{name}.log\n'
                        f"exit {status if name == 'srun' else 0}\n")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", block("bash", "#SBATCH")], timeout=20, capture_output=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"})
    assert (done.returncode, done.stderr) == (status, b"")
    log = tmp_path / "scontrol.log"
    assert (log.read_text().splitlines() if log.exists() else []) == requeued


def test_kubernetes_does_not_count_a_preemption():
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load(block("yaml", "kind: Job"))["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["podFailurePolicy"]["rules"][0] == {"action": "Ignore", "onExitCodes": {
        "containerName": container["name"], "operator": "In",
        "values": [Preempted("").code]}}
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
