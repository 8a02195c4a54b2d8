"""What policies cost and gain: statistics over runs that differ in policy and seed."""

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mpl.errors import ConfigError
from mpl.launch.config import better
from mpl.record.export import INFO_FILE, load_predictor
from mpl.tools.runs import Run, common_metrics

_BATCH_SIZES = (1, 256)
_ROUNDS, _FEWEST, _WARM_UP, _LATENCY_SECS = 50, 5, 3, 30.0
Spread = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the comparison; `measured` is what `trials.run_once` returned."""

    policy: str
    seed: int
    run: Run
    measured: Mapping[str, Any]


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


def compare(trials: Sequence[Trial], goal: Goal) -> dict[str, dict[str, Any]]:
    """Returns the figures of each policy, one value a seed (see `spread`).

    `speedup` and `difference` are against the reference's run of the same seed;
    `agreement` and `largest_difference` compare predictions with that run's, and those
    of the reference with its own ones of the next seed: so much comes from chance.
    """
    of = {(trial.policy, trial.seed): trial for trial in trials}
    policies = list(dict.fromkeys(trial.policy for trial in trials))
    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    base = reference(policies)
    found: dict[str, dict[str, Any]] = {}
    for policy in policies:
        own = [of[policy, seed] for seed in seeds]
        peers = [of[base, seed] for seed in seeds]
        others = peers[1:] + peers[:1] if policy == base else peers
        agreed = [agreement(_predictions(a.run), _predictions(b.run))
                  if a is not b else (math.nan, math.nan) for a, b in zip(own, others)]
        columns: dict[str, Callable[[Trial], float | None]] = {
            "training_secs": lambda trial: total_secs(trial.run),
            "steps_per_sec": lambda trial: statistics.median(
                trial.run.curve("train", "steps_per_sec")[1] or [math.nan]),
            "process_secs": lambda trial: trial.measured["secs"],
            "peak_memory_mb": lambda trial: trial.measured["peak_memory_mb"],
            "final": lambda trial: trial.run.last(goal.final_split, goal.metric),
            "skipped_steps": lambda trial: trial.run.last("train", "skipped_steps"),
            "at_equal_time": lambda trial: goal.at_equal_time(trial.run),
            "secs_to_target": lambda trial: goal.secs_to_target(trial.run),
        }
        figures = {name: spread(map(read, own)) for name, read in columns.items()}
        secs, final = columns["training_secs"], columns["final"]
        if policy != base:
            pairs = list(zip(own, peers))
            figures["speedup"] = spread(secs(b) / secs(a) for a, b in pairs)
            figures["difference"] = spread(final(a) - final(b) for a, b in pairs)
        figures["agreement"] = spread(share for share, _ in agreed)
        figures["largest_difference"] = spread(most for _, most in agreed)
        found[policy] = figures
    return found


def _predictions(run: Run) -> dict[str, np.ndarray]:
    path = os.path.join(run.path, "predictions.npz")
    if not os.path.exists(path):
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


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


def latencies(exports: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Measures how long exported models take to predict zeros, by turns.

    Args:
        exports: folders of SavedModels by name.

    Returns:
        For each name whose features all have fixed shapes: `computes_in`, the policy of
        the export, and `batch_1` and `batch_256`, the median and quartiles in ms.
    """
    calls, found, timed = [], dict[str, dict[str, Any]](), dict[Any, list[float]]()
    for name, path in exports.items():
        signature = tf.saved_model.load(path).signatures["serving_default"]
        specs = signature.structured_input_signature[1]
        if all(spec.shape[1:].is_fully_defined() for spec in specs.values()):
            with open(os.path.join(path, INFO_FILE), encoding="utf-8") as file:
                found[name] = {"computes_in": json.load(file)["policy"]}
            predict = load_predictor(path)
            for size in _BATCH_SIZES:
                batch = {feature: tf.zeros([size, *spec.shape[1:]], spec.dtype).numpy()
                         for feature, spec in specs.items()}
                timed[name, size] = []
                calls.append((timed[name, size], predict, batch))
    deadline = time.monotonic() + _LATENCY_SECS
    for number in range(_WARM_UP + _ROUNDS):
        if number >= _WARM_UP + _FEWEST and time.monotonic() > deadline:
            break
        for times, predict, batch in calls:
            start = time.perf_counter()
            predict(batch)
            times += [1e3 * (time.perf_counter() - start)] * (number >= _WARM_UP)
    for (name, size), times in timed.items():
        low, median, high = np.percentile(times, [25, 50, 75]).tolist()
        figures = {"low": low, "median": median, "high": high}
        found[name][f"batch_{size}"] = figures
    return found
