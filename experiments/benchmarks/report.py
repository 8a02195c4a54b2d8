"""What was measured, for programs (results.json) and for people (tables, a picture)."""

import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.benchmarks import measure
from experiments.benchmarks.goals import IMPORT, Result, samples
from experiments.benchmarks.measure import Ratio, Record, Records, Run, ratio_of_medians

# Of the loss after one step and after all; of how far training has moved it.
_FLOAT32, _16_BIT = (1e-3, 3e-3, 0.1), (2e-2, 5e-2, 0.5)
_TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
_COLORS = {"raw": "#4477aa", "keras_fit": "#ee8866", "orbit": "#44aa77"}


def loss_mismatches(records: Records) -> list[str]:
    """Returns a line for each run whose loss is not that of its peers.

    The runs of a work, policy and scaling are compared with `raw`, or the first of
    them. A difference is allowed after one step of 1e-3 of the loss in float32 (Adam's
    first step gives full length to a gradient that is zero but for rounding, as that of
    the keys' biases of GPT: 1.9e-4), and of 2e-2 in 16 bits, where each operation
    rounds to two or three digits. Training amplifies rounding: after `LOSS_STEPS` steps
    3e-3 and 5e-2 are allowed (TensorFlow's fused Adam and Keras's, which round
    differently, are 1.8e-3 apart on ResNet-20), and a tenth (half) of how far training
    has moved the reference's, so that who did nothing does not pass.
    """
    lines = []
    for run, record in records.items():
        peers = [r for r in records if r[:3] == run[:3] and records[r].loss is not None]
        if record.loss is None:
            continue
        reference = next((r for r in peers if r.system == "raw"), peers[0])
        first, loss = records[reference].first_loss, records[reference].loss
        assert loss is not None
        of_first, of_loss, of_change = _FLOAT32 if run.policy == "float32" else _16_BIT
        tolerance = of_loss * abs(loss)
        compared = []
        if first is not None and record.first_loss is not None:
            tolerance = min(tolerance, of_change * abs(loss - first))
            compared = [(1, record.first_loss, first, of_first * abs(first))]
        compared += [(measure.LOSS_STEPS, record.loss, loss, tolerance)]
        for steps, own, other, allowed in compared:
            if not abs(own - other) <= allowed:  # NaN is one, too
                lines.append(
                    f"LOSSES DIFFER after {steps} steps: {run} {own:.6g}, "
                    f"{reference.system} {other:.6g}; allowed: {allowed:.2g}.")
    return lines


def faults(records: Records) -> list[str]:
    """Returns a line for each run that failed or whose loss is not its peers'."""
    failed = [f"FAILED: {run}: {record.error}"
              for run, record in records.items() if record.error]
    return failed + loss_mismatches(records)


def _ratio(records: Records, over: Run, under: Run, figure: str) -> Ratio | None:
    a, b = samples(records.get(over), figure), samples(records.get(under), figure)
    if not a or not b:
        return None
    together = records[over].side_by_side == records[under].side_by_side
    return ratio_of_medians(a, b, together)


def ratios(records: Records, run: Run) -> dict[str, Ratio | None]:
    """Returns the ratios that concern a run, by name; None: not measured."""
    ours, none = run._replace(system="mpl"), run._replace(scaling="none")
    float32 = run._replace(policy="float32")
    found = {}
    if run.system != "mpl":
        for figure in ("step", "update", "first_step", "start", "memory"):
            found[f"mpl_over_this_{figure}"] = _ratio(records, ours, run, figure)
    if run.scaling == "dynamic":
        found["dynamic_over_none_step"] = _ratio(records, run, none, "step")
    if run.policy != "float32":
        found["float32_over_this_step"] = _ratio(records, float32, run, "step")
    return found


def rows(records: Records) -> list[dict[str, Any]]:
    """Returns what results.json holds of each run."""
    return [_row(records, run) for run in records if run.work != IMPORT]


def _row(records: Records, run: Run) -> dict[str, Any]:
    record, facts = records[run], records[run].facts
    step = _spread(record.ms.get("steps"))
    batch_size = facts.get("batch_size")
    return {
        **run._asdict(),
        "ms_per_step": step,
        "first_step_s": _median(record.first_steps_s),
        "peak_memory_mb": _median(record.rss_mb),
        "loss_after": record.loss,
        "examples_per_sec": batch_size and step["median"]
        and 1e3 * batch_size / step["median"],
        "matmul_fraction": _median(record.matmul_fractions),
        "ratios": {
            name: ratio and ratio._asdict()
            for name, ratio in ratios(records, run).items()
        },
        "update_ms": _spread(record.ms.get("update")),
        "allocator_peak_mb": _median(record.allocator_mb),
        "checkpoint_blocked_s": _median(record.checkpoint_s),
        "predict_ms": _spread(record.predict_ms),
        "steps_per_block": record.counts.get("steps"),
        "blocks_ms": record.ms.get("steps"),
        "first_steps_s": record.first_steps_s,
        "first_steps_without_import_s": record.builds_s,
        "peak_memories_mb": record.rss_mb,
        "side_by_side": record.side_by_side,
        "error": record.error,
        **{name: value for name, value in facts.items() if name != "first_step_s"},
    }


def results_json(
    machine: Mapping[str, Any], records: Records, results: Iterable[Result], **more: Any
) -> dict[str, Any]:
    """Returns the content of results.json."""
    imports = {run.system: record.first_steps_s
               for run, record in records.items() if run.work == IMPORT}
    return {
        "machine": machine,
        "rows": rows(records),
        "goals": [
            {"name": goal.name, "bound": goal.bound, "at_least": goal.at_least,
             "verdict": verdict, **(ratio or Ratio(*[math.nan] * 3))._asdict()}
            for goal, ratio, verdict in results
        ],
        "import_secs": imports,
        "loss_mismatches": loss_mismatches(records),
        **more,
    }  # fmt: skip


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Replaces a file at once; what is not finite becomes null."""
    path = pathlib.Path(path)
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _median(values: Sequence[float] | None) -> float | None:
    return statistics.median(values) if values else None


def _spread(values: Sequence[float] | None) -> dict[str, float | None]:
    if not values:
        return {"min": None, "median": None, "max": None}
    return {"min": min(values), "median": _median(values), "max": max(values)}


def tables(records: Records) -> str:
    """Returns a table for each work and policy, at most 100 columns wide."""
    lines = []
    for work, policy in dict.fromkeys(run[:2] for run in records):
        group = {r: record for r, record in records.items() if r[:2] == (work, policy)}
        if work != IMPORT:
            lines += [f"\n{work}, {policy}{_about(group.values())}", _HEAD]
            lines += [_line(records, run) for run in group]
    others = [run for run, record in records.items() if record.ms]
    if others:
        lines += [_OTHER_TITLE, _OTHER_HEAD]
        lines += [_other_line(records, run) for run in others]
    return "\n".join(lines)


_HEAD = (f"  {'system':<10}{'scaling':<9}{'ms/step (min–max)':<25}"
         f"{'mpl ÷ it (95 %)':<20}{'to step 1 s':>12}{'peak MB':>9}{'loss':>9}")
_OTHER_TITLE = ("\nOther figures: share of the matmul rate, dynamic scaling ÷ none; "
                "in ms what a save\nholds up, a prediction for one example, an update")
_OTHER_HEAD = (f"  {'':<45}{'examples/s':>10}{'matmul':>8}{'÷ none':>8}"
               f"{'save':>7}{'predict':>9}{'update':>8}")  # fmt: skip


def _about(group: Iterable[Record]) -> str:
    for record in group:
        if record.facts:
            steps = record.counts.get("steps")
            blocks = f", blocks of {steps} steps" if steps else ""
            return (f": batch {record.facts['batch_size']}, "
                    f"{record.facts['variables']} variables, "
                    f"{record.facts['parameters']:,} parameters{blocks}")
    return ""


def _line(records: Records, run: Run) -> str:
    record = records[run]
    step = _spread(record.ms.get("steps"))
    ratio = ratios(records, run).get("mpl_over_this_step")
    line = (
        f"  {run.system:<10}{run.scaling:<9}{_with_ends(*step.values()):<25}"
        f"{ratio_text(ratio) if run.system != 'mpl' else '':<20}"
        f"{_short(_median(record.first_steps_s)):>12}"
        f"{_short(_median(record.memory_mb)):>9}"
        f"{'–' if record.loss is None else f'{record.loss:.4f}':>9}"
    )
    return f"{line}\n    {record.error[:92]}" if record.error else line


def _other_line(records: Records, run: Run) -> str:
    row = _row(records, run)
    save, share = row["checkpoint_blocked_s"], row["matmul_fraction"]
    dynamic = ratios(records, run).get("dynamic_over_none_step")
    return (
        f"  {' '.join(part for part in run if part != 'none'):<45}"
        f"{_short(row['examples_per_sec']):>10}"
        f"{'–' if share is None else f'{share:.1%}':>8}"
        f"{f'{dynamic.ratio:.2f}' if dynamic else '–':>8}"
        f"{_short(save and 1e3 * save):>7}"
        f"{_short(row['predict_ms']['median']):>9}"
        f"{_short(row['update_ms']['median']):>8}"
    )


def goals_table(results: Iterable[Result]) -> str:
    """Returns a line for each goal, those that were not reached first."""
    order = ("missed", "open", "met", "not measured")
    lines = ["\nGoals (a ratio of medians with its 95 % interval)"]
    for goal, ratio, verdict in sorted(results, key=lambda r: order.index(r.verdict)):
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:.3g}"
        lines.append(f" {verdict:<13}{ratio_text(ratio):<19}{bound:<7}{goal.name}")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def ratio_text(ratio: Ratio | None) -> str:
    """Returns "0.85 (0.83–0.88)"."""
    if ratio is None:
        return "–"
    ends = f" ({ratio.low:.2f}–{ratio.high:.2f})" if not math.isnan(ratio.low) else ""
    return f"{ratio.ratio:.2f}{ends}"


def _with_ends(low: float | None, median: float | None, high: float | None) -> str:
    if median is None:
        return "–"
    return f"{_short(median)} ({_short(low)}–{_short(high)})"


def draw(
    records: Records, path: str | os.PathLike[str], say: Callable[[str], None] = print
) -> bool:
    """Draws the ratios of step times; returns whether matplotlib is there to do so."""
    try:
        import matplotlib.figure
    except ImportError:
        say("No picture: pip install matplotlib (the extra `plots`) to have one.")
        return False
    timed = [run for run, record in records.items() if record.ms.get("steps")]
    policies = list(dict.fromkeys(run.policy for run in timed))
    works = list(dict.fromkeys(run.work for run in timed))
    peers = [s for s in _COLORS if any(run.system == s for run in timed)]
    figure = matplotlib.figure.Figure(
        figsize=(max(7.0, 2.0 + 1.5 * len(works)), 0.8 + 2.9 * max(1, len(policies))),
        layout="constrained")
    figure.suptitle("Time of a training step: mpl ÷ peer, medians with 95 % intervals\n"
                    "below 1 mpl is faster", fontsize=11)
    panels = figure.subplots(max(1, len(policies)), 1, squeeze=False, sharey=True)[:, 0]
    for panel, policy in zip(panels, policies):
        _draw_policy(panel, records, policy, works, peers)
    if policies:
        panels[0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=120)
    return True


def _draw_policy(
    panel: Any, records: Records, policy: str, works: list[str], peers: list[str]
) -> None:
    kinds = [(scaling, peer) for scaling in ("none", "dynamic") for peer in peers
             if any(run[1:] == (policy, scaling, peer) for run in records)]
    width = 0.85 / max(1, len(kinds))
    for number, (scaling, peer) in enumerate(kinds):
        shift = (number - (len(kinds) - 1) / 2) * width
        dynamic = scaling == "dynamic"
        label = f"{peer}, both with\ndynamic scaling" if dynamic else peer
        for place, work in enumerate(works):
            ratio = ratios(records, Run(work, policy, scaling, peer)).get(
                "mpl_over_this_step")
            if ratio is None:
                continue
            value, low, high = ratio
            ends = [[max(0.0, value - low)], [max(0.0, high - value)]]  # 0 for NaN
            panel.bar(
                place + shift, value - 1, width * 0.9, bottom=1, yerr=ends,
                color=_COLORS[peer], alpha=0.5 if dynamic else 1.0,
                hatch="///" if dynamic else None, edgecolor="white",
                ecolor="#333333", capsize=2, label=label)
            label = "_"  # once in the legend
            up = value >= 1
            panel.annotate(
                f"{value:.2f}", (place + shift, value + (ends[1][0] if up else
                                                         -ends[0][0])),
                (0, 3 if up else -3), textcoords="offset points", ha="center",
                va="bottom" if up else "top", fontsize=7, rotation=90)
    panel.axhline(1, color="#333333", linewidth=1)
    panel.set_yscale("log")
    panel.margins(x=0.02, y=0.3)
    low, high = panel.get_ylim()
    panel.set_yticks([t for t in _TICKS if low <= t <= high], minor=False)
    panel.minorticks_off()
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xticks(range(len(works)), works)
    panel.set_title(policy, loc="left", fontsize=10)
    panel.set_ylabel("mpl ÷ peer")
    panel.grid(axis="y", alpha=0.25)
    panel.set_axisbelow(True)
