"""SIGTERM in every phase: the tests of it are run, and each is a row."""

import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as xml

from tests.drill.drill import Row
from tests.drill.run import ROOT

_TESTS = ROOT / "tests" / "launch" / "test_preemption.py"
_LIMIT_SECS = 900


def rows(out: pathlib.Path) -> list[Row]:
    """Runs tests/launch/test_preemption.py."""
    report = out / "signals.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               f"--junitxml={report}", str(_TESTS)]
    done = subprocess.run(
        command, cwd=ROOT, timeout=_LIMIT_SECS, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    cases = list(xml.parse(report).iter("testcase"))
    seen = [Row("signals", _words(case), *_outcome(case)) for case in cases]
    if done.returncode or not seen:
        seen.append(Row("signals", "all", False, f"pytest ended with "
                        f"{done.returncode}", done.stdout[-3000:]))
    return seen


def _words(case: xml.Element) -> str:
    return case.get("name", "").removeprefix("test_").replace("_", " ")


def _outcome(case: xml.Element) -> tuple[bool | None, str, str]:
    secs = f"{float(case.get('time', 0)):.0f} s"
    for tag, passed in (("failure", False), ("error", False), ("skipped", None)):
        if (element := case.find(tag)) is not None:
            return passed, secs, f"{element.get('message')}"
    return True, secs, ""
