"""Files that a run left are damaged; then the same command again."""

import os
import pathlib
import re
from collections.abc import Callable

from tests.drill.compare import differences
from tests.drill.drill import Drill, Job, Row

_DATA, _INDEX, _MARKER = ".data-00000-of-00001", ".index", ".commit"


def _ending(ending: str, change: Callable[[pathlib.Path], object]) -> Callable:
    return lambda newest: change(newest.with_name(newest.name + ending))


def _beside(name: str, change: Callable[[pathlib.Path], object]) -> Callable:
    return lambda newest: change(newest.parent / name)


def cut(path: pathlib.Path) -> None:
    """Leaves the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def flip(path: pathlib.Path) -> None:
    """Changes a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def half_write(newest: pathlib.Path) -> None:
    """Leaves what a kill in the next save may leave."""
    step = int(newest.name.rpartition("-")[2]) + 10
    path = newest.with_name(f"ckpt-{step}")
    newest.with_name(f"ckpt-{step}_temp").mkdir()
    for name in ("part-00000-of-00001.index", "part.data-00000-of-00001.tempstate1"):
        (newest.parent / f"ckpt-{step}_temp" / name).write_bytes(b"")
    path.with_name(path.name + _DATA).write_bytes(b"\0" * 1000)
    path.with_name(path.name + _MARKER + ".tmp").write_text("{")


def tear(path: pathlib.Path) -> None:
    """Leaves half a line at the end of a file."""
    with open(path, "a") as file:
        file.write('{"step": 99')


# Of the newest checkpoint, which is then passed over.
OF_NEWEST: dict[str, Callable[[pathlib.Path], object]] = {
    "data file cut": _ending(_DATA, cut),
    "data file, one bit flipped": _ending(_DATA, flip),
    "data file missing": _ending(_DATA, os.remove),
    "index cut": _ending(_INDEX, cut),
    "index, one bit flipped": _ending(_INDEX, flip),
    "index missing": _ending(_INDEX, os.remove),
    "marker cut": _ending(_MARKER, cut),
    "marker missing": _ending(_MARKER, os.remove),
}
# Beside it, so that it is taken.
BESIDE: dict[str, Callable[[pathlib.Path], object]] = {
    "list of checkpoints empty": _beside("checkpoint", lambda p: p.write_bytes(b"")),
    "list of checkpoints garbage": _beside(
        "checkpoint", lambda p: p.write_bytes(b"\xff\xfe\0 none")),
    "list of checkpoints missing": _beside("checkpoint", os.remove),
    "next checkpoint half written": half_write,
    "metrics.jsonl, last line torn": _beside("../metrics.jsonl", tear),
    "goodput.json cut": _beside("../goodput.json", cut),
}


def jobs(drill: Drill) -> list[Job]:
    """Returns one job a damage."""
    each = {**OF_NEWEST, **BESIDE}
    return [*(lambda what=what: survived(drill, what) for what in each),
            lambda: refused(drill)]


def survived(drill: Drill, what: str) -> Row:
    """Damages a file; the run must go on from the newest checkpoint that is whole."""
    run = drill.copy(re.sub(r"\W+", "-", what))
    *_, older, newest = run.committed()
    path = run.folder / "checkpoints" / f"ckpt-{newest}"
    {**OF_NEWEST, **BESIDE}[what](path)
    expected = older if what in OF_NEWEST else newest
    end = run.finish()
    faults = [f"exit code {end.code}: {end.text[-500:]}"] if end.code else []
    if f"Going on at step {expected} of" not in end.text:
        faults.append(f"it did not go on at step {expected}: {end.text[:500]}")
    if what in OF_NEWEST and f"{path} is passed over: " not in end.text:
        faults.append(f"no warning names {path}")
    faults += differences(run, drill.reference())
    return Row("damages", what, not faults, f"went on at step {expected}", faults)


def refused(drill: Drill) -> Row:
    """Damages all checkpoints; the run must end with an error and change nothing."""
    run = drill.copy("all-damaged")
    for path in (run.folder / "checkpoints").glob(f"*{_DATA}"):
        flip(path)
    before = _contents(run.folder)
    end = run.finish()
    faults = [] if end.code == 1 else [f"exit code {end.code}"]
    if "none of them is whole" not in end.text or "Traceback" in end.text:
        faults.append(f"no clear error: {end.text[-500:]}")
    faults += [f"{name} has changed" for name, data in _contents(run.folder).items()
               if before.get(name) != data]
    return Row("damages", "all checkpoints", not faults, "exit code 1, an error, "
               "nothing written", faults)


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
