"""Trains an experiment under several policies and seeds, and says what each gave.

    python -m mpl.tools.compare --policies=float32,mixed_bfloat16 --seeds=0,1,2 \\
      --out=FOLDER -- python -m experiments.digits --train_epochs=5

Each run is the command with --policy, --seed and --workdir added, and --mode=all unless
it names a mode. A comparison that was cut short goes on when it is started again.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mpl.errors import ConfigError
from mpl.precision.policy import get_policy
from mpl.tools import comparison, page, plots, runs, trials
from mpl.tools.command_line import Parser, code_of
from mpl.tools.comparison import Goal, Spread, Trial
from mpl.tools.page import number

_OURS = re.compile(r"--?(policy|seed|workdir)(=|$)")


def run(
    command: Sequence[str], policies: Sequence[str], seeds: Sequence[int], out: str,
    metric: str | None = None, target: float | None = None,
) -> None:
    """Runs a command under each policy and seed, and writes what came out.

    Args:
        command: the experiment's program and its flags.
        policies: names that `get_policy` reads; float32, or else the first, is what
            the others are compared with.
        seeds: of the runs; each policy has all of them.
        out: folder for the runs, compare.json, .md, .html and .png.
        metric: what is compared; None: the experiment's first metric.
        target: value whose time is told; None: see `comparison.goal_of`.

    Raises:
        ConfigError: a policy is unknown, matplotlib is missing, `out` holds another
            comparison, a run failed, or the runs cannot be compared.
    """
    plots.check()
    for policy in policies:
        get_policy(policy)
    _claim(pathlib.Path(out), command)
    # Seed by seed, so that a machine that slows down slows all policies down.
    plan = [(policy, seed) for seed in seeds for policy in policies]
    done = []
    for count, (policy, seed) in enumerate(plan, 1):
        path, name = os.path.join(out, policy, str(seed)), f"{policy} seed {seed}"
        extra = [f"--policy={policy}", f"--seed={seed}", f"--workdir={path}"]
        if not any(re.match("--?mode(=|$)", word) for word in command):
            extra.append("--mode=all")
        title = f"[{count}/{len(plan)}] {name}"
        measured = trials.run_once([*command, *extra], path, title)
        done.append(Trial(policy, seed, runs.load(path, name), measured))
    _write(out, command, done, comparison.goal_of(done, metric, target))


def _claim(out: pathlib.Path, command: Sequence[str]) -> None:
    """Notes what is compared in a folder, so that runs of two commands never mix."""
    file = out / "command.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(list(command)), "utf-8")
    elif (before := json.loads(file.read_text("utf-8"))) != list(command):
        raise ConfigError(
            f"`out` ({out}) holds a comparison of another command: "
            f"{shlex.join(before)}",
            "Give another folder, --out=<folder>, or delete this one.",
        )


def _write(
    out: str, command: Sequence[str], done: Sequence[Trial], goal: Goal
) -> None:
    figures = comparison.compare(done, goal)
    first = {trial.policy: trial.run.path for trial in reversed(done)}
    exports = {policy: os.path.join(path, "export") for policy, path in first.items()}
    inference = comparison.latencies(
        {policy: path for policy, path in exports.items() if os.path.isdir(path)})
    seeds = list(dict.fromkeys(trial.seed for trial in done))
    base = comparison.reference(figures)
    head, rows = ["", *figures], _rows(figures, inference, goal, base)
    notes = _notes(len(seeds), base)
    if inference:
        notes.append("Prediction: medians and quartiles in turns, first seed's export.")
    png = _picture(done, figures, goal)
    content = {
        "command": list(command), "seeds": seeds, "reference": base, "metric":
        goal.metric, "split": goal.split, "final_split": goal.final_split,
        "target": _finite(goal.target), "equal_secs": _finite(goal.equal_secs),
        "policies": {name: {**values, "inference_ms": inference.get(name)}
                     for name, values in figures.items()},
    }  # fmt: skip
    title, line = "Policies compared", shlex.join(command)
    table = [head, ["---", *["---:"] * len(figures)], *rows]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in table]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    markdown = "\n".join(
        [f"# {title}\n", f"    {line}\n", *lines, "", *(f"- {n}" for n in notes), ""])
    html = page.page(
        title, page.paragraph(line), page.table(head, rows),
        *map(page.paragraph, notes), page.picture(png, "Training and results"))
    page.write(out, {
        "compare.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
        "compare.md": markdown, "compare.html": html, "compare.png": png})
    print(f"\n{markdown}\nLook at {os.path.join(out, 'compare.html')}")


def _finite(value: float) -> float | None:
    return None if value != value else value


def _text(values: Spread, unit: float = 1.0, sign: str = "") -> str:
    """Returns "0.985 ± 0.002", and of how many seeds if something is missing."""
    mean, std, total = values["mean"], values["std"], len(values["values"])
    if mean is None:
        return "–"
    known = sum(value is not None for value in values["values"])
    plus = sign if mean > 0 else ""
    text = plus + number(mean * unit)
    if std is not None:
        text += f" ± {number(float(f'{std * unit:.2g}'))}"
    return text + (f" ({known} of {total} seeds)" if known < total else "")


def _rows(
    figures: Mapping[str, Mapping[str, Spread]], inference: Mapping[str, Any],
    goal: Goal, base: str,
) -> list[list[str]]:
    """Returns a row for each figure that at least one policy has."""
    course, metric = f"{goal.split} {goal.metric}", goal.metric
    named = {
        "training_secs": "time in training [s]",
        "speedup": f"speed-up over {base}",
        "steps_per_sec": "steps/s, median of the log's lines",
        "process_secs": "time from start to end [s]",
        "peak_memory_mb": "peak memory of the process [MB]",
        "final": f"{goal.final_split} {metric}",
        "difference": f"{goal.final_split} {metric} − {base}'s",
        "skipped_steps": "skipped steps",
        "at_equal_time": f"{course} after {number(goal.equal_secs)} s of training",
        "secs_to_target": f"time in training to {course} {number(goal.target)} [s]",
        "agreement": f"same class as {base} predicts [%]",
        "largest_difference": f"largest difference from {base}'s predictions",
    }
    rows = []
    for name, words in named.items():
        unit, sign = 100 if name == "agreement" else 1, "+" * (name == "difference")
        cells = [_text(values[name], unit, sign) if name in values else "–"
                 for values in figures.values()]
        rows += [[words, *cells]] * any(cell != "–" for cell in cells)
    for key in ("batch_1", "batch_256") if inference else ():
        cells = []
        for policy in figures:
            low, mid, high = (inference.get(policy, {}).get(key, {}).get(part)
                              for part in ("low", "median", "high"))
            span = f" ({number(low)}–{number(high)})" if mid else ""
            cells.append(number(mid) + span)
        size = key.removeprefix("batch_")
        rows.append([f"predict {size} with the export [ms]", *cells])
    if inference:
        cells = [inference.get(p, {}).get("computes_in", "–") for p in figures]
        rows.append(["the export computes in", *cells])
    return rows


def _notes(num_seeds: int, base: str) -> list[str]:
    chance = (
        f"a ± b: mean and sample standard deviation over {num_seeds} seeds. Against "
        f"{base}: by pairs of the same seed. {base}'s predictions are compared with its "
        "own of the next seed: so much is chance.")
    if num_seeds == 1:
        chance = "One seed: what is chance and what is the policy cannot be told."
    return [
        chance,
        "Time in training is that in blocks of steps, tracing included; evaluation and "
        "saving do not count.",
        "Equal time is that of the shortest run.",
    ]


def _picture(
    done: Sequence[Trial], figures: Mapping[str, Mapping[str, Spread]], goal: Goal
) -> bytes:
    """Draws the course of each run, and three figures with a point for each run."""
    drawn, panels = plots.figure("Policies compared", 4)
    colors = {policy: f"C{number % 10}" for number, policy in enumerate(figures)}
    for trial in done:
        panels[0].plot(*goal.course(trial.run), marker=".", linewidth=1,
                       color=colors[trial.policy])
    panels[0].axvline(goal.equal_secs, color="#555555", linestyle=":")
    panels[0].axhline(goal.target, color="#555555", linestyle="--")
    course = plots.plain(f"{goal.split} {goal.metric}")
    panels[0].set(title="Course of each run", xlabel="time in training [s]",
                  ylabel=course)
    final = plots.plain(f"{goal.final_split} {goal.metric}")
    for panel, name, label in zip(
        panels[1:], ("training_secs", "final", "peak_memory_mb"),
        ("time in training [s]", final, "peak memory [MB]"),
    ):
        for place, (policy, values) in enumerate(figures.items()):
            points = [v for v in values[name]["values"] if v is not None]
            panel.plot([place] * len(points), points, "o", color=colors[policy])
            if points:
                panel.hlines(values[name]["mean"], place - 0.2, place + 0.2,
                             color=colors[policy])
        panel.set_xticks(range(len(figures)), map(plots.plain, figures))
        panel.set_xlim(-0.5, len(figures) - 0.5)
        panel.set(title=f"{label.partition(' [')[0]}: each run, and the mean",
                  xlabel="policy", ylabel=label)
        if name != "final":
            panel.set_ylim(bottom=0)
    plots.legend(drawn, [
        *((policy, {"color": color}) for policy, color in colors.items()),
        ("equal time", {"color": "#555555", "linestyle": ":"}),
        ("target", {"color": "#555555", "linestyle": "--"})])
    return plots.png(drawn)


def _target(text: str) -> tuple[str | None, float | None]:
    name, _, value = text.partition(":")
    try:
        return name or None, float(value) if value else None
    except ValueError:
        cause = f"{text} must be METRIC or METRIC:VALUE, such as accuracy:0.95"
        raise argparse.ArgumentTypeError(cause) from None


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        cause = f"{text} must be integers, such as 0,1,2"
        raise argparse.ArgumentTypeError(cause) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a command line, by default this process's, and compares."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = Parser(
        "python -m mpl.tools.compare", "%(prog)s [--flag=value ...] -- command ...",
        __doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--policies", default="float32,mixed_bfloat16,mixed_float16",
        help="with commas between; float32, or else the first, is what the others are "
        "compared with (default: %(default)s)")
    add("--seeds", type=_seeds, default="0,1,2", help="(default: %(default)s)")
    add("--out", default="runs/compare",
        help="folder for the runs and what is written (default: %(default)s)")
    add("--target", type=_target, default=(None, None), help="METRIC or METRIC:VALUE, "
        "what is compared and the value whose time is told (default: the experiment's "
        "first metric; the worst that a run of float32 ends with)")
    given, command = parser.parse_args(words[:cut]), words[cut + 1:]
    if not command:
        parser.error("there is no command after --")
    if ours := [word for word in command if _OURS.match(word)]:
        parser.error(f"{ours[0]} is set by this tool: leave it out after --")
    policies = list(dict.fromkeys(given.policies.split(",")))
    return code_of(
        lambda: run(command, policies, given.seeds, given.out, *given.target))


if __name__ == "__main__":
    sys.exit(main())
