"""All that the next step depends on is in a checkpoint, and does not stand still."""

import re

import numpy as np

from tests.drill.compare import state
from tests.drill.drill import Drill, Row

# The entries of each kind, by their names.
KINDS = {
    "weights": r"^model/.*/(_kernel|bias|gamma|beta)/",
    "batch statistics": r"^model/.*/moving_",
    "slots": r"^optimizer/.*/(momentum|velocity)\|",
    "averages": r"^optimizer/.*/average\|",
    "seeds of dropout": r"/seed\|",
    "applied steps": r"\|iteration$",
    "skipped steps": r"^optimizer/.*/counts$",
    "loss scale": r"loss_scale/_value/",
    "its counters": r"loss_scale/_steps/",
    "global step": r"^global_step/",
    "data position": r"^position/",
    "best metric": r"^best_metric/",
    "early stopping": r"^early_stopping/",
}


def rows(drill: Drill) -> list[Row]:
    """Looks for each kind in the checkpoints of the undisturbed runs."""
    return [kept(drill, kind) for kind in ("one_device", "files", "mirrored")]


def kept(drill: Drill, kind: str) -> Row:
    """Looks into all checkpoints of a run: nothing may be missing or stand still."""
    run = drill.reference(kind)
    states = [state(run.folder / "checkpoints" / f"ckpt-{step}")
              for step in run.committed()]
    last = states[-1]
    counts, faults = {}, []
    for name, pattern in KINDS.items():
        keys = [key for key in last if re.search(pattern, key)]
        counts[name] = len(keys)
        start = {"best metric": np.inf, "loss scale": 2.0**15}.get(name, 0)
        if all((each[key] == start).all() for key in keys for each in states):
            faults.append(f"{name}: missing, or as at the start")
    if unknown := [key for key in last if not any(
            re.search(pattern, key) for pattern in KINDS.values())]:
        counts["others"] = len(unknown)
    faults += [f"{key} is not in all of them" for each in states
               for key in each.keys() ^ last.keys()]
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    return Row("kept", f"entries of a checkpoint, {kind}", not faults, shown, faults)
