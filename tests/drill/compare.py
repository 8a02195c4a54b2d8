"""What must be equal between a run that was disturbed and one that was not."""

import json
import pathlib
import re
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from mpl.record import commit
from tests.drill.run import Run

TIMES = {"steps_per_sec", "examples_per_sec", "goodput", "lost_steps", "restarts",
         "time"}  # fmt: skip
# How often was saved, and the layout of the file.
_NOT_STATE = r"save_counter|_CHECKPOINTABLE_OBJECT_GRAPH"


def state(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns all entries of a checkpoint that training goes on from."""
    reader = tf.train.load_checkpoint(str(path))
    return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()
            if not re.search(_NOT_STATE, key)}


def differing(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
              ) -> list[str]:
    """Returns the entries that are not equal bit for bit."""
    return sorted(
        key for key in found.keys() | wanted.keys()
        if key not in found or key not in wanted
        or found[key].dtype != wanted[key].dtype
        or found[key].tobytes() != wanted[key].tobytes())


def lines(path: pathlib.Path) -> tuple[dict[tuple[int, str], dict], list[str]]:
    """Reads metrics.jsonl.

    Returns:
        The lines by step and split, without times and notes; and what is wrong.
    """
    found: dict[tuple[int, str], dict] = {}
    faults = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            key = line["step"], line["split"]
        except (ValueError, KeyError, TypeError):
            faults.append(f"metrics.jsonl: line {number} cannot be read")
            continue
        if key in found:
            faults.append(f"metrics.jsonl: step {key[0]} of {key[1]} is there twice")
        if line["split"] != "note":
            found[key] = {n: v for n, v in line.items() if n not in TIMES}
    return found, faults


def whole(run: Run) -> list[str]:
    """Returns what is wrong with the committed checkpoints."""
    folder = str(run.folder / "checkpoints")
    paths = [found.path for found in commit.find(folder)
             if found.problem != "it was not finished"]
    return [f"{path}: {problem}" for path in paths if (problem := commit.damage(path))]


def differences(run: Run, reference: Run, log_too: bool = True) -> list[str]:
    """Returns in what a finished run differs from the undisturbed one.

    Args:
        run: what was killed, damaged or stopped, and went on to its end.
        reference: the same training, undisturbed.
        log_too: whether training was logged at the same steps.
    """
    faults = whole(run)
    step = reference.committed()[-1]
    if run.committed()[-1:] != [step]:
        return [*faults, f"the last checkpoint is {run.committed()[-1:]}, not {step}"]
    for place in ("checkpoints", "checkpoints/best/loss"):
        path, wanted = (
            max(each.folder.glob(f"{place}/ckpt-*.commit"), key=_step, default=None)
            for each in (run, reference))
        if path is None or wanted is None or path.name != wanted.name:
            faults.append(f"{place}: the last is {path}, not {wanted}")
            continue
        keys = differing(state(path.with_suffix("")), state(wanted.with_suffix("")))
        faults += [f"{place}/{path.stem}: {key} differs" for key in keys]
    found, problems = lines(run.folder / "metrics.jsonl")
    wanted_lines, _ = lines(reference.folder / "metrics.jsonl")
    faults += problems + [
        f"metrics.jsonl: step {key[0]} of {key[1]} differs"
        for key in sorted(found.keys() | wanted_lines.keys())
        if (log_too or key[1] != "train") and found.get(key) != wanted_lines.get(key)]
    faults += [f"{name} is left" for name, _ in sorted(run.unfinished())]
    results = [each.said().rstrip().rpartition("\n")[2] for each in (run, reference)]
    if results[0] != results[1]:
        faults.append(f"the result is {results[0]!r}, not {results[1]!r}")
    return faults


def _step(path: pathlib.Path) -> int:
    return int(path.stem.rpartition("-")[2])
