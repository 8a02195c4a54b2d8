"""Disks that fill up, or become read-only; then there is room, and the same command.

Needs the right to mount a tmpfs.
"""

import contextlib
import os
import pathlib
import re
import subprocess
from collections.abc import Callable, Iterator

from tests.drill import damages
from tests.drill.compare import differences, whole
from tests.drill.drill import Drill, Job, Row
from tests.drill.run import Run

_PAGE = 4096


def jobs(drill: Drill) -> list[Job]:
    """Returns one job a fault of the disk."""
    return [lambda: full(drill, "in a save", 600_000, r"ckpt-\d+` cannot be written"),
            lambda: full(drill, "at a log", 2 * _PAGE, "cannot be written",
                         "--log_every_steps=1"),
            lambda: full(drill, "when metrics.jsonl is cleared of a torn line", _PAGE,
                         r"metrics\.jsonl\.tmp; No space"),
            lambda: read_only_checkpoints(drill), lambda: read_only(drill)]


class CannotMount(Exception):
    """Mounting is not allowed here, or not possible."""


@contextlib.contextmanager
def mounted(folder: pathlib.Path, *arguments: str) -> Iterator[None]:
    """Has something mounted on a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount(*arguments, str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CannotMount(done.stderr.strip())


def _tried(what: str, try_it: Callable[[], list[str]]) -> Row:
    try:
        faults = try_it()
    except CannotMount as error:
        return Row("disks", what, None, f"skipped: {error}")
    return Row("disks", what, not faults,
               "a clear error, all checkpoints whole; then the run goes on", faults)


def _failed(run: Run, message: str) -> list[str]:
    """Starts a run that must fail, and returns what is wrong with how it does."""
    newest, end = run.committed()[-1], run.finish()
    faults = [] if end.code == 1 else [f"exit code {end.code}"]
    if not re.search(message, end.text) or "Traceback" in end.text:
        faults.append(f"no clear error: {end.text[-1500:]}")
    if run.committed()[-1] < newest:
        faults.append(f"checkpoint {newest} is gone")
    return faults + whole(run)


def _goes_on(drill: Drill, run: Run, log_too: bool = True) -> list[str]:
    end = run.finish()
    if end.code:
        return [f"exit code {end.code} when there was room: {end.text[-1500:]}"]
    return differences(run, drill.reference(), log_too)


def full(drill: Drill, when: str, room: int, message: str, *flags: str) -> Row:
    """Lets a run go on with so many bytes left on its disk."""

    def try_it() -> list[str]:
        name = re.sub(r"\W+", "-", f"full {when}")
        run = drill.run(name, "one_device", *flags)
        with mounted(run.folder, "-t", "tmpfs", "-o", "size=64m", "tmpfs"):
            drill.copy(name, *flags)
            damages.tear(run.folder / "metrics.jsonl")
            disk = os.statvfs(run.folder)
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            _mount("-o", f"remount,size={used + room}", str(run.folder))
            faults = _failed(run, message)
            if "No space left" not in run.said():
                faults.append("the disk was not full")
            _mount("-o", "remount,size=64m", str(run.folder))
            return faults + _goes_on(drill, run, log_too=not flags)

    return _tried(f"full {when}", try_it)


def read_only_checkpoints(drill: Drill) -> Row:
    """Lets a run go on whose folder of checkpoints cannot be written."""

    def try_it() -> list[str]:
        run = drill.copy("read-only-checkpoints")
        folder = run.folder / "checkpoints"
        with mounted(folder, "--bind", str(folder)):
            _mount("-o", "remount,ro,bind", str(folder))
            faults = _failed(run, r"ckpt-\d+` cannot be written: .*Read-only")
        return faults + _goes_on(drill, run)

    return _tried("checkpoints read-only", try_it)


def read_only(drill: Drill) -> Row:
    """Lets a run go on whose folder cannot be written."""

    def try_it() -> list[str]:
        run = drill.copy("read-only")
        with mounted(run.folder, "--bind", str(run.folder)):
            _mount("-o", "remount,ro,bind", str(run.folder))
            faults = _failed(run, "`workdir` .* must be a folder that takes files")
        return faults + _goes_on(drill, run)

    return _tried("workdir read-only", try_it)
