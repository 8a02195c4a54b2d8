"""The command line: what it measures, what it refuses, and what it leaves behind."""

import json
import pathlib
import sys

import pytest
from absl import flags

from experiments.benchmarks import __main__ as benchmark
from experiments.benchmarks import machine
from experiments.benchmarks.measure import Run

FAKE = str(pathlib.Path(__file__).with_name("fake_worker.py"))
MS = {"mpl": 1.0, "raw": 2.0, "keras_fit": 4.0, "orbit": 2.0}


def parsed(*arguments):
    """Returns flags of their own: the program's would be those of the other tests."""
    values = flags.FlagValues()
    benchmark.define_flags(values)
    values(["benchmark", *arguments])
    return values


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs the program with fake workers; returns its exit code."""
    out = tmp_path / "out"

    def command(of, jit_compile=None, **losses):
        options = {"ms": MS[of.system], "loss": losses.get(of.system, 2.0)}
        return [sys.executable, FAKE, json.dumps(options)]

    def run(*arguments, **losses):
        monkeypatch.setattr(
            benchmark, "worker_command", lambda of, jit: command(of, jit, **losses))
        with pytest.raises(SystemExit) as end:
            benchmark.main(["benchmark"], parsed(f"--out={out}", *arguments))
        return end.value.code

    monkeypatch.setattr(benchmark, "_HAS_ORBIT", True)
    monkeypatch.setattr(
        machine, "measure_devices",
        lambda dtypes: {"gpus": [], "matmul_flops_per_sec": {"float32": 1e10}})
    monkeypatch.setattr(
        machine, "import_secs", lambda count: {"tensorflow": [2.0], "mpl": [2.0]})
    run.results = lambda: json.loads((out / "results.json").read_text())
    run.out = out
    return run


def test_the_default_scales_mpl_and_what_goals_compare_it_with():
    starts = benchmark.plan("cnn", ["float32"], benchmark.SYSTEMS, "auto", 3, False)
    assert {run[2:]: count for run, count in starts.items()} == {
        ("none", "mpl"): 3, ("none", "raw"): 1, ("none", "keras_fit"): 3,
        ("none", "orbit"): 1, ("dynamic", "mpl"): 1}
    deep = benchmark.plan("deep", ["float32"], benchmark.SYSTEMS, "auto", 3, False)
    assert deep[Run("deep", "float32", "none", "raw")] == 3  # its first step is a goal
    starts = benchmark.plan("tiny", ["float32"], benchmark.SYSTEMS, "auto", 3, False)
    assert {run[3] for run in starts if run.scaling == "dynamic"} == {"mpl", "raw"}
    starts = benchmark.plan("cnn", ["float32"], benchmark.SYSTEMS, "auto", 3)
    assert {run[3] for run in starts if run.scaling == "dynamic"} == {"mpl", "raw"}


@pytest.mark.parametrize("scaling, pairs", [
    ("none", [("none", "mpl"), ("none", "orbit")]),
    ("dynamic", [("dynamic", "mpl"), ("dynamic", "orbit")]),
    ("both", [("none", "mpl"), ("none", "orbit"),
              ("dynamic", "mpl"), ("dynamic", "orbit")]),
])
def test_scalings_that_are_asked_for_are_those_of_all_systems(scaling, pairs):
    starts = benchmark.plan("cnn", ["float32"], ["mpl", "orbit"], scaling, 2)
    assert [run[2:] for run in starts] == pairs and set(starts.values()) == {2}


def test_a_run_writes_tables_results_and_picture(run, capsys):
    code = run("--works=tiny,digits,import", "--policies=float32", "--rounds=3",
               "--starts=2", "--block_secs=0.05")
    assert code == 0
    results = run.results()
    shown = {(r["work"], r["scaling"], r["system"]): r for r in results["rows"]}
    assert len(shown) == 8
    assert shown["tiny", "none", "raw"]["ms_per_step"]["median"] == pytest.approx(2.0)
    assert shown["tiny", "none", "raw"]["matmul_fraction"] == pytest.approx(0.05)
    assert shown["tiny", "dynamic", "mpl"]["ratios"]["dynamic_over_none_step"]
    assert shown["digits", "none", "keras_fit"]["first_step_s"] == 8.0
    assert shown["digits", "none", "keras_fit"]["ms_per_step"]["median"] is None
    verdicts = {goal["name"]: goal["verdict"] for goal in results["goals"]}
    assert verdicts["tiny float32, step: mpl ÷ raw"] == "met"
    assert verdicts["import, start: mpl ÷ tensorflow"] == "met"
    assert results["machine"]["cores"] > 0 and results["secs"] > 0
    printed = capsys.readouterr().out
    assert "tiny: 3 rounds of 6 blocks" in printed
    assert "0.50 (0.50–0.50)" in printed
    assert (run.out / "logs" / "tiny-float32-none-mpl.log").exists()


def test_losses_that_differ_are_printed_and_end_with_code_1(run, capsys):
    code = run("--works=tiny", "--policies=float32", "--rounds=3", "--starts=1",
               "--block_secs=0.05", mpl=2.1)
    assert code == 1
    lines = capsys.readouterr().out
    for steps in (1, 16):
        assert f"LOSSES DIFFER after {steps} steps: tiny float32 none mpl" in lines
    assert len(run.results()["loss_mismatches"]) == 4  # with dynamic scaling, too


def test_results_of_earlier_works_stay_when_the_run_is_cut(run, monkeypatch):
    def cut(count):
        raise SystemExit(130)

    monkeypatch.setattr(machine, "import_secs", cut)
    code = run("--works=tiny,import", "--policies=float32", "--systems=mpl",
               "--rounds=3", "--starts=1", "--block_secs=0.05", "--scaling=none")
    assert code == 130
    assert [row["work"] for row in run.results()["rows"]] == ["tiny"]


@pytest.mark.parametrize("argument, message", [
    ("--works=tiny,cn", "--works has 'cn'; the names are tiny, deep,"),
    ("--systems=jmp", "--systems has 'jmp'; the names are mpl, raw, keras_fit, orbit."),
    ("--policies=bfloat16", "--policies has 'bfloat16'; the names are float32,"),
    ("--works=", "--works has no name"),
])
def test_unknown_names_are_refused_with_those_that_are_known(
        run, capsys, argument, message):
    assert run(argument) == 2
    assert message in capsys.readouterr().err
    assert not run.out.exists()


def test_a_folder_that_cannot_be_written_is_refused(run, capsys):
    run.out.write_text("a file")
    assert run("--works=tiny") == 2
    assert "must be a folder that can be written" in capsys.readouterr().err


def test_without_orbit_the_rest_is_measured_and_orbit_alone_is_refused(
        run, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "_HAS_ORBIT", False)
    code = run("--works=tiny", "--policies=float32", "--rounds=3", "--starts=1",
               "--block_secs=0.05")
    assert code == 0
    assert {row["system"] for row in run.results()["rows"]} == {
        "mpl", "raw", "keras_fit"}
    assert "Orbit is not installed" in capsys.readouterr().out
    assert run("--systems=orbit") == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize("argument, message", [
    ("--rounds=2", "3"), ("--starts=0", "positive"), ("--scaling=static", "dynamic"),
])
def test_wrong_values_of_flags_are_refused(argument, message):
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        parsed("--out=x", argument)


def test_the_folder_is_required():
    with pytest.raises(flags.IllegalFlagValueError, match="--out"):
        parsed()


def test_a_worker_is_told_its_run_and_when_it_was_started():
    command = benchmark.worker_command(Run("cnn", "float32", "none", "mpl"), "true")
    assert command[1:-1] == [
        "-m", "experiments.benchmarks.worker", "--work=cnn", "--policy=float32",
        "--scaling=none", "--system=mpl", "--jit_compile=true"]
    assert float(command[-1].removeprefix("--started=")) > 1e9


def test_the_machine_is_described():
    facts = machine.describe()
    assert facts["cores"] >= 1 and facts["memory_mb"] > 100
    assert facts["versions"]["tensorflow"].startswith("2.")
    assert machine.available_memory_mb() > 100
