"""What policies cost and gain: statistics over runs that differ in policy and seed."""

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mpl.errors import ConfigError
from mpl.launch.config import better
from mpl.record.export import INFO_FILE, SavedPredictor
from mpl.tools.runs import Run, common_metrics

_BATCH_SIZES = (1, 256)
_ROUNDS, _FEWEST, _WARM_UP, _LATENCY_SECS = 50, 5, 3, 30.0
Spread = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the comparison, with what `run_once` and `time_exports` measured."""

    policy: str
    seed: int
    run: Run
    measured: dict[str, Any]

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """The arrays that it predicted for the test data; empty if it did not."""
        path = os.path.join(self.run.path, "predictions.npz")
        if not os.path.exists(path):
            return {}
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is compared.

    Attributes:
        metric: its name.
        split: whose evaluations are its course: "validation" if there are any.
        final_split: whose last value is the result: "test" if there is one.
        target: the value to reach.
        equal_secs: the training time of the shortest run.
    """

    metric: str
    split: str
    final_split: str
    target: float
    equal_secs: float

    def course(self, run: Run) -> tuple[np.ndarray, list[float]]:
        """Returns the seconds of training at which a run was evaluated, and values."""
        steps, values = run.curve(self.split, self.metric)
        return run.training_secs(steps), values

    def at_equal_time(self, run: Run) -> float:
        """Returns the last value at `equal_secs`; NaN: none was there yet."""
        pairs = zip(*self.course(run))
        return [math.nan, *(v for secs, v in pairs if secs <= self.equal_secs)][-1]

    def secs_to_target(self, run: Run) -> float:
        """Returns the time of the first value as good as the target; NaN: never."""
        sign = 1 if better(self.metric) == "max" else -1
        pairs = zip(*self.course(run))
        reached = (secs for secs, v in pairs if sign * v >= sign * self.target)
        return next(reached, math.nan)


def reference(policies: Iterable[str]) -> str:
    """Returns the policy that the others are compared with: float32, or the first."""
    policies = list(policies)
    return "float32" if "float32" in policies else policies[0]


def total_secs(run: Run) -> float:
    """Returns the time of training, see `Run.training_secs`."""
    return float(run.training_secs([max(line["step"] for line in run.lines)])[0])


def goal_of(
    trials: Sequence[Trial], metric: str | None = None, target: float | None = None
) -> Goal:
    """Returns what to compare.

    Args:
        trials: all runs.
        metric: its name; None: the experiment's first.
        target: the value to reach; None: the worst that a run of the reference ends
            with: each of them reaches it, and the others show whether they do.

    Raises:
        ConfigError: the runs have no metric in common, or not this one.
    """
    runs = [trial.run for trial in trials]
    common = common_metrics(runs)
    name = metric or common[0]
    if name not in common:
        raise ConfigError(
            f"`target` ({name}) must name a metric of the runs: {', '.join(common)}.",
            "Write --target=METRIC:VALUE, such as --target=accuracy:0.95.",
        )
    split = runs[0].split("validation", "test")
    final_split = runs[0].split("test", "validation")
    base = reference(trial.policy for trial in trials)
    finals = [t.run.last(split, name) for t in trials if t.policy == base]
    if target is None:
        worst = np.fmin if better(name) == "max" else np.fmax
        target = float(worst.reduce(finals))
    return Goal(name, split, final_split, target, min(map(total_secs, runs)))


def spread(values: Iterable[float | None]) -> Spread:
    """Returns mean and sample standard deviation of what is known, and all values."""
    values = [None if v is None or math.isnan(v) else float(v) for v in values]
    known = [value for value in values if value is not None]
    return {"mean": statistics.fmean(known) if known else None,
            "std": statistics.stdev(known) if len(known) > 1 else None,
            "values": values}


def compare(trials: Sequence[Trial], goal: Goal) -> dict[str, dict[str, Spread]]:
    """Returns the figures of each policy, see `spread`, with a value for each seed.

    They are compared with the reference's run of the same seed; the reference's own
    predictions with those of its next seed: so much comes from chance.
    """
    of = {(trial.policy, trial.seed): trial for trial in trials}
    policies = dict.fromkeys(trial.policy for trial in trials)
    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    base, found = reference(policies), {}
    for policy in policies:
        others = seeds[1:] + seeds[:1] if policy == base else seeds
        rows = [_figures(of[policy, seed], of[base, seed], of[base, other], goal)
                for seed, other in zip(seeds, others)]
        found[policy] = {name: spread(row[name] for row in rows) for name in rows[0]}
    return found


def _figures(
    trial: Trial, peer: Trial, other: Trial, goal: Goal
) -> dict[str, float | None]:
    """Returns the figures of one run, beside `peer`, and `other`'s predictions."""
    run, measured = trial.run, trial.measured
    secs, final = total_secs(run), run.last(goal.final_split, goal.metric)
    same = most = math.nan
    if other is not trial:
        same, most = agreement(trial.predictions, other.predictions)
    return {
        "training_secs": secs,
        "speedup": total_secs(peer.run) / secs,
        "steps_per_sec": statistics.median(
            run.curve("train", "steps_per_sec")[1] or [math.nan]),
        "process_secs": measured["secs"],
        "peak_memory_mb": measured["peak_memory_mb"],
        "final": final,
        # Metrics are float32: more digits would be noise.
        "difference": round(final - peer.run.last(goal.final_split, goal.metric), 7),
        "skipped_steps": run.last("train", "skipped_steps"),
        "at_equal_time": goal.at_equal_time(run),
        "secs_to_target": goal.secs_to_target(run),
        "same_class_percent": 100 * same,
        "largest_difference": most,
        **{f"predict_{n}_ms": measured.get(f"predict_{n}_ms") for n in _BATCH_SIZES},
    }


def agreement(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Compares predictions `[n, ...]` by name for the same examples.

    Returns:
        The share of examples of the same class, where there are classes: integers, or
        `[n, k]` numbers of which the largest counts; of several outputs the smallest
        share. And the largest absolute difference of other numbers. NaN: there are no
        such predictions.
    """
    shares, differences = [math.nan], [math.nan]
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        if a.shape != b.shape:
            continue
        if a.ndim == 2 and a.shape[1] > 1 and a.dtype.kind == "f":
            a, b = a.argmax(1), b.argmax(1)
        if a.dtype.kind == "f":
            differences.append(float(np.max(np.abs(a - b))))
        else:
            shares.append(float(np.mean(a == b)))
    return float(np.fmin.reduce(shares)), float(np.fmax.reduce(differences))


def time_exports(trials: Sequence[Trial]) -> None:
    """Measures by turns how long the runs' exports take to predict zeros.

    Adds the medians, `predict_<batch size>_ms`, and the policy that an export
    `computes_in` to `measured`; where a feature has no fixed shape, nothing.
    """
    calls: list[tuple[Trial, str, Any, Any, list[float]]] = []
    for trial in trials:
        path = os.path.join(trial.run.path, "export")
        if not os.path.isdir(path):
            continue
        predict = SavedPredictor(path)
        specs = predict.specs
        if all(spec.shape[1:].is_fully_defined() for spec in specs.values()):
            with open(os.path.join(path, INFO_FILE), encoding="utf-8") as file:
                trial.measured["computes_in"] = json.load(file)["policy"]
            for size in _BATCH_SIZES:
                batch = {name: tf.zeros([size, *spec.shape[1:]], spec.dtype).numpy()
                         for name, spec in specs.items()}
                calls.append((trial, f"predict_{size}_ms", predict, batch, []))
    deadline = time.monotonic() + _LATENCY_SECS
    for number in range(_WARM_UP + _ROUNDS):
        if number >= _WARM_UP + _FEWEST and time.monotonic() > deadline:
            break
        for *_, predict, batch, times in calls:
            start = time.perf_counter()
            predict(batch)
            times.append(1e3 * (time.perf_counter() - start))
    for trial, name, *_, times in calls:
        trial.measured[name] = statistics.median(times[_WARM_UP:])
