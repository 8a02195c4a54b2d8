"""A run of the drilled program: started, watched from outside, ended."""

import contextlib
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "drill" / "program.py"
_POLL_SECS = 0.001


class Ended(NamedTuple):
    """How a process ended: its exit code, and what it printed."""

    code: int
    text: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A run in a folder; each start is the same command.

    Attributes:
        folder: its workdir.
        flags: of the command.
        program: what is started.
        limit_secs: the longest that a process may take; then it is killed.
    """

    folder: pathlib.Path
    flags: tuple[str, ...] = ()
    program: pathlib.Path = PROGRAM
    limit_secs: float = 300.0

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen]:
        """Starts the command; no process is left when the context ends."""
        phase = self._beside("phase")
        phase.write_text("start-up")
        command = [sys.executable, str(self.program), f"--workdir={self.folder}"]
        with open(self._beside("log"), "ab") as log:
            process = subprocess.Popen(
                [*command, *self.flags], cwd=ROOT, stdout=log, stderr=log,
                start_new_session=True, env={
                    **os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
                    "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1",
                    "TF_NUM_INTRAOP_THREADS": "1", "DRILL_PHASE": str(phase)})
        timer = threading.Timer(self.limit_secs, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()
            process.wait()

    def finish(self) -> Ended:
        """Starts the command and waits for its end."""
        before = len(self.said())
        with self.started() as process:
            code = process.wait()
        return Ended(code, self.said()[before:])

    def said(self) -> str:
        """Returns what all processes of the run have printed."""
        log = self._beside("log")
        return log.read_text(errors="replace") if log.exists() else ""

    def phase(self) -> str:
        """Returns what the process does, or did when it died."""
        return self._beside("phase").read_text().strip()

    def committed(self) -> list[int]:
        """Returns the steps of the committed checkpoints."""
        names = (re.fullmatch(r"ckpt-(\d+)\.commit", path.name)
                 for path in (self.folder / "checkpoints").glob("*.commit"))
        return sorted(int(match[1]) for match in names if match)

    def unfinished(self) -> set[tuple[str, int]]:
        """Returns name and time of each file of a checkpoint without a marker."""
        found: set[tuple[str, int]] = set()
        checkpoints = self.folder / "checkpoints"
        for folder in (checkpoints, *checkpoints.glob("best/*")):
            with contextlib.suppress(FileNotFoundError):  # they come and go
                times = {entry.name: entry.stat().st_mtime_ns
                         for entry in os.scandir(folder)}
                found |= {(name, when) for name, when in times.items()
                          if _is_unfinished(name, times)}
        return found

    def _beside(self, ending: str) -> pathlib.Path:
        return self.folder.with_name(f"{self.folder.name}.{ending}")


def _is_unfinished(name: str, names: dict[str, int]) -> bool:
    checkpoint = re.match(r"ckpt-\d+", name)
    has_marker = not checkpoint or f"{checkpoint[0]}.commit" in names
    return name.endswith(".tmp") or not has_marker


def until(
    process: subprocess.Popen, condition: Callable[[], object] = lambda: False,
    secs: float = 3600.0,
) -> float:
    """Waits for a condition, the end of the process or so many seconds.

    Returns:
        The seconds it took.
    """
    start = time.monotonic()
    while process.poll() is None and not condition():
        if time.monotonic() - start >= secs:
            break
        time.sleep(_POLL_SECS)
    return time.monotonic() - start
