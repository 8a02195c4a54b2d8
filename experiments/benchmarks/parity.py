"""Mixed precision beside float32, and mpl beside Keras's `fit`, on whole trainings.

    python -m experiments.benchmarks.parity --out=runs/parity [--binaries=digits] \\
      [-- --train_epochs=5]

For each binary: trainings under each policy and seed by `mpl.tools.compare`, each
followed by the same one by `fit`, where that can have its loop and its model. Flags
after -- are the binaries', in place of those in CUT_SHORT. Expected: the table in
parity.md and parity.json. What was interrupted goes on when it is started again. Exit
code 1: a binary failed.
"""

import datetime
import json
import pathlib
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.benchmarks import binaries, fit, machine, report
from mpl.errors import ConfigError
from mpl.precision.policy import get_policy
from mpl.tools import compare, trials
from mpl.tools.command_line import Parser, code_of
from mpl.tools.comparison import Spread, reference, spread
from mpl.tools.page import number

# On the 2 cores that the table was made for, one of its steps takes 40 seconds.
LEFT_OUT = ("imagenet_resnet",)
# Flags of those whose default takes a minute or more there.
CUT_SHORT = {
    "cifar_resnet": ("--depth=8", "--global_batch_size=32", "--train_epochs=4"),
    "char_lm": ("--train_epochs=2",),
}
GOAL = 1.25  # time of fit ÷ that of mpl, from the start of a process to its end
_COMMAND = ("python", "-m", "experiments.benchmarks.parity")
_HEAD = ("binary", "policy", "metric", "mean ± sd", "− reference's", "within 2 sd",
         "training [s]", "process [s]", "peak [MB]", "by fit", "fit ÷ mpl, training",
         "fit ÷ mpl, process")


def measure(
    name: str, extra: Sequence[str], policies: Sequence[str], seeds: Sequence[int],
    out: pathlib.Path,
) -> dict[str, Any]:
    """Trains a binary under each policy and seed, by mpl and by `fit`.

    Args:
        name: of the binary.
        extra: flags for it.
        policies, seeds: of the trainings; each policy has all seeds.
        out: folder of the trainings.

    Returns:
        What `figures` makes of it, `command`, and by policy why there is `no_fit`.

    Raises:
        ConfigError: a training failed.
    """
    command = [sys.executable, "-m", f"experiments.{name}", "--mode=train_and_eval",
               *extra]
    fits: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
    no_fit: dict[str, str] = {}
    for seed in seeds:
        for policy in policies:
            compare.run(command, [policy], [seed], str(out / "mpl"))
            if policy in no_fit:
                continue
            result = _fit_once(name, extra, policy, seed, out / "fit")
            if reason := result.get("why_not"):
                no_fit[policy] = reason
            else:
                fits[policy].append(result)
    compare.run(command, policies, seeds, str(out / "mpl"))  # all of them, in one file
    found = json.loads((out / "mpl" / "compare.json").read_text("utf-8"))
    return {"command": shlex.join(command), "no_fit": no_fit,
            **figures(found, fits)}


def _fit_once(
    name: str, extra: Sequence[str], policy: str, seed: int, out: pathlib.Path
) -> dict[str, Any]:
    path = out / policy / str(seed)
    command = [sys.executable, "-m", "experiments.benchmarks.fit", name, *extra]
    command += [f"--policy={policy}", f"--seed={seed}", f"--workdir={path}"]
    measured = trials.run_once(command, str(path), f"{name}, fit {policy} seed {seed}")
    return {**measured, **json.loads((path / fit.FILE).read_text("utf-8"))}


def figures(
    found: Mapping[str, Any], fits: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Returns what the table says of a binary.

    Args:
        found: content of compare.json.
        fits: by policy what `fit` gave of each seed, in their order; or empty.
    """
    base = reference(found["policies"])
    policies: dict[str, Any] = {}
    limits = found["policies"][base]["final"]
    for policy, ours in found["policies"].items():
        row = {name: ours[name] for name in (
            "final", "difference", "training_secs", "process_secs", "peak_memory_mb")}
        row["within"] = None
        if policy != base and limits["std"] is not None:
            off = abs(ours["final"]["mean"] - limits["mean"])
            row["within"] = off <= 2 * limits["std"]
        if theirs := fits.get(policy):
            row["fit_final"] = spread(each["final"] for each in theirs)
            row["fit_peak_memory_mb"] = spread(
                each["peak_memory_mb"] for each in theirs)
            for ratio, mine, its in (
                ("fit_over_mpl_training", "training_secs", "training_secs"),
                ("fit_over_mpl_process", "process_secs", "secs"),
            ):
                row[ratio] = spread(
                    each[its] / secs if secs else None
                    for each, secs in zip(theirs, ours[mine]["values"]))
        policies[policy] = row
    return {"metric": f"{found['final_split']} {found['metric']}", "reference": base,
            "seeds": found["seeds"], "policies": policies}


def rows(name: str, measured: Mapping[str, Any]) -> list[list[str]]:
    """Returns the rows of a binary in the order of the policies."""
    def cells(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
        return [_text(row.get(each)) for each in names]

    within = {None: "–", True: "yes", False: "NO"}
    return [
        [name, policy, measured["metric"], *cells(row, ("final", "difference")),
         within[row["within"]],
         *cells(row, ("training_secs", "process_secs", "peak_memory_mb", "fit_final",
                      "fit_over_mpl_training", "fit_over_mpl_process"))]
        for policy, row in measured["policies"].items()
    ]


def _text(values: Spread | None) -> str:
    """Returns "0.985 ± 0.002", or "–"."""
    if values is None or values["mean"] is None:
        return "–"
    std = values["std"]
    return number(values["mean"]) + (f" ± {std:.2g}" if std is not None else "")


def markdown(content: Mapping[str, Any]) -> str:
    """Returns the table and what it says not."""
    lines = ["# Parity", "", f"    {content['command']}", "",
             f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
    below, notes = [], []
    for name, measured in content["binaries"].items():
        if error := measured.get("error"):
            notes.append(f"{name} failed: {error}")
            continue
        if cut := measured.get("cut_short"):
            notes.append(
                f"{name} is cut short by {cut}: as it is, it takes a minute or more.")
        lines += [f"| {' | '.join(row)} |" for row in rows(name, measured)]
        for reason in dict.fromkeys(measured["no_fit"].values()):
            which = [policy for policy in measured["no_fit"]
                     if measured["no_fit"][policy] == reason]
            notes.append(
                f"{name} has no `fit` beside it in {', '.join(which)}: {reason}.")
        ratios = {policy: row["fit_over_mpl_process"]["mean"] for policy, row in
                  measured["policies"].items() if "fit_over_mpl_process" in row}
        below += [f"{name} {policy} ({ratio:.2f})" for policy, ratio in ratios.items()
                  if ratio < GOAL]
    left_out = [name for name in LEFT_OUT if name not in content["binaries"]]
    if left_out:
        notes.append(
            f"Left out: {', '.join(left_out)}, one of whose steps takes 40 seconds.")
    notes += [
        "a ± b: mean and sample standard deviation over seeds; differences and ratios "
        "by pairs of the same seed. Within 2 sd: the mean lies within the reference's "
        "mean ± 2 standard deviations.",
        "Training is blocks of steps, tracing included, without evaluation and saving; "
        "process is from start to end, imports, evaluation and saving included: `fit` "
        "has BackupAndRestore, ModelCheckpoint of the best weights and CSVLogger.",
        "Whole processes also differ in what is no loop: that of `fit` imports mpl, "
        "too, for the model and the data (0.2 s); mpl keeps Python's garbage collector "
        "from what TensorFlow's import makes, and `fit` does without that. So judge "
        "the loops by training.",
        f"`fit` ÷ mpl in whole processes should be at least {GOAL}; below: "
        f"{', '.join(below) or 'none'}."]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def run(
    names: Sequence[str], extra: Sequence[str], policies: Sequence[str],
    seeds: Sequence[int], out: pathlib.Path,
) -> bool:
    """Measures binaries, and writes after each what is known by then.

    Returns:
        Whether all went well.

    Raises:
        ConfigError: a binary or a policy is unknown.
    """
    for policy in policies:
        get_policy(policy)
    if unknown := [name for name in names if name not in binaries.names()]:
        raise ConfigError(f"`binaries` ({', '.join(unknown)}) are not there.",
                          f"Use some of {', '.join(binaries.names())}.")
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "command": shlex.join([*_COMMAND, *sys.argv[1:]]),
        "machine": machine.describe(), "binaries": {},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    for name in names:
        cut = () if extra else CUT_SHORT.get(name, ())
        try:
            measured = measure(name, extra or cut, policies, seeds, out / name)
            if cut:
                measured["cut_short"] = shlex.join(cut)
        except ConfigError as error:
            measured = {"error": " ".join(str(error).split())}
        content["binaries"][name] = measured
        report.write_json(out / "parity.json", content)
        (out / "parity.md").write_text(markdown(content), encoding="utf-8")
    print(f"\n{markdown(content)}")
    return not any("error" in each for each in content["binaries"].values())


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a command line, by default this process's; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = Parser(shlex.join(_COMMAND), allow_abbrev=False,
                    description="Policies over seeds, and Keras's fit beside each.")
    add = parser.add_argument
    default = [name for name in binaries.names() if name not in LEFT_OUT]
    add("--out", required=True, help="folder for the trainings and the table")
    add("--binaries", default=",".join(default), help="(default: %(default)s)")
    add("--policies", default="float32,mixed_bfloat16,mixed_float16",
        help="float32, or else the first, is the reference (default: %(default)s)")
    add("--seeds", type=compare.integers, default="0,1,2",
        help="(default: %(default)s)")
    given = parser.parse_args(words[:cut])
    well: list[bool] = []
    code = code_of(lambda: well.append(run(
        given.binaries.split(","), words[cut + 1:], given.policies.split(","),
        given.seeds, pathlib.Path(given.out))))
    return code or int(not all(well))


if __name__ == "__main__":
    sys.exit(main())
