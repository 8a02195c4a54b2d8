"""The goals: how time and memory of mpl should compare with the peers'.

A goal is missed only if the interval of its ratio excludes the bound. That the table of
`recommender` and `mf` never becomes dense is held by tests/step/test_sparse.py.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.benchmarks.measure import (
    Ratio,
    Record,
    Records,
    Run,
    ratio_of_medians,
)

BUCKET_MB = 32.0  # one bucket of casts, which mpl may hold more than Keras
DIGITS, IMPORT = "digits", "import"
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
_BF16 = "mixed_bfloat16"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bound on the ratio of a figure of one run to that of another.

    Attributes:
        figure: "step", "update", "memory", "matmul_fraction", "start" (from the start
            of the process to the first step) or "first_step" (without the imports).
        over: the run above the line.
        under: the run below the line; None: the figure by itself.
        bound: what the ratio should not exceed.
        at_least: the bound is what the ratio should reach.
        less_mb: MB that are taken off the figure above the line.
    """

    figure: str
    over: Run
    under: Run | None
    bound: float
    at_least: bool = False
    less_mb: float = 0.0

    @property
    def name(self) -> str:
        """What is compared, as "cnn mixed_bfloat16, step: mpl ÷ raw"."""
        figure = self.figure.replace("_", " ")
        if self.figure == "first_step":
            figure += " without imports"
        if self.less_mb:
            figure += f" − {self.less_mb:g} MB"
        under = self.under or self.over
        both = list(zip(self.over, under))
        same = [a for a, b in both if a == b and a not in ("none", "")]
        shown = " ".join(same).replace("dynamic", "dynamic scaling")
        if self.under is None:
            return f"{shown}: {figure}"
        a, b = (" ".join(parts) for parts in zip(*(p for p in both if p[0] != p[1])))
        return f"{shown}, {figure}: {a} ÷ {b}"

    def ratio(self, records: Records) -> Ratio | None:
        """Returns the ratio with its interval; None: it was not measured."""
        over = samples(records.get(self.over), self.figure)
        if self.under is None:
            return ratio_of_medians(over, [1.0] * len(over)) if over else None
        under = samples(records.get(self.under), self.figure)
        if not over or not under:
            return None
        together = (
            records[self.over].side_by_side == records[self.under].side_by_side)
        return ratio_of_medians([a - self.less_mb for a in over], under, together)

    def verdict(self, ratio: Ratio | None) -> str:
        """Returns "met", "missed", "open" or "not measured"."""
        if ratio is None or math.isnan(ratio.ratio):
            return "not measured"
        value, low, high = ratio
        if value >= self.bound if self.at_least else value <= self.bound:
            return "met"
        excluded = high < self.bound if self.at_least else low > self.bound
        return "missed" if excluded else "open"


class Result(NamedTuple):
    """A goal, and what came of it."""

    goal: Goal
    ratio: Ratio | None
    verdict: str


def samples(record: Record | None, figure: str) -> list[float]:
    """Returns the values of a figure, as many as there are."""
    if record is None:
        return []
    return {
        "step": record.ms.get("steps", []),
        "update": record.ms.get("update", []),
        "start": record.first_steps_s,
        "first_step": record.builds_s,
        "memory": record.memory_mb,
        "matmul_fraction": record.matmul_fractions,
    }[figure]


def asks_for(run: Run) -> bool:
    """Returns whether one of the goals that stand for themselves is about a run."""
    return any(run in (goal.over, goal.under) for goal in ALL)


def judge(
    records: Records, works: Sequence[str], policies: Sequence[str]
) -> list[Result]:
    """Returns what came of the goals for these works and policies."""
    asked = set(works)
    timed = [work for work in works if work not in (DIGITS, IMPORT)]
    goals = [*ALL, *(goal for work in timed for goal in _of_every_work(work))]
    results = []
    for goal in goals:
        runs = {goal.over, goal.under or goal.over}
        if all(run.work in asked and run.policy in {*policies, ""} for run in runs):
            ratio = goal.ratio(records)
            results.append(Result(goal, ratio, goal.verdict(ratio)))
    return results


def _mpl(work: str, policy: str = _BF16, scaling: str = "none") -> Run:
    return Run(work, policy, scaling, "mpl")


def _peers(figure: str, ours: Run, **bounds: float) -> list[Goal]:
    return [Goal(figure, ours, ours._replace(system=peer), bound)
            for peer, bound in bounds.items()]


def _faster_than_float32(work: str, bound: float) -> Goal:
    return Goal("step", _mpl(work, "float32"), _mpl(work), bound, at_least=True)


def _of_every_work(work: str) -> list[Goal]:
    goals = []
    for policy in POLICIES:
        none, dynamic = _mpl(work, policy), _mpl(work, policy, "dynamic")
        goals.append(Goal("step", dynamic, none, 1.15 if work == "tiny" else 1.03))
        if policy != "float32":
            fit = none._replace(system="keras_fit")
            goals.append(Goal("memory", none, fit, 1.02, less_mb=BUCKET_MB))
    return goals


ALL = [
    *_peers("step", _mpl("tiny", "float32"), raw=0.85, keras_fit=0.75, orbit=0.85),
    *_peers("step", _mpl("tiny", "float32", "dynamic"), raw=1.0),
    *_peers("step", _mpl("deep"), raw=0.60),
    *_peers("step", _mpl("deep", _BF16, "dynamic"), raw=0.40),
    *_peers("first_step", _mpl("deep"), raw=0.30),
    *_peers("update", _mpl("vars1000", "float32"), raw=0.12),
    *_peers("first_step", _mpl("vars1000", "float32"), raw=0.25),
    Goal("update", _mpl("vars1000", "float32"), _mpl("vars10", "float32"), 2.0),
    *_peers("step", _mpl("mlp"), raw=0.88),
    _faster_than_float32("mlp", 1.85),
    *_peers("step", _mpl("cnn"), raw=1.0, keras_fit=0.75),
    _faster_than_float32("cnn", 1.6),
    *_peers("step", _mpl("resnet"), raw=1.0, keras_fit=0.75),
    _faster_than_float32("resnet", 1.6),
    *_peers("step", _mpl("gpt"), raw=1.0, keras_fit=0.80),
    _faster_than_float32("gpt", 1.5),
    *_peers("step", _mpl("lstm"), raw=0.75),
    *(goal for work in ("recommender", "mf") for policy in POLICIES
      for goal in _peers("step", _mpl(work, policy), raw=1.0)),
    # Where many variables or activations dominate.
    *(goal for work in ("deep", "vars1000", "resnet", "gpt")
      for goal in _peers("memory", _mpl(work), keras_fit=1.0)),
    # On a GPU: at least 1.2 × faster than `fit`, half the rate of matrix products.
    *(goal for work in ("resnet50", "gpt_large") for policy in POLICIES
      for goal in _peers("step", _mpl(work, policy), keras_fit=1 / 1.2)),
    Goal("matmul_fraction", _mpl("gpt_large"), None, 0.5, at_least=True),
    *(goal for policy in POLICIES
      for goal in _peers("start", _mpl(DIGITS, policy), keras_fit=1.0)),
    Goal("start", Run(IMPORT, "", "none", "mpl"),
         Run(IMPORT, "", "none", "tensorflow"), 1.05),
]
