"""Runs a program as a child process, in a folder of its own, and measures it."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from mpl.errors import ConfigError

_POLL_SECS = 0.2
_GRACE_SECS = 60.0  # for the checkpoint that Ctrl-C asks for


def run_once(command: Sequence[str], path: str, title: str) -> dict[str, Any]:
    """Runs a command to its end, unless it has been: what is cut short goes on.

    Output goes to `<path>.log`, what was measured to `<path>.json`. A terminal sees the
    last line of the output. Ctrl-C is passed on, and the child's end is waited for.

    Args:
        command: the program and its arguments.
        path: of the two files, without their endings.
        title: what to call the child on the screen.

    Returns:
        `secs` from start to end, over all starts; `peak_memory_mb` of the process, None
        where the system does not tell; `exit_code`.

    Raises:
        ConfigError: there is no such program, or its exit code is not 0.
    """
    file, log = pathlib.Path(f"{path}.json"), pathlib.Path(f"{path}.log")
    record: dict[str, Any] = {"secs": 0.0, "peak_memory_mb": None, "exit_code": None}
    with contextlib.suppress(FileNotFoundError):
        record = json.loads(file.read_text("utf-8"))
    if record["exit_code"] == 0:
        print(f"{title}: done before", flush=True)
        return record
    file.parent.mkdir(parents=True, exist_ok=True)
    if not sys.stdout.isatty():
        print(f"{title}: starts, see {log}", flush=True)
    try:
        _run(command, log, title, record)
    finally:
        file.with_suffix(".tmp").write_text(json.dumps(record), "utf-8")
        os.replace(file.with_suffix(".tmp"), file)
    if code := record["exit_code"]:
        how = f"exit code {code}" if code > 0 else f"signal {-code}"
        raise ConfigError(
            f"{title} ended with {how}; its last line: {_last_line(log)}",
            f"See {log}; the same command again goes on from here.",
        )
    _show(f"{title}: {record['secs']:.0f} s", lasting=True)
    return record


def _run(
    command: Sequence[str], log: pathlib.Path, title: str, record: dict[str, Any]
) -> None:
    start, before = time.monotonic(), record["secs"]
    with log.open("ab") as output:
        try:  # in a group of its own: the terminal's Ctrl-C reaches it through us alone
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"})
        except OSError as error:
            cause = f"`{command[0]}` cannot be run: {error.strerror}."
            raise ConfigError(cause, "Correct the command after --.") from error
    try:
        while process.poll() is None:
            found = _peak_memory_mb(process.pid), record["peak_memory_mb"]
            record["peak_memory_mb"] = max(filter(None, found), default=None)
            _show(f"{title}: {_last_line(log)}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECS)
    finally:
        _end(process)
        record["exit_code"] = process.returncode
        record["secs"] = before + time.monotonic() - start


def _end(process: subprocess.Popen) -> None:
    """Interrupts what still runs; after a while, or a second Ctrl-C, kills it."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(_GRACE_SECS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(OSError):  # what it has started itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _peak_memory_mb(pid: int) -> float | None:
    """Returns the most memory that a process has held so far, where Linux tells."""
    # Not getrusage: its figure for a child begins with what the parent held.
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)  # none once the process has ended
    return int(peak[1]) / 1024 if peak else None


def _last_line(log: pathlib.Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 1000))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _show(text: str, lasting: bool = False) -> None:
    """Shows text in place of the line before, on a terminal; elsewhere if it lasts."""
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:room]:<{room}}", end="\n" if lasting else "", flush=True)
    elif lasting:
        print(text, flush=True)
