"""What docs/reports.md gives to type."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which all commands of the page were run, in order."""
    path = tmp_path_factory.mktemp("docs")
    python = path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environ = {**os.environ, "PYTHONPATH": str(ROOT),
               "PATH": f"{python.parent}:{os.environ['PATH']}"}
    commands = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for command in commands:
        ended = subprocess.run(
            ["bash", "-eu", "-c", command], cwd=path, env=environ, timeout=600,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert ended.returncode == 0, ended.stdout
    assert len(commands) == 4
    return path / "runs"


@pytest.mark.slow
def test_reports_are_written(folder):
    for name in ("first/report", "both", "policies/curves"):
        assert sorted(os.listdir(folder / name)) == [
            "metrics.png", "report.html", "training.png"]
    both = (folder / "both" / "report.html").read_text()
    assert re.search(r">--learning_rate</th><td>0.002</td><td>0.01</td>", both)


@pytest.mark.slow
def test_policies_are_compared(folder):
    found = json.loads((folder / "policies" / "compare.json").read_text())
    assert list(found["policies"]) == ["float32", "mixed_bfloat16"]
    assert found["seeds"] == [0, 1] and found["metric"] == "accuracy"
    for name, figures in found["policies"].items():
        assert all(0.5 < value <= 1 for value in figures["final"]["values"])
        assert all(value > 0 for value in figures["training_secs"]["values"])
        assert all(value > 100 for value in figures["peak_memory_mb"]["values"])
        assert figures["skipped_steps"]["values"] == [0, 0]
        assert all(50 < value <= 100
                   for value in figures["same_class_percent"]["values"])
        assert all(0 < value < 1000 for size in (1, 256)
                   for value in figures[f"predict_{size}_ms"]["values"])
        flags = (folder / "policies" / name / "1" / "flagfile.txt").read_text()
        assert f"--policy={name}\n" in flags and "--seed=1\n" in flags
    # Rounding, not chance, parts runs of the same seed.
    assert found["policies"]["mixed_bfloat16"]["same_class_percent"]["mean"] > 90
    assert "compute in float32 (float32), mixed_bfloat16 (mixed_bfloat16)." in (
        folder / "policies" / "compare.md").read_text()
