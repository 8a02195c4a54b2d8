"""Curves of one run, or of several side by side, as one HTML page and PNGs.

    python -m mpl.tools.report [RUN ...] [--out=FOLDER]

Without a RUN it shows the one below `runs` that was written to last.
"""

import glob
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpl.errors import ConfigError
from mpl.launch import workdir
from mpl.tools import page, plots
from mpl.tools.command_line import Parser, code_of
from mpl.tools.page import number
from mpl.tools.runs import EVALUATIONS, LOG, Run, common_metrics, load

_STYLES: dict[str, dict[str, Any]] = {
    "train": dict(linestyle="--", linewidth=1, alpha=0.7),
    "validation": dict(linestyle="-", marker=".", markersize=5),
    "test": dict(linestyle="", marker="*", markersize=11, markeredgecolor="white"),
}
_SKIPS: dict[str, Any] = dict(linestyle="", marker="x", markersize=7, markeredgewidth=2)
_TRAINING = {
    "learning_rate": "learning rate",
    "loss_scale": "loss scale",
    "examples_per_sec": "throughput [examples/s]",
    "goodput": "goodput [share of wall time]",
}
_PANELS = 4  # at most in one picture


def report(paths: Sequence[str], out: str | None = None) -> str:
    """Writes report.html and PNGs about runs.

    Args:
        paths: folders of runs of which all have at least one metric in common.
        out: folder to write; None: `report` in the first run's.

    Returns:
        The path of report.html.

    Raises:
        ConfigError: a folder is not that of a run, its metrics.jsonl is damaged, the
            runs have nothing in common, or matplotlib is missing.
    """
    plots.check()
    runs = [load(path) for path in dict.fromkeys(paths)]
    common = common_metrics(runs)
    pictures = _pictures(runs, common)
    folder = out or os.path.join(runs[0].path, "report")
    text = page.page(
        ", ".join(run.name for run in runs),
        page.table(["", *(run.name for run in runs)], _rows(runs, common)),
        *(page.picture(png, name) for name, png in pictures.items()),
        page.details("Flags that do not differ", "\n".join(
            f"--{name}={values[0]}" for name, values in _flags(runs, False).items())),
        page.paragraph(
            "Time in training is that in blocks of steps, tracing included; "
            "evaluation, saving and the time between restarts do not count."),
    )
    page.write(folder, {**pictures, "report.html": text})
    return os.path.join(folder, "report.html")


def _flags(runs: Sequence[Run], differ: bool) -> dict[str, list[str]]:
    """Returns the flags that differ between runs, or the others, with their values."""
    names = dict.fromkeys(name for run in runs for name in run.flags)
    values = {name: [run.flags.get(name, "–") for run in runs] for name in names}
    return {name: v for name, v in values.items() if (len(set(v)) > 1) == differ}


def _rows(runs: Sequence[Run], metrics: Sequence[str]) -> list[list[str]]:
    """Returns the rows of the table: flags that differ first, then figures."""
    rows = [[f"--{name}", *values] for name, values in _flags(runs, True).items()]
    if rows:
        rows = [["Flags that differ"], *rows, ["Figures"]]
    splits = [s for s in EVALUATIONS if any(run.split(s) == s for run in runs)]
    for split, name in itertools.product(splits or ["train"], metrics):
        finals = [number(run.last(split, name)) for run in runs]
        rows.append([f"{split} {name}, last", *finals])
    steps = [max(line["step"] for line in run.lines) for run in runs]
    secs = [run.training_secs([step])[0] for run, step in zip(runs, steps)]
    rates = [run.curve("train", "examples_per_sec")[1] for run in runs]
    rows += [
        ["steps", *map(number, steps)],
        ["time in training [s]", *map(number, secs)],
        ["examples/s, median", *(number(np.median(r) if r else None) for r in rates)],
    ]
    for name, words in (("skipped_steps", "skipped steps"), ("goodput", "goodput")):
        if any(run.curve("train", name)[0] for run in runs):
            rows.append([words, *(number(run.last("train", name)) for run in runs)])
    return rows


def _pictures(runs: Sequence[Run], common: Sequence[str]) -> dict[str, bytes]:
    """Returns PNGs by name: metrics by split, and how training went."""
    names = sorted(dict.fromkeys([*common, *(n for run in runs for n in run.metrics)]),
                   key=lambda name: name != "loss")
    splits = [s for s in _STYLES if any(run.split(s) == s for run in runs)]
    found = {}
    for start in range(0, len(names), _PANELS):
        part = names[start:start + _PANELS]
        drawn, panels = plots.figure("Loss and metrics", len(part))
        for panel, name in zip(panels, part):
            _draw_metric(panel, runs, name, splits)
        plots.legend(drawn, [*_of_runs(runs), *(
            (split, {"color": "#555555", **_STYLES[split]}) for split in splits)])
        found[f"metrics{start // _PANELS or ''}.png"] = plots.png(drawn)
    there = [n for n in _TRAINING if any(run.curve("train", n)[0] for run in runs)]
    if there:
        drawn, panels = plots.figure("Training", len(there))
        for panel, name in zip(panels, there):
            _draw_training(panel, runs, name)
        skips = [("steps skipped since the line before", {"color": "#555555", **_SKIPS})
                 ] * any(_skips(run)[0] for run in runs)
        plots.legend(drawn, [*_of_runs(runs), *skips])
        found["training.png"] = plots.png(drawn)
    return found


def _of_runs(runs: Sequence[Run]) -> list[tuple[str, dict[str, Any]]]:
    return [(run.name, {"color": _color(i)}) for i, run in enumerate(runs)]


def _color(number: int) -> str:
    return f"C{number % 10}"


def _draw_metric(
    panel: Any, runs: Sequence[Run], name: str, splits: Sequence[str]
) -> None:
    values = []
    for (i, run), split in itertools.product(enumerate(runs), splits):
        curve = run.curve(split, name)
        if split == "test":  # one point: the result
            curve = curve[0][-1:], [run.last(split, name)][:len(curve[0])]
        panel.plot(*curve, color=_color(i), **_STYLES[split])
        values += [value for value in curve[1] if np.isfinite(value)]
    panel.set(title=plots.plain(name), xlabel="step", ylabel=plots.plain(name))
    if name == "loss" and values and 0 < min(values) < max(values) / 20:
        panel.set_yscale("log")


def _draw_training(panel: Any, runs: Sequence[Run], name: str) -> None:
    for i, run in enumerate(runs):
        panel.plot(*run.curve("train", name), color=_color(i), linewidth=1.2)
        if name == "loss_scale":
            panel.plot(*_skips(run), color=_color(i), **_SKIPS)
    label = _TRAINING[name]
    panel.set(title=label.partition(" [")[0], xlabel="step", ylabel=label)
    if name == "loss_scale":
        panel.set_yscale("log", base=2)
    elif name in ("examples_per_sec", "goodput"):
        plots.from_zero(panel)


def _skips(run: Run) -> tuple[list[int], list[float]]:
    """Returns the steps of lines before which steps were skipped, and the scale."""
    steps, counts = run.curve("train", "skipped_steps")
    scales = dict(zip(*run.curve("train", "loss_scale")))
    marked = [step for step, more in zip(steps, np.diff(counts, prepend=0)) if more > 0]
    return marked, [scales.get(step, np.nan) for step in marked]


def latest() -> str:
    """Returns the folder below `runs` whose metrics.jsonl was written to last.

    Raises:
        ConfigError: there is none.
    """
    places = (f"{workdir.RUNS}/*/{workdir.LATEST}/{LOG}", f"{workdir.RUNS}/*/{LOG}")
    logs = [log for place in places for log in glob.glob(place)]
    if not logs:
        cause = f"No run is named, and `{workdir.RUNS}` holds none."
        raise ConfigError(cause, "Name the folder of a run, or train one: make train.")
    newest = max(logs, key=os.path.getmtime)
    return os.path.relpath(os.path.realpath(os.path.dirname(newest)))


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a command line, by default this process's, and writes the report."""
    parser = Parser(
        "python -m mpl.tools.report", description="Shows runs as a page with curves.",
        allow_abbrev=False)
    parser.add_argument("run", nargs="*", help="folder (default: the latest run)")
    parser.add_argument("--out", help="folder to write (default: RUN/report)")
    given = parser.parse_args(argv)

    def work() -> None:
        print(f"Look at {report(given.run or [latest()], given.out)}")

    return code_of(work)


if __name__ == "__main__":
    sys.exit(main())
