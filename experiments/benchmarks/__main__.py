"""mpl side by side with a hand-written loop, Keras's `fit` and Orbit.

    python -m experiments.benchmarks --out=runs/bench [--works=cnn,gpt] [--full]

The default takes some 20 minutes on 2 cores, and wants nothing else to run beside it.
Expected: tables of times, ratios and goals; results.json and ratios.png in the folder.
Exit code 1: the losses of the systems differ, or a system failed.
"""

import datetime
import importlib.util
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags

from experiments.benchmarks import goals, machine, measure, report
from experiments.benchmarks.measure import Record, Records, Run, Worker

SYSTEMS = ("mpl", "raw", "keras_fit", "orbit")
SCALED = ("mpl", "raw")  # with dynamic scaling, if nothing else is asked for
_HAS_ORBIT = all(importlib.util.find_spec(name) for name in ("orbit", "tf_keras"))
_GET_ORBIT = ("Orbit is not installed: make .venv/installed-bench, or pip install "
              "--no-deps 'tf-models-official==2.20.*' 'tf_keras==2.21.*'.")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of the benchmark."""
    string, names = flags.DEFINE_string, flags.DEFINE_list
    string("out", None, "Folder for results.json, ratios.png and logs.", values)
    flags.mark_flag_as_required("out", values)
    names("works", None, "What to train, names in works.py, and import, the time of "
          "an import. none: a choice.", values)
    names("systems", None, f"Of {', '.join(SYSTEMS)}. none: all.", values)
    names("policies", None, f"Of {', '.join(goals.POLICIES)}. none: the first two.",
          values)
    flags.DEFINE_enum(
        "scaling", "auto", ["auto", "none", "dynamic", "both"], "Loss scaling; auto: "
        "none for all systems, dynamic for mpl, and for raw where a goal asks.", values)
    flags.DEFINE_bool("full", False, "All works, policies and scalings.", values)
    flags.DEFINE_integer("rounds", 7, "Blocks of each system.", 3, None, values)
    flags.DEFINE_integer("starts", 3, "Processes of each system; --full: in "
                         "each policy, else one in all but the last.", 1, None, values)
    flags.DEFINE_float("block_secs", 0.3, "Length of a block of the fastest system.",
                       0.01, None, values)
    flags.DEFINE_enum(
        "jit_compile", None, ["auto", "true", "false"], "Compile the steps of all "
        "systems with XLA. none: each as it does by itself.", values)


def worker_command(run: Run, jit_compile: str | None = None) -> list[str]:
    """Returns the command that starts the worker of a run."""
    command = [sys.executable, "-m", "experiments.benchmarks.worker"]
    command += [f"--{name}={value}" for name, value in run._asdict().items()]
    if jit_compile:
        command.append(f"--jit_compile={jit_compile}")
    return [*command, f"--started={time.time()}"]


def plan(
    work: str,
    policies: Sequence[str],
    systems: Sequence[str],
    scaling: str,
    starts: int,
    full: bool = True,
) -> dict[Run, int]:
    """Returns the runs of a work, and the number of starts of each.

    Unless it is to be full, that number counts where goals ask for it: in the last
    policy, of few systems, not with dynamic scaling beside none. Elsewhere one does. A
    peer runs with dynamic scaling beside none only where a goal asks for it.
    """
    if scaling in ("none", "dynamic"):
        scalings = {scaling: systems}
    else:
        few = systems if scaling == "both" else [s for s in systems if s in SCALED]
        scalings = {"none": systems, "dynamic": few}
    often = ["mpl", "keras_fit"]  # for the memory
    if any((goal.figure, goal.over.work) == ("first_step", work) for goal in goals.ALL):
        often.append("raw")
    return {
        Run(work, policy, chosen_scaling, system): count
        for policy in policies
        for chosen_scaling, some in scalings.items()
        for system in some
        for count in [starts if len(some) == len(systems) and (
            full or policy == policies[-1] and system in often) else 1]
        if full or scaling != "auto" or chosen_scaling == "none" or system == "mpl"
        or goals.asks_for(Run(work, policy, chosen_scaling, system))
    }


def chosen(
    name: str, given: Sequence[str] | None, known: Sequence[str], default: Sequence[str]
) -> list[str]:
    """Returns the names that a flag gives, or ends the process with code 2."""
    names = list(dict.fromkeys(default if given is None else given))
    wrong = [repr(name) for name in names if name not in known]
    if wrong or not names:
        _exit(f"--{name} has {', '.join(wrong) or 'no name'}; the names are "
              f"{', '.join(known)}.")
    return names


def _exit(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


def _systems(given: Sequence[str] | None) -> list[str]:
    default = SYSTEMS if _HAS_ORBIT else [s for s in SYSTEMS if s != "orbit"]
    systems = chosen("systems", given, SYSTEMS, default)
    if "orbit" in systems and not _HAS_ORBIT:
        _exit(_GET_ORBIT)
    if not _HAS_ORBIT:
        print(f"{_GET_ORBIT} It is left out.")
    return systems


def _available_mb(record: Record) -> float:
    # A GPU's allocator takes memory in regions of up to twice what is used.
    if record.allocator_mb:
        return 0.45 * machine.gpu_memory_mb()
    return 0.8 * machine.available_memory_mb()


def _imports(starts: int, say: Callable[[str], None]) -> Records:
    say("import: tensorflow and mpl in turn")
    secs = machine.import_secs(max(3, starts))
    return {Run(goals.IMPORT, "", "none", name): Record(first_steps_s=values)
            for name, values in secs.items()}


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Measures, and writes after each work what is known by then."""
    from experiments.benchmarks import works  # imports TensorFlow: not for --help

    if argv[1:]:
        _exit(f"Unknown: {' '.join(argv[1:])}; all settings are flags, see --help.")
    default = works.FULL if values.full else works.DEFAULT
    names = chosen("works", values.works, [*works.WORKS, goals.IMPORT],
                   [*default, goals.DIGITS, goals.IMPORT])
    policies = chosen("policies", values.policies, goals.POLICIES,
                      goals.POLICIES if values.full else goals.POLICIES[:2])
    systems = _systems(values.systems)
    scaling = "both" if values.full and values.scaling == "auto" else values.scaling
    folder = pathlib.Path(values.out)
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _exit(f"--out ({folder}) must be a folder that can be written: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers end
    began = time.monotonic()

    def say(line: str) -> None:
        minutes, secs = divmod(int(time.monotonic() - began), 60)
        print(f"[{minutes:3}:{secs:02}] {line}", flush=True)

    def start(run: Run) -> Worker:
        log = folder / "logs" / f"{'-'.join(run)}.log"
        return Worker(worker_command(run, values.jit_compile), log)

    def measure_work(name: str) -> Records:
        if name == goals.IMPORT:
            return _imports(values.starts, say)
        starts = plan(name, policies, systems, scaling, values.starts, values.full)
        if name == goals.DIGITS:  # for its starts alone
            pair = [system for system in systems if system in ("mpl", "keras_fit")]
            starts = plan(name, policies, pair, "none", values.starts, values.full)
        return measure.measure(
            starts, start, rounds=0 if name == goals.DIGITS else values.rounds,
            block_secs=values.block_secs, updates=works.WORKS[name].updates,
            available_mb=_available_mb, say=say)

    say("the machine: matrix products")
    facts = machine.describe()
    facts |= machine.measure_devices([p.removeprefix("mixed_") for p in policies])
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    records: Records = {}
    for name in names:
        records |= measure_work(name)
        measure.add_matmul_fractions(records, facts["matmul_flops_per_sec"])
        results = goals.judge(records, names, policies)
        report.write_json(folder / "results.json", report.results_json(
            facts, records, results, command=shlex.join(sys.argv), date=date,
            secs=time.monotonic() - began))
    print(report.tables(records), report.goals_table(results), sep="\n")
    report.draw(records, folder / "ratios.png")
    print(f"\nAll of it: {folder}/results.json, ratios.png")
    faults = report.faults(records)
    print(*faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    define_flags()
    app.run(main)
