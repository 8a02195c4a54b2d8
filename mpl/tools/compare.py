"""Trains an experiment under several policies and seeds, and says what each gave.

    python -m mpl.tools.compare --policies=float32,mixed_bfloat16 --seeds=0,1,2 \\
      --out=FOLDER -- python -m experiments.digits --train_epochs=5

Each run is the command with --policy, --seed and --workdir added, and --mode=all and
--export_weights=compute unless it says otherwise. A comparison that was cut short goes
on when it is started again.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
        for flag, value in (("mode", "all"), ("export_weights", "compute")):
            if not any(re.match(f"--?{flag}(=|$)", word) for word in command):
                extra.append(f"--{flag}={value}")
        title = f"[{count}/{len(plan)}] {name}"
        measured = trials.run_once([*command, *extra], path, title)
        done.append(Trial(policy, seed, runs.load(path, name), measured))
    goal = comparison.goal_of(done, metric, target)
    for seed in seeds:
        comparison.time_exports([trial for trial in done if trial.seed == seed])
    _write(out, command, done, goal)


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


def _write(out: str, command: Sequence[str], done: Sequence[Trial], goal: Goal) -> None:
    figures = comparison.compare(done, goal)
    base = comparison.reference(figures)
    seeds = list(dict.fromkeys(trial.seed for trial in done))
    what = {name: None if value != value else value  # NaN
            for name, value in dataclasses.asdict(goal).items()}
    content = {"command": list(command), "seeds": seeds, "reference": base, **what,
               "policies": figures}
    title, line, rows = "Policies compared", shlex.join(command), _rows(figures, goal)
    notes, png = _notes(done, len(seeds), base), _picture(done, figures, goal)
    table = [["", *figures], ["---", *["---:"] * len(figures)], *rows]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in table]
    markdown = "\n".join([
        f"# {title}\n", f"    {line}\n", *(f"| {' | '.join(row)} |" for row in cells),
        "", *(f"- {note}" for note in notes), ""])
    html = page.page(
        title, page.paragraph(line), page.table(["", *figures], rows),
        *map(page.paragraph, notes), page.picture(png, "Training and results"))
    page.write(out, {
        "compare.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
        "compare.md": markdown, "compare.html": html, "compare.png": png})
    print(f"\n{markdown}\nLook at {os.path.join(out, 'compare.html')}")


def _rows(figures: Mapping[str, Mapping[str, Spread]], goal: Goal) -> list[list[str]]:
    """Returns a row for each figure that at least one policy has."""
    course, final = f"{goal.split} {goal.metric}", f"{goal.final_split} {goal.metric}"
    base = comparison.reference(figures)
    named = {
        "training_secs": "time in training [s]",
        "speedup": f"speed-up over {base}",
        "steps_per_sec": "steps/s, median of the log's lines",
        "process_secs": "time from start to end [s]",
        "peak_memory_mb": "peak memory of the process [MB]",
        "final": final,
        "difference": f"{final} − {base}'s",
        "skipped_steps": "skipped steps",
        "at_equal_time": f"{course} after {number(goal.equal_secs)} s of training",
        "secs_to_target": f"time in training to {course} {number(goal.target)} [s]",
        "same_class_percent": f"same class as {base} predicts [%]",
        "largest_difference": f"largest difference from {base}'s predictions",
        "predict_1_ms": "predict 1 with the export [ms]",
        "predict_256_ms": "predict 256 with the export [ms]",
    }
    rows = [[words, *(_text(values[name]) for values in figures.values())]
            for name, words in named.items()]
    return [row for row in rows if set(row[1:]) != {"–"}]


def _text(values: Spread) -> str:
    """Returns "0.985 ± 0.002", and of how many seeds if something is missing."""
    text, std, total = number(values["mean"]), values["std"], len(values["values"])
    known = total - values["values"].count(None)
    if std is not None:
        text += f" ± {number(float(f'{std:.2g}'))}"
    return text + f" ({known} of {total} seeds)" * (0 < known < total)


def _notes(done: Sequence[Trial], num_seeds: int, base: str) -> list[str]:
    notes = [
        f"a ± b: mean and sample standard deviation over {num_seeds} seeds. What is "
        f"compared with {base} is so by pairs of the same seed; {base}'s own "
        "predictions are compared with those of its next seed: so much is chance."]
    if num_seeds == 1:
        notes = ["One seed: what is chance and what is the policy cannot be told."]
    notes.append("Time in training is that in blocks of steps, tracing included; "
                 "evaluation and saving do not count. Equal time is that of the "
                 "shortest run.")
    dtypes = {trial.policy: trial.measured.get("computes_in") for trial in done}
    if any(dtypes.values()):
        words = ", ".join(f"{dtype} ({name})" for name, dtype in dtypes.items())
        notes.append(f"Prediction: medians, by turns. The exports compute in {words}.")
    return notes


def _picture(
    done: Sequence[Trial], figures: Mapping[str, Mapping[str, Spread]], goal: Goal
) -> bytes:
    """Draws the course of each run, and three figures with a point for each run."""
    drawn, (course, *panels) = plots.figure("Policies compared", 4)
    styles: dict[str, dict[str, Any]] = {
        policy: {"color": f"C{i % 10}"} for i, policy in enumerate(figures)}
    for trial in done:
        course.plot(*goal.course(trial.run), ".-", linewidth=1, **styles[trial.policy])
    lines = {"equal time": {"color": "#555555", "linestyle": ":"},
             "target": {"color": "#555555", "linestyle": "--"}}
    course.axvline(goal.equal_secs, **lines["equal time"])
    course.axhline(goal.target, **lines["target"])
    course.set(title="Course of each run", xlabel="time in training [s]",
               ylabel=plots.plain(f"{goal.split} {goal.metric}"))
    final = plots.plain(f"{goal.final_split} {goal.metric}")
    labels = {"training_secs": "time in training [s]", "final": final,
              "peak_memory_mb": "peak memory [MB]"}
    for panel, (name, label) in zip(panels, labels.items()):
        for place, (policy, values) in enumerate(figures.items()):
            points = np.array([values[name]["mean"], *values[name]["values"]], float)
            panel.plot(place, points[0], "_", markersize=40, **styles[policy])
            panel.plot([place] * len(points[1:]), points[1:], "o", **styles[policy])
        panel.set_xticks(range(len(figures)), map(plots.plain, figures))
        panel.set(title=f"{label.partition(' [')[0]}: each run, and the mean",
                  xlabel="policy", ylabel=label, xlim=(-0.5, len(figures) - 0.5))
        if name != "final":
            plots.from_zero(panel)
    plots.legend(drawn, [*styles.items(), *lines.items()])
    return plots.png(drawn)


def integers(text: str) -> list[int]:
    """Reads 0,1,2."""
    return list(dict.fromkeys(map(int, text.split(","))))


def metric_and_value(text: str) -> tuple[str, float | None]:
    """Reads METRIC or METRIC:VALUE."""
    name, _, value = text.partition(":")
    return name, float(value) if value else None


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a command line, by default this process's, and compares."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = Parser(
        "python -m mpl.tools.compare", "%(prog)s [--flag=value ...] -- command ...",
        "Trains under several policies and seeds, and says what each gave.",
        allow_abbrev=False)
    add = parser.add_argument
    add("--policies", default="float32,mixed_bfloat16,mixed_float16",
        help="with commas between; float32, or else the first, is what the others are "
        "compared with (default: %(default)s)")
    add("--seeds", type=integers, default="0,1,2", help="(default: %(default)s)")
    add("--out", default="runs/compare",
        help="folder for the runs and what is written (default: %(default)s)")
    add("--target", type=metric_and_value, default=(None, None),
        metavar="METRIC[:VALUE]", help="what is compared, and the value whose time is "
        "told (default: the experiment's first metric; the worst that a run of float32 "
        "ends with)")
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
