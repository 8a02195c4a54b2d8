"""The drill: runs are killed, damaged, stopped and go on, and must lose nothing.

    python -m tests.drill --out=runs/drill

Prints a table at the end, and writes it to drill.md and with all details to drill.json
in that folder. Exit code 1: something was lost. At most about 25 minutes on 2 cores.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from mpl.distribute.devices import describe_cpu  # noqa: E402
from tests.drill import (  # noqa: E402
    damages, disks, goodputs, kept, kills, run, seeks, signals)
from tests.drill.drill import Drill, Row  # noqa: E402

SECTIONS = ("kept", "kills", "goodput", "damages", "disks", "signals", "seek")
_AT_ONCE = 2  # processes, mostly


def jobs_of(drill: Drill, section: str, num_kills: int) -> list[Callable[[], Any]]:
    """Returns functions, each of which returns a row or a list of them."""
    return {
        "kept": lambda: [lambda: kept.rows(drill)],
        "kills": lambda: kills.jobs(drill, num_kills),
        "goodput": lambda: [lambda: goodputs.row(drill)],
        "damages": lambda: damages.jobs(drill),
        "disks": lambda: disks.jobs(drill),
        "signals": lambda: [lambda: signals.rows(drill.out)],
        "seek": lambda: [lambda: seeks.rows(drill)],
    }[section]()


def run_all(
    drill: Drill, sections: Sequence[str], num_kills: int,
    seen: Callable[[Sequence[Row]], Any],
) -> list[Row]:
    """Runs sections of the drill, and returns their rows.

    Args:
        drill: where.
        sections: of `SECTIONS`.
        num_kills: in all.
        seen: called with the rows that there are whenever there are more.
    """
    found: dict[str, list[Row]] = {section: [] for section in sections}
    lock = threading.Lock()

    def work(section: str, job: Callable[[], Any]) -> None:
        start = time.monotonic()
        try:
            done = job()
        except Exception as error:  # of the drill itself; the others go on
            done = Row(section, "?", False, repr(error), traceback.format_exc())
        new = [done] if isinstance(done, Row) else done
        with lock:
            for row in new:
                print(f"{time.monotonic() - start:4.0f} s  {_line(row)}", flush=True)
            found[section] += new
            seen(rows())

    def rows() -> list[Row]:
        each = [row for section in sections for row in found[section]]
        lives = [row for row in found.get("kills", []) if isinstance(row.details, dict)]
        return each + [kills.summary(lives, num_kills)] * bool(lives)

    pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE)
    try:
        futures = [pool.submit(work, section, job) for section in sections
                   for job in jobs_of(drill, section, num_kills)]
        for future in futures:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return rows()


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as a table in Markdown."""
    head = ["| section | what | result | seen |", "|---|---|---|---|"]
    return "\n".join([*head, *map(_line, rows)])


def _line(row: Row) -> str:
    result = {True: "passed", False: "FAILED", None: "skipped"}[row.passed]
    return f"| {row.section} | {row.what} | {result} | {row.figures} |"


def main(argv: Sequence[str]) -> int:
    """Runs the drill as a program; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default="runs/drill")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="of a run")
    parser.add_argument("--program", type=pathlib.Path, default=run.PROGRAM)
    flags = parser.parse_args(argv)
    sections = flags.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only names {unknown}; there are {', '.join(SECTIONS)}")
    start = time.monotonic()
    drill = Drill(flags.out, seed=flags.seed, steps=flags.steps, program=flags.program)

    def write(rows: Sequence[Row]) -> str:  # at once: who breaks it off has them, too
        versions = (f"TensorFlow {tf.__version__}, Keras {keras.__version__}, Python "
                    f"{platform.python_version()}")
        about = (f"{' '.join(argv) or 'no flags'}; {describe_cpu()}; {versions}; "
                 f"{(time.monotonic() - start) / 60:.0f} min")
        report = {"about": about, "rows": [dataclasses.asdict(row) for row in rows]}
        (flags.out / "drill.json").write_text(json.dumps(report, indent=1))
        text = f"{about}\n\n{table(rows)}\n"
        (flags.out / "drill.md").write_text(text)
        return text

    rows = run_all(drill, sections, flags.kills, write)
    print(f"\n{write(rows)}")
    for row in rows:
        if row.passed is False:
            print(f"FAILED: {row.section}, {row.what}: {row.details}")
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
