"""SIGKILL at moments drawn by chance; then the same command again."""

import collections
import random
import signal
import time
from typing import Any

from tests.drill.compare import differences
from tests.drill.drill import Drill, Job, Row
from tests.drill.run import Run, until

# What a kill aims at, and how often of ten; an evaluation with a checkpoint before it.
AIMS = {"any moment": 5, "an evaluation": 2, "a save": 3}
_KINDS = (*["one_device"] * 3, "files", "mirrored", *["one_device"] * 4, "files")
_KILLS_A_LIFE = 10
_TRAINING_SECS = 2.0  # of a process, at most, before it is killed
_SAVE_SECS = 0.03  # as long as it takes


def jobs(drill: Drill, kills: int) -> list[Job]:
    """Returns lives of ten kills each, under several strategies."""
    firsts = range(0, kills, _KILLS_A_LIFE)
    return [
        lambda number=number, count=min(_KILLS_A_LIFE, kills - first):
        life(drill, _KINDS[number % len(_KINDS)], number, count)
        for number, first in enumerate(firsts)]


def life(drill: Drill, kind: str, number: int, kills: int) -> Row:
    """Kills a run so often, lets it end and compares it with the undisturbed one.

    A run that ends before it was killed so often is compared, too, and another goes on.
    """
    reference, chance = drill.reference(kind), random.Random(f"{drill.seed} {number}")
    made: list[dict[str, Any]] = []
    faults: list[str] = []
    starts = ended = 0
    while len(made) < kills or not ended:
        run = drill.run(f"{kind}-{number}-{starts}", kind)
        starts, ended = starts + 1, 0
        while len(made) < kills and (hit := kill(
                run, chance, drill.startup_secs[kind])):
            made.append(hit)
        end = run.finish() if len(made) == kills else None
        ended = 1
        if end and end.code:
            faults.append(f"{run.folder}: exit code {end.code}: {end.text[-500:]}")
        elif "Traceback" in run.said() or "rror:" in run.said():
            faults.append(f"{run.folder}: an error is in its log")
        faults += [f"{run.folder.name}: {text}" for text in differences(run, reference)]
    return Row(
        "kills", f"{kills} × SIGKILL, {kind}", not faults,
        f"{starts} runs to the end, {len(faults)} differences", {
            "kills": made, "faults": faults})


def kill(run: Run, chance: random.Random, startup_secs: float) -> dict | None:
    """Starts a run and kills it; returns what was hit, None: it had ended before."""
    aim = chance.choices(list(AIMS), list(AIMS.values()))[0]
    secs, late_secs = chance.random(), _SAVE_SECS * chance.random()
    before, start = run.unfinished(), time.monotonic()
    with run.started() as process:
        if aim == "any moment":
            until(process, secs=secs * (startup_secs + _TRAINING_SECS))
        else:
            until(process, lambda: run.phase() == "training")
            until(process, secs=secs * _TRAINING_SECS)
            until(process, {
                "an evaluation": lambda: (
                    run.phase().startswith("evaluation") and run.committed()),
                "a save": lambda: run.unfinished() - before}[aim])
            until(process, secs=late_secs)
        process.kill()
        process.wait()
    if process.returncode != -signal.SIGKILL:
        return None
    left = run.unfinished() - before
    return {"aim": aim, "secs": round(time.monotonic() - start, 3),
            "phase": run.phase(), "left": sorted(name for name, _ in left),
            "last_checkpoint": max(run.committed(), default=0)}


def summary(rows: list[Row], kills: int) -> Row:
    """Returns where all kills fell. A drill that never hits a save proves little."""
    made = [hit for row in rows for hit in row.details["kills"]]
    phases = collections.Counter(hit["phase"].partition(" ")[0] for hit in made)
    saves = sum(bool(hit["left"]) for hit in made)
    failed = sum(not row.passed for row in rows)
    wanted = {"start-up", "training", "evaluation"} if kills >= 50 else set()
    enough = len(made) == kills and saves >= kills // 10 and wanted <= set(phases)
    shown = ", ".join(f"{count} {phase}" for phase, count in phases.most_common())
    return Row(
        "kills", f"all {len(made)} kills", enough and not failed,
        f"{shown}; {saves} of them while a checkpoint was written; "
        f"{failed} of {len(rows)} lives with differences")
